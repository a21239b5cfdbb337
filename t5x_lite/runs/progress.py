"""How far a run is: metrics averaged over a window, and the progress line."""

import contextlib
import dataclasses
import datetime
import html
import importlib
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import humanize

from t5x_lite.errors import UsageError
from t5x_lite.training.steps import TASK_LOSS, TASK_WEIGHT

log = logging.getLogger(__name__)

format_count = humanize.metric  # in three digits: 950, 12.3 k, 4.56 M
_CLEAR_LINE = '\r\x1b[K'


@dataclasses.dataclass(kw_only=True)
class Window:
  """Averages training metrics over some steps and adds what they cost."""

  batch_shapes: Mapping[str, tuple[int, ...]]  # global, to tell how full it is
  step_flops: float  # of the model; see flops.py
  peak_flops: float | None  # of all devices; None where it is not known, as on CPUs: then no MFU

  def __post_init__(self):
    self._sums: dict[str, float] = {}
    self.num_steps = self._skipped = 0  # since the last summary
    self._start = time.monotonic()

  def add(self, metrics: Mapping[str, float]) -> None:
    """Adds one step's metrics."""
    for name, value in metrics.items():
      self._sums[name] = self._sums.get(name, 0.0) + value
    self.num_steps += 1

  def skip(self) -> None:
    """Counts a step whose update was left out; it has no metrics."""
    self._skipped += 1

  def pause(self, seconds: float) -> None:
    """Leaves time that was not training out of the rates."""
    self._start += seconds

  def summary(self) -> dict[str, float]:
    """Returns means and rates since the last summary, and starts anew."""
    count = max(1, self.num_steps)
    seconds = max(1e-9, time.monotonic() - self._start) / count
    metrics = {name: total / count for name, total in self._sums.items()}
    # Of a task, the mean over its tokens: some steps may have none.
    for name in [name for name in self._sums if name.startswith(TASK_WEIGHT)]:
      task, weight = name.removeprefix(TASK_WEIGHT), metrics.pop(name)
      total = metrics.pop(TASK_LOSS + task)
      if weight:
        metrics |= {f'cross_entropy/{task}': total / weight, f'loss_weight/{task}': weight}
    metrics['seconds_per_step'] = seconds
    if self._skipped:
      metrics['skipped_updates'] = float(self._skipped)
    arrays = {'target_tokens': 'decoder_target_tokens', 'input_tokens': 'encoder_input_tokens'}
    for tokens, array in arrays.items():
      if array in self.batch_shapes:
        metrics[f'{tokens}_per_second'] = metrics[tokens] / seconds
        # The rest of the batch is padding.
        metrics[f'{tokens}_fill'] = metrics[tokens] / math.prod(self.batch_shapes[array])
    rate = self.step_flops / seconds
    metrics['model_tflops_per_second'] = rate / 1e12
    if self.peak_flops is not None:
      metrics['mfu'] = rate / self.peak_flops
    self.__post_init__()  # starts anew
    return metrics


def format_duration(seconds: float) -> str:
  """Returns seconds as 0:00:42 or 4 days, 3:10:00."""
  return str(datetime.timedelta(seconds=round(seconds)))


def in_notebook() -> bool:
  """Whether this is a Jupyter kernel, where a line can rewrite itself too."""
  if 'ipykernel' not in sys.modules:
    return False
  shell = importlib.import_module('IPython').get_ipython()
  return getattr(shell, 'kernel', None) is not None


def show_page(text: str) -> None:
  """Shows an HTML page below a notebook's cell, in a frame: its style is not the notebook's."""
  frame = f'<iframe srcdoc="{html.escape(text)}" width="100%" height="600"></iframe>'
  importlib.import_module('IPython.display').display({'text/html': frame}, raw=True)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
  """Holds back what libraries say while they are imported; shown after all if it ends in a bug.

  TensorFlow reports on oneDNN and CUDA from C++, before it has read the log level it was given.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  sys.stderr.flush()
  with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), 'wb') as stderr:
    os.dup2(held.fileno(), 2)
    try:
      yield
    except UsageError:
      raise
    except BaseException:
      held.seek(0)
      stderr.write(held.read())
      raise
    finally:
      os.dup2(stderr.fileno(), 2)


class Progress:
  """One line that rewrites itself on a terminal; plain log lines elsewhere.

  Not tqdm or rich: the time left is without pauses for evaluation, means as in metrics.jsonl.
  """

  unit = 'step'  # what is counted

  def __init__(
    self, *, first_step: int, total_steps: int, stream: TextIO | None = None, active: bool = True
  ):
    """Starts the clock; all processes but one are not active. The stream is stderr by default."""
    self._stream = stream if stream is not None else sys.stderr
    self._active, self._tty = active, active and self._stream.isatty()
    self._notebook = active and in_notebook()
    self._shown_cell: Any = None
    self._first_step, self._total_steps = first_step, total_steps
    self._start = time.monotonic()  # later by what was paused
    self._shown = False

  def __enter__(self) -> 'Progress':
    """Makes log lines start on a clean line while the progress line shows."""
    for handler in logging.getLogger().handlers if self._tty else ():
      handler.addFilter(self._clean_line)
    return self

  def __exit__(self, *exc: object) -> None:
    for handler in logging.getLogger().handlers:
      handler.removeFilter(self._clean_line)
    self.clear()

  def _clean_line(self, _: logging.LogRecord) -> bool:
    self.clear()
    return True

  def clear(self) -> None:
    """Removes the progress line until the next update."""
    if self._tty and self._shown:
      print(_CLEAR_LINE, end='', file=self._stream, flush=True)
      self._shown = False

  def pause(self, seconds: float) -> None:
    """Leaves time that was not training out of the estimate."""
    self._start += seconds

  def eta(self, step: int) -> float:
    """Seconds of training left, from the average so far."""
    per_step = (time.monotonic() - self._start) / max(1, step - self._first_step)
    return max(0.0, per_step * (self._total_steps - step))

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows where the run is."""
    if not self._active:
      return
    forms = {
      'loss': 'loss {:.4f}'.format,
      'accuracy': 'accuracy {:.3f}'.format,
      'learning_rate': 'lr {:.3g}'.format,
      'seconds_per_step': 's/step {:.3g}'.format,
      'lines_per_second': '{:.3g} lines/s'.format,
      'target_tokens_per_second': lambda speed: f'{format_count(speed)} target tokens/s',
      'mfu': 'MFU {:.1%}'.format,
    }
    parts = [form(metrics[name]) for name, form in forms.items() if name in metrics]
    if self._total_steps:  # else it is not known
      parts.append(f'ETA {format_duration(self.eta(step))}')
    of = f'/{self._total_steps}' if self._total_steps else ''
    line = '  '.join([f'{self.unit} {step}{of}', *parts])
    if self._notebook:  # no terminal: every line would stay, and be cut at 80 columns
      if self._shown_cell is None:
        display = importlib.import_module('IPython.display').display
        self._shown_cell = display({'text/plain': line}, raw=True, display_id=True)
      else:
        self._shown_cell.update({'text/plain': line}, raw=True)
      return
    if not self._tty:
      log.info('%s', line)
      return
    shown = line[: max(10, shutil.get_terminal_size().columns - 1)]
    print(_CLEAR_LINE + shown, end='', file=self._stream, flush=True)
    self._shown = True
