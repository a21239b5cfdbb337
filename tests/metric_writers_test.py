import importlib
import io
import json
import logging
import struct
import subprocess
import sys
import time

import pytest

from t5x_lite import metric_writers
from t5x_lite.metric_writers import MetricWriter, Progress, Window


class Terminal(io.StringIO):
  def isatty(self):
    return True


def read_events(model_dir):
  """Parses TensorBoard's files by their format, without TensorFlow."""
  event_pb2 = importlib.import_module('tensorboard.compat.proto.event_pb2')
  events = []
  for path in sorted((model_dir / 'tensorboard').iterdir()):
    assert 'tfevents' in path.name
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[12 + length + 4 :]
  return events


# ---- Files ----


def test_writes_jsonl_and_tensorboard(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0) as writer:
    writer.write(10, {'loss': 2.5, 'eval/task/loss': 3.0})
    writer.write(20, {'loss': float('nan')})
    writer.write(30, {})
  first, second = metric_writers.read_metrics(str(tmp_path))
  assert (first['step'], first['loss']) == (10, 2.5)
  assert first['eval/task/loss'] == 3.0
  assert (second['step'], second['loss']) == (20, None)
  version, start, *scalars = read_events(tmp_path)
  assert version.file_version == 'brain.Event:2'
  assert (start.step, start.session_log.status) == (0, 1)
  found = {
    (event.step, value.tag): value.simple_value
    for event in scalars
    for value in event.summary.value
  }
  assert found[10, 'loss'] == 2.5
  assert found[20, 'loss'] != found[20, 'loss']


def test_every_line_can_be_read_at_once(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0) as writer:
    writer.write(1, {'loss': 1.0})
    assert len(metric_writers.read_metrics(str(tmp_path))) == 1
    assert len(read_events(tmp_path)) == 3


def test_a_restart_drops_what_came_after_its_checkpoint(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': float(step)})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "lo')  # killed here
  with MetricWriter(str(tmp_path), first_step=2) as writer:
    writer.write(3, {'loss': 30.0})
  entries = metric_writers.read_metrics(str(tmp_path))
  assert [e['loss'] for e in entries] == [1.0, 2.0, 30.0]
  assert [e.step for e in read_events(tmp_path) if e.HasField('session_log')]
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    json.loads(line)


def test_only_one_process_writes(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0, active=False) as writer:
    writer.write(1, {'loss': 1.0})
  assert list(tmp_path.iterdir()) == []


def test_no_metrics_yet(tmp_path):
  assert metric_writers.read_metrics(str(tmp_path)) == []


def test_needs_no_tensorflow(tmp_path):
  code = (
    'import sys\n'
    'from t5x_lite.metric_writers import MetricWriter\n'
    f'MetricWriter({str(tmp_path)!r}, first_step=0).write(1, {{"a": 1.0}})\n'
    'assert "tensorflow" not in sys.modules\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


# ---- Averages and rates ----


def test_window_means_rates_and_utilisation(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  window = Window(
    batch_shapes={
      'decoder_target_tokens': (4, 10),
      'encoder_input_tokens': (4, 20),
    },
    step_flops=6e12,
    peak_flops=1e12,
    num_devices=2,
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
  window = Window(
    batch_shapes={}, step_flops=1.0, peak_flops=None, num_devices=1
  )
  window.add({'loss': 1.0})
  assert 'mfu' not in window.summary()


# ---- Terminal ----


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
  assert 'step 3/9  loss 2.0000  12.3k target tokens/s  ETA' in caplog.text


def test_eta_leaves_pauses_out(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  progress = Progress(first_step=10, total_steps=30, stream=io.StringIO())
  now[0] = 25.0
  progress.pause(5.0)
  assert progress.eta(20) == pytest.approx(20.0)


@pytest.mark.parametrize(
  'seconds, text',
  [(42, '0:42'), (725, '12:05'), (11241, '3:07:21'), (357000, '4d 03:10')],
)
def test_format_duration(seconds, text):
  assert metric_writers.format_duration(seconds) == text


@pytest.mark.parametrize(
  'value, text', [(950, '950'), (12345, '12.3k'), (4.56e6, '4.56M')]
)
def test_format_count(value, text):
  assert metric_writers.format_count(value) == text
