"""Writes metrics to metrics.jsonl and TensorBoard.

No TensorFlow: TensorBoard's own package writes its event format. Only process
0 writes. Names are plain for training ('loss', 'learning_rate'), and start
with 'eval/TASK/' (teacher-forced) or 'infer_eval/TASK/' (decoded) otherwise.
"""

import importlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from tensorboard.summary.writer import record_writer

# Generated when imported: a type checker finds no names in them.
_event_pb2: Any = importlib.import_module('tensorboard.compat.proto.event_pb2')
_summary_pb2: Any = importlib.import_module('tensorboard.compat.proto.summary_pb2')

log = logging.getLogger(__name__)

METRICS_FILE = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'


def read_metrics(model_dir: str) -> list[dict[str, Any]]:
  """Returns the lines of MODEL_DIR/metrics.jsonl, oldest first.

  The last line of a run that was killed may be cut short; it is left out, and
  so is any other that is no JSON.
  """
  path = epath.Path(model_dir) / METRICS_FILE
  if not path.exists():
    return []
  entries = []
  for line in path.read_bytes().decode('utf-8', 'replace').splitlines():
    try:
      entries.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return entries


class MetricWriter:
  """Writes scalars by step into a run directory."""

  def __init__(self, model_dir: str, *, first_step: int, active: bool = True):
    """Opens the files; what a killed run wrote past its checkpoint goes.

    Args:
      model_dir: the run directory; must exist.
      first_step: the step that training continues from.
      active: False on all processes but one; the writer then does nothing.
    """
    self._active = active
    if not active:
      return
    root = epath.Path(model_dir)
    _drop_later(root / METRICS_FILE, first_step)
    self._jsonl = (root / METRICS_FILE).open('a')
    directory = root / TENSORBOARD
    directory.mkdir(parents=True, exist_ok=True)
    name = f'events.out.tfevents.{time.time():.0f}.{os.getpid()}.t5x_lite'
    self._events = record_writer.RecordWriter((directory / name).open('wb'))
    self._event(file_version='brain.Event:2')
    # TensorBoard then forgets what it has seen past this step.
    start = _event_pb2.SessionLog(status=_event_pb2.SessionLog.START)
    self._event(step=first_step, session_log=start)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line and one event; flushed, so that a reader can follow."""
    if not self._active or not metrics:
      return
    scalars = {name: float(value) for name, value in metrics.items()}
    entry: dict[str, Any] = {'step': step, 'time': round(time.time(), 3)}
    for name, value in scalars.items():
      # JSON has no NaN or infinity.
      entry[name] = value if math.isfinite(value) else None
    self._jsonl.write(json.dumps(entry) + '\n')
    self._jsonl.flush()
    values = [
      _summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()
    ]
    self._event(step=step, summary=_summary_pb2.Summary(value=values))
    self._events.flush()

  def _event(self, **fields: Any) -> None:
    event = _event_pb2.Event(wall_time=time.time(), **fields)
    self._events.write(event.SerializeToString())

  def close(self) -> None:
    """Closes the files."""
    if self._active:
      self._jsonl.close()
      self._events.close()

  def __enter__(self) -> 'MetricWriter':
    """Returns the writer itself."""
    return self

  def __exit__(self, *exc: object) -> None:
    """Closes the files."""
    self.close()


def _drop_later(path: epath.Path, step: int) -> None:
  """Rewrites a metrics file without lines past `step` or cut short."""
  if not path.exists():
    return
  kept = []
  lines = path.read_bytes().decode('utf-8', 'replace').splitlines()
  for line in lines:
    try:
      entry = json.loads(line)
    except json.JSONDecodeError:
      continue
    if isinstance(entry, dict) and entry.get('step', 0) <= step:
      kept.append(line)
  if len(kept) < len(lines):
    temporary = path.parent / (path.name + '.tmp')
    temporary.write_text(''.join(line + '\n' for line in kept))
    temporary.replace(path)
