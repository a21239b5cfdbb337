import io
import logging
import sys
import time
import types

import pytest

from t5x_lite.runs import progress
from t5x_lite.runs.progress import Progress, Window


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_window_means_rates_and_utilisation(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  window = Window(
    batch_shapes={'decoder_target_tokens': (4, 10), 'encoder_input_tokens': (4, 20)},
    step_flops=6e12,
    peak_flops=2e12,
  )
  for loss in (1.0, 3.0):
    window.add({'loss': loss, 'target_tokens': 20.0, 'input_tokens': 60.0})
  now[0] += 14.0
  window.pause(4.0)
  summary = window.summary()
  assert summary['loss'] == 2.0
  assert summary['seconds_per_step'] == 5.0
  assert summary['target_tokens_per_second'] == 4.0
  assert summary['input_tokens_per_second'] == 12.0
  assert summary['target_tokens_fill'] == 0.5
  assert summary['input_tokens_fill'] == 0.75
  assert summary['model_tflops_per_second'] == pytest.approx(1.2)
  assert summary['mfu'] == pytest.approx(0.6)
  window.add({'loss': 7.0, 'target_tokens': 1.0, 'input_tokens': 1.0})
  now[0] += 1.0
  assert window.summary()['loss'] == 7.0


def test_no_utilisation_without_a_peak():
  window = Window(batch_shapes={}, step_flops=1.0, peak_flops=None)
  window.add({'loss': 1.0})
  assert 'mfu' not in window.summary()


def test_progress_line_on_a_terminal():
  terminal = Terminal()
  with Progress(first_step=0, total_steps=100, stream=terminal) as progress:
    progress.update(10, {'loss': 2.0, 'mfu': 0.4})
    progress.update(20, {'loss': 1.5})
  text = terminal.getvalue()
  assert text.count('\r\x1b[K') == 3
  assert '\n' not in text
  assert 'step 20/100' in text and 'loss 1.5000' in text and 'ETA' in text


def test_log_lines_start_on_a_clean_line(caplog):
  terminal = Terminal()
  with Progress(first_step=0, total_steps=9, stream=terminal) as progress:
    progress.update(1, {'loss': 2.0})
    logging.getLogger('t5x_lite').warning('saved')
    assert terminal.getvalue().endswith('\r\x1b[K')


def test_plain_lines_elsewhere(caplog):
  stream = io.StringIO()
  with caplog.at_level(logging.INFO, logger='t5x_lite'):
    with Progress(first_step=0, total_steps=9, stream=stream) as progress:
      progress.update(3, {'loss': 2.0, 'target_tokens_per_second': 12345.0})
  assert stream.getvalue() == ''
  assert 'step 3/9  loss 2.0000  12.3 k target tokens/s  ETA' in caplog.text


def test_eta_leaves_pauses_out(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  progress = Progress(first_step=10, total_steps=30, stream=io.StringIO())
  now[0] = 25.0
  progress.pause(5.0)
  assert progress.eta(20) == pytest.approx(20.0)


@pytest.mark.parametrize(
  'seconds, text', [(42, '0:00:42'), (11241, '3:07:21'), (357000, '4 days, 3:10:00')]
)
def test_format_duration(seconds, text):
  assert progress.format_duration(seconds) == text


@pytest.mark.parametrize('value, text', [(950, '950'), (12345, '12.3 k'), (4.56e6, '4.56 M')])
def test_format_count(value, text):
  assert progress.format_count(value) == text


def test_a_notebook_is_a_place_where_lines_rewrite_themselves(monkeypatch):
  assert not progress.in_notebook()
  shown = []
  shell = types.ModuleType('IPython')
  display = types.ModuleType('IPython.display')
  shell.get_ipython = lambda: types.SimpleNamespace(kernel=object())
  cell = types.SimpleNamespace(update=lambda data, raw: shown.append(('again', data)))

  def show(data, **options):
    shown.append(data)
    return cell if options.get('display_id') else None

  shell.display = display.display = show
  for name, module in (
    ('ipykernel', types.ModuleType('ipykernel')),
    ('IPython', shell),
    ('IPython.display', display),
  ):
    monkeypatch.setitem(sys.modules, name, module)
  assert progress.in_notebook()
  stream = io.StringIO()
  with Progress(first_step=0, total_steps=9, stream=stream) as line:
    line.update(3, {'loss': 2.0})
    line.update(6, {'loss': 1.0})
  # One output that changes, whole; nothing on the stream, which would pile up.
  assert not stream.getvalue()
  first, (again, second) = shown
  assert first['text/plain'].startswith('step 3/9') and 'ETA' in first['text/plain']
  assert again == 'again' and second['text/plain'].startswith('step 6/9')
  progress.show_page('<p class="a">b</p>')
  [page] = shown[2:]
  assert 'srcdoc="&lt;p class=&quot;a&quot;&gt;b&lt;/p&gt;"' in page['text/html']


def test_updates_left_out_are_counted_by_window():
  window = Window(batch_shapes={}, step_flops=1.0, peak_flops=None)
  window.add({'loss': 1.0})
  window.skip()
  assert window.summary()['skipped_updates'] == 1.0
  window.add({'loss': 1.0})
  assert 'skipped_updates' not in window.summary()
