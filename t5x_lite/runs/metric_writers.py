"""Writes metrics to metrics.jsonl, and to TensorBoard and wandb as asked.

No TensorFlow: TensorBoard's own package writes its event format. Names are plain for training
('loss'), and start with 'eval/TASK/' (teacher-forced) or 'infer_eval/TASK/' (decoded) otherwise.
"""

import contextlib
import html
import importlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer import record_writer
from tensorboard.util import tensor_util

from t5x_lite.errors import UsageError, refusing
from t5x_lite.runs import files
from t5x_lite.training.steps import HISTOGRAM_BOUNDS

# Generated when imported: a type checker finds no names in them.
_event_pb2: Any = importlib.import_module('tensorboard.compat.proto.event_pb2')
_summary_pb2: Any = importlib.import_module('tensorboard.compat.proto.summary_pb2')

METRICS_FILE = 'metrics.jsonl'
TENSORBOARD, WANDB, NONE = 'tensorboard', 'wandb', 'none'
WANDB_RUN_ID_FILE = 'wandb_run_id'
NUM_SAMPLES = 10
_SAMPLE_COLUMNS = ('input', 'prediction', 'target')


def read_metrics(model_dir: str) -> list[dict[str, Any]]:
  """Returns the lines of MODEL_DIR/metrics.jsonl, oldest first; less what a kill cut short."""
  path = epath.Path(model_dir) / METRICS_FILE
  text = files.retried(path, path.read_bytes).decode('utf-8', 'replace') if path.exists() else ''
  return [entry for entry in map(files.json_object, text.splitlines()) if entry]


def reporters(report_to: str | Sequence[str]) -> tuple[str, ...]:
  """Returns the names in a list, or a text with commas; UsageError for one that cannot be used."""
  listed = [report_to] if isinstance(report_to, str) else report_to
  names = [name.strip() for one in listed for name in one.split(',') if name.strip()]
  for name in names:
    if name not in (TENSORBOARD, WANDB, NONE) or (name == NONE and len(names) > 1):
      allowed = f'{TENSORBOARD}, {WANDB}, both, or {NONE}'
      raise UsageError(f'report_to is {",".join(names)}; allowed are {allowed}')
  if WANDB in names:
    wandb = _wandb()
    if wandb.setup().settings.mode == 'online':
      with refusing('wandb needs a login, or WANDB_MODE=offline', wandb.Error):
        wandb.login()
  return tuple(dict.fromkeys(name for name in names if name != NONE))


def _wandb() -> Any:
  fix = "in a checkout, pip install '.[wandb]'"
  with refusing(f'report_to={WANDB} needs the package wandb; {fix}', ImportError):
    return importlib.import_module('wandb')


class MetricWriter(contextlib.AbstractContextManager):
  """Writes scalars, samples and histograms by step into a run directory."""

  def __init__(
    self,
    model_dir: str,
    *,
    first_step: int,
    active: bool = True,
    report_to: Sequence[str] = (TENSORBOARD,),
    config: Mapping[str, Any] | None = None,
  ):
    """Opens the files; what a killed run wrote past its checkpoint, at first_step, goes.

    All writers but one process's are not active, and do nothing; report_to is what `reporters`
    returns; wandb shows the config beside the run.
    """
    self._active, self._files = active, contextlib.ExitStack()
    self._sinks: list[_TensorBoard | _Wandb] = []
    if not active:
      return
    root = epath.Path(model_dir)
    kept = [entry for entry in read_metrics(model_dir) if entry.get('step', 0) <= first_step]
    files.write_text(root / METRICS_FILE, ''.join(json.dumps(entry) + '\n' for entry in kept))
    self._jsonl = _opened(root / METRICS_FILE, 'a', self._files)
    if TENSORBOARD in report_to:
      self._sinks.append(_TensorBoard(root / TENSORBOARD, first_step, self._files))
    if WANDB in report_to:
      self._sinks.append(_Wandb(root, config or {}, self._files))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line and one event; flushed, so that a reader can follow."""
    if not self._active or not metrics:
      return
    scalars = {name: float(value) for name, value in metrics.items()}
    entry: dict[str, Any] = {'step': step, 'time': round(time.time(), 3)}
    # JSON has no NaN or infinity.
    entry |= {name: x if math.isfinite(x) else None for name, x in scalars.items()}
    self._jsonl.write(json.dumps(entry) + '\n')
    files.retried(METRICS_FILE, self._jsonl.flush)  # what was not written is kept for it
    for sink in self._sinks:
      sink.scalars(step, scalars)

  def write_samples(self, step: int, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Shows the first predictions of an evaluation, beside their references."""
    rows = [[str(line[column]) for column in _SAMPLE_COLUMNS] for line in lines[:NUM_SAMPLES]]
    for sink in self._sinks:
      sink.samples(step, name, rows)

  def write_histograms(self, step: int, counts: Mapping[str, np.ndarray]) -> None:
    """Draws histograms of `steps.HISTOGRAM_BOUNDS`, by name."""
    for sink in self._sinks if counts else ():
      sink.histograms(step, counts)

  def __exit__(self, *exc: Any) -> None:
    """Closes the files, and tells wandb whether the run failed."""
    self._files.__exit__(*exc)


