"""What a run's files say of it, read so that no damaged line is in the way."""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.runs import checkpoints, files, metric_writers, run_directory

_EVALUATIONS = ('eval/', 'infer_eval/')
# Counts of what was evaluated, not how well.
_COUNTS = ('target_tokens', 'examples')
_LOWER_IS_BETTER = ('loss', 'perplexity', 'error_rate', '_edit')


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Decoded examples of one file."""

  name: str  # of the evaluation, such as 'infer_eval/TASK', the same in every run
  file: str  # below the run directory
  lines: Sequence[Mapping[str, Any]]  # {'input', 'prediction', 'target'} of each example


@dataclasses.dataclass(frozen=True)
class Run:
  """One run as its files tell of it; what is missing or damaged is empty."""

  name: str
  path: str
  # (step, value) of each metric, by name; a step without a value is a gap: NaN.
  series: Mapping[str, Sequence[tuple[int, float]]]
  times: Sequence[float]  # in seconds since 1970, at which metrics were written
  model: Mapping[str, Any]
  lengths: Mapping[str, Any]
  config: Mapping[str, Any]
  texts: Mapping[str, str]  # the configuration's files by name
  steps: Sequence[int]  # of the checkpoints that are kept
  predictions: Sequence[Predictions]  # of the newest evaluation of each kind
  # Metrics by task of evaluations of a checkpoint, by folder.
  results: Mapping[str, Mapping[str, Mapping[str, float]]]

  def evaluations(self) -> dict[str, list[tuple[int, float]]]:
    """Returns the finite points of every metric of an evaluation."""
    found = {
      name: [(x, y) for x, y in points if math.isfinite(y)]
      for name, points in self.series.items()
      if name.startswith(_EVALUATIONS) and not name.endswith(_COUNTS)
    }
    return {name: points for name, points in found.items() if points}

  def last(self, name: str) -> float | None:
    """Returns the newest finite value of a metric."""
    values = [y for _, y in self.series.get(name, ()) if math.isfinite(y)]
    return values[-1] if values else None

  def mean(self, name: str) -> float | None:
    """Returns the mean over steps of a metric that averages over windows."""
    steps = sum(n for n, _ in self._windows(name))
    return (self.total(name) or 0.0) / steps if steps else None

  def total(self, name: str) -> float | None:
    """Returns the sum over steps of such a metric."""
    windows = self._windows(name)
    return sum(n * y for n, y in windows) if windows else None

  def _windows(self, name: str) -> list[tuple[int, float]]:
    """Returns (steps averaged over, finite mean); the first is as long as the next."""
    points = self.series.get(name, ())
    lengths = [b - a for (a, _), (b, _) in itertools.pairwise(points)]
    if points:
      first = points[0][0]
      lengths.insert(0, min(first, lengths[0]) if lengths else first)
    windows = zip(lengths, points, strict=True)
    return [(n, y) for n, (_, y) in windows if math.isfinite(y)]


def best(name: str, points: Sequence[tuple[int, float]]) -> tuple[int, float]:
  """Returns step and value of the best point of an evaluation's metric."""
  return (min if lower_is_better(name) else max)(points, key=lambda point: point[1])


def lower_is_better(name: str) -> bool:
  """True for losses and error rates."""
  return any(part in name.rsplit('/', 1)[-1] for part in _LOWER_IS_BETTER)


