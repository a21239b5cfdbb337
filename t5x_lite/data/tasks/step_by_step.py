"""What a task's preprocessors make of its first rows, one after another."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import seqio

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import row_stream
from t5x_lite.data.tasks import truncation
from t5x_lite.errors import UsageError

# Source rows that are looked at.
_SOURCE_ROWS = 64
_UNCUT = 1 << 24


def examples_of(task: Any, cfg: DatasetConfig, count: int) -> Iterator[tuple[str, list[Any]]]:
  """Yields each preprocessor's name and the first examples that it makes."""
  dataset = task.source.get_dataset(split=cfg.split, shuffle=False).take(_SOURCE_ROWS)
  yield 'source', list(dataset.take(count).as_numpy_iterator())
  for step in task.preprocessors:
    if isinstance(step, seqio.CacheDatasetPlaceholder):
      continue
    with seqio.utils.map_seed_manager(cfg.seed):
      dataset = seqio.utils.add_kwargs_to_transform(
        step, sequence_length=cfg.lengths, output_features=task.output_features
      )(dataset)
    settings = ', '.join(f'{k}={v!r:.40}' for k, v in getattr(step, 'keywords', {}).items())
    name = getattr(getattr(step, 'func', step), '__name__', type(step).__name__)
    yield f'{name}({settings})', list(dataset.take(count).as_numpy_iterator())


def measure(cfg: DatasetConfig, task: Any, sample: int) -> dict[str, list[int]]:
  """Returns the tokens of each feature of the first examples, uncut; UsageError if none come."""
  found: dict[str, list[int]] = {name: [] for name in cfg.lengths}
  if truncation.is_supervised(task, cfg):  # objectives need their lengths
    cfg = dataclasses.replace(cfg, task_feature_lengths=dict.fromkeys(found, _UNCUT))
  [dataset] = row_stream.read_examples(cfg, task, seed=cfg.seed, trim=False)
  for example in itertools.islice(dataset.as_numpy_iterator(), sample):
    for name, counts in found.items():
      counts.append(len(example[name]))
  if not all(found.values()):
    raise UsageError(f'{task.name} has no examples in {cfg.split}: do its steps drop them all?')
  return found