def _opened(path: epath.Path, mode: str, stack: contextlib.ExitStack) -> Any:
  # Of a file on gs:// `open` returns a context manager, and no file.
  return files.retried(path, lambda: stack.enter_context(path.open(mode)))


class _TensorBoard:
  """Event files, as TensorBoard's own writer makes them."""

  def __init__(self, directory: epath.Path, first_step: int, stack: contextlib.ExitStack):
    files.retried(directory, lambda: directory.mkdir(parents=True, exist_ok=True))
    name = f'events.out.tfevents.{time.time():.0f}.{os.getpid()}.t5x_lite'
    self._events = record_writer.RecordWriter(_opened(directory / name, 'wb', stack))
    self._event(file_version='brain.Event:2')
    # TensorBoard then forgets what it has seen past this step.
    log_type = _event_pb2.SessionLog
    self._event(step=first_step, session_log=log_type(status=log_type.START))

  def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._values(step, [{'tag': name, 'simple_value': x} for name, x in scalars.items()])

  def samples(self, step: int, name: str, rows: list[list[str]]) -> None:
    # It renders Markdown, and a matrix as a table.
    cells = [[_literal(cell) for cell in row] for row in (list(_SAMPLE_COLUMNS), *rows)]
    table = np.array(cells, object)
    self._values(step, [_tensor_value(text_metadata, name, table, tag=f'{name}/samples')])

  def histograms(self, step: int, counts: Mapping[str, np.ndarray]) -> None:
    edges = HISTOGRAM_BOUNDS[:-1], HISTOGRAM_BOUNDS[1:]
    tables = {name: np.stack([*edges, x], axis=1, dtype=np.float64) for name, x in counts.items()}
    values = [_tensor_value(histogram_metadata, name, x, tag=name) for name, x in tables.items()]
    self._values(step, values)

  def _values(self, step: int, values: Sequence[Mapping[str, Any]]) -> None:
    found = [_summary_pb2.Summary.Value(**value) for value in values]
    self._event(step=step, summary=_summary_pb2.Summary(value=found))
    files.retried(TENSORBOARD, self._events.flush)

  def _event(self, **fields: Any) -> None:
    event = _event_pb2.Event(wall_time=time.time(), **fields)
    self._events.write(event.SerializeToString())


def _tensor_value(plugin: Any, name: str, array: np.ndarray, *, tag: str) -> dict[str, Any]:
  metadata = plugin.create_summary_metadata(display_name=name, description='')
  return {'tag': tag, 'metadata': metadata, 'tensor': tensor_util.make_tensor_proto(array)}


def _literal(text: str) -> str:
  """Returns Markdown that shows a text as it is."""
  return re.sub(r'([\\`*_{}\[\]#|])', r'\\\1', html.escape(text, quote=False))


class _Wandb:
  """A run of wandb; its id is kept, so that a restart continues it."""

  def __init__(self, root: epath.Path, config: Mapping[str, Any], stack: contextlib.ExitStack):
    self._wandb = _wandb()
    path = root / WANDB_RUN_ID_FILE
    if not path.exists():
      files.write_text(path, secrets.token_hex(4))
    self._run = self._wandb.init(
      project=os.environ.get('WANDB_PROJECT', 't5x_lite'),
      name=os.environ.get('WANDB_NAME', root.name),
      dir=os.fspath(root),
      id=path.read_text().strip(),
      resume='allow',
      config=dict(config),
    )
    stack.push(lambda failed, *_: self._run.finish(exit_code=int(failed is not None)))
    # Not wandb's own counter: that would refuse the steps a restart repeats.
    self._run.define_metric('*', step_metric='step')

  def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log({'step': step, **scalars})

  def samples(self, step: int, name: str, rows: list[list[str]]) -> None:
    table = self._wandb.Table(columns=list(_SAMPLE_COLUMNS), data=rows)
    self._run.log({'step': step, f'{name}/samples': table})

  def histograms(self, step: int, counts: Mapping[str, np.ndarray]) -> None:
    draw = self._wandb.Histogram
    drawn = {name: draw(np_histogram=(x, HISTOGRAM_BOUNDS)) for name, x in counts.items()}
    self._run.log({'step': step, **drawn})