def read(path: str, *, name: str = '') -> Run:
  """Reads a run directory (UsageError if it is none); its name on the page is its path, or name."""
  root = epath.Path(path)
  either = (run_directory.MODEL_FILE, metric_writers.METRICS_FILE)
  if not any((root / file).exists() for file in either):
    raise UsageError(f'{path} is no run directory: it has neither {" nor ".join(either)}')
  series, times = series_of(metric_writers.read_metrics(path))
  model = read_json(root / run_directory.MODEL_FILE)
  fields = {field: as_dict(model.get(field)) for field in ('model', 'lengths')}
  names = ('config.gin', 'finetune.gin', run_directory.CONFIG_FILE)
  texts = {file: read_text(root / file) for file in names}
  results, predictions = {}, _of_training(root)
  # Where `eval` and programs like it wrote; its newest step alone.
  folders = [name for name in ('test', 'evaluation') if (root / name).is_dir()]
  evaluated = [p.name for p in listed(root / 'eval') if p.name.isdecimal()]
  folders += [f'eval/{step}' for step in sorted(evaluated, key=int)[-1:]]
  for folder in folders:
    if tasks := as_dict(read_json(root / folder / 'metrics.json').get('tasks')):
      results[folder] = {k: as_dict(v) for k, v in tasks.items()}
    for file in listed(root / folder, '.jsonl'):
      kind = f'{folder.split("/")[0]}/{file.stem}'
      predictions.append(Predictions(kind, f'{folder}/{file.name}', read_lines(file)))
  return Run(
    name=name or path,
    path=path,
    series=series,
    times=times,
    **fields,
    config=read_json(root / run_directory.CONFIG_FILE),
    texts={file: text for file, text in texts.items() if text.strip()},
    steps=checkpoints.steps_in(root / checkpoints.CHECKPOINTS),
    predictions=[one for one in predictions if one.lines],
    results=results,
  )


def series_of(entries: Sequence[Any]) -> tuple[dict[str, list[tuple[int, float]]], list[float]]:
  """Returns (step, value) of every metric in lines of metrics, and the lines' times."""
  series: dict[str, list[tuple[int, float]]] = {}
  times = []
  for entry in entries:
    step = as_dict(entry).get('step')
    if type(step) is not int or step > 2**53:
      continue
    for name, value in entry.items():
      number = _number(value)
      if name == 'time' and math.isfinite(number):
        times.append(number)
      elif name not in ('step', 'time') and (value is None or not math.isnan(number)):
        series.setdefault(name, []).append((step, number))
  for points in series.values():
    points.sort(key=lambda point: point[0])
  return series, times


def _number(value: Any) -> float:
  """Returns a finite number; NaN for everything else."""
  try:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else math.nan
  except OverflowError:
    return math.nan


def _of_training(root: epath.Path) -> list[Predictions]:
  """Returns what the newest evaluation during training decoded."""
  found = []
  for folder in listed(root / 'infer_eval'):
    steps = [path for path in listed(folder, '.jsonl') if path.stem.isdecimal()]
    for path in sorted(steps, key=lambda path: int(path.stem))[-1:]:
      name = f'infer_eval/{folder.name}'
      found.append(Predictions(name, f'{name}/{path.name}', read_lines(path)))
  return found


def listed(folder: epath.Path, suffix: str = '') -> list[epath.Path]:
  """Returns what is in a folder, whatever the folder's name: no glob."""
  found = folder.iterdir() if folder.is_dir() else ()
  return sorted(path for path in found if path.name.endswith(suffix))


def read_text(path: epath.Path) -> str:
  """Returns a file's text; '' if it cannot be read."""
  with contextlib.suppress(OSError):
    return path.read_bytes().decode('utf-8', 'replace')
  return ''


def read_json(path: epath.Path) -> dict[str, Any]:
  """Returns a file's JSON object; empty if there is none."""
  return files.json_object(read_text(path))


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the predictions of a file; lines that are none are left out."""
  # Not splitlines: what a model writes may hold Unicode's other line ends.
  entries = map(files.json_object, read_text(path).split('\n'))
  return [entry for entry in entries if {'input', 'prediction', 'target'} <= entry.keys()]


def as_dict(value: Any) -> dict[str, Any]:
  """Returns what is a dictionary, and else an empty one."""
  return value if isinstance(value, dict) else {}


def names_of(paths: Sequence[str]) -> list[str]:
  """Returns short names: the last folder, or paths where that is ambiguous."""
  last = [epath.Path(p).name if '://' in p else os.path.basename(os.path.abspath(p)) for p in paths]
  both = zip(last, paths, strict=True)
  return [name if name and last.count(name) == 1 else path for name, path in both]
