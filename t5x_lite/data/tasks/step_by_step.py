"""What a task makes of its first rows: after each preprocessor, and how long it is."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import seqio

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import row_stream
from t5x_lite.data.tasks import catalog
from t5x_lite.errors import UsageError

# Source rows that are looked at.
_SOURCE_ROWS = 64
# Examples of each task that are looked at before hours of training.
_SAMPLE = 500
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
  if _is_supervised(task, cfg):  # objectives need their lengths
    cfg = dataclasses.replace(cfg, task_feature_lengths=dict.fromkeys(found, _UNCUT))
  [dataset] = row_stream.read_examples(cfg, task, seed=cfg.seed, trim=False)
  for example in itertools.islice(dataset.as_numpy_iterator(), sample):
    for name, counts in found.items():
      counts.append(len(example[name]))
  if not all(found.values()):
    raise UsageError(f'{task.name} has no examples in {cfg.split}: do its steps drop them all?')
  return found


def truncated(
  cfg: DatasetConfig, sample: int = _SAMPLE
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns how many tokens each of the first examples has and loses to the lengths, by task.

  Of supervised tasks alone: denoising cuts documents into pieces of the lengths and loses nothing.
  """
  found = {}
  for task in seqio.get_subtasks(catalog.task_provider(cfg)):
    if cfg.split in task.splits and not cfg.use_cached and _is_supervised(task, cfg):
      once = dataclasses.replace(cfg, shuffle=False, num_epochs=1)
      counts = measure(once, task, sample)
      limits = np.array([[cfg.lengths[name]] for name in counts])
      tokens = np.array([*counts.values()])  # [features, examples]
      found[task.name] = tokens.sum(0), np.maximum(tokens - limits, 0).sum(0)
  return found


def _is_supervised(task: Any, cfg: DatasetConfig) -> bool:
  """True if the lengths cut a task's examples, which are tokenized as they are."""
  return {'inputs', 'targets'} <= cfg.lengths.keys() and any(
    preprocessor in catalog.TRIMMED_TOKENIZERS for preprocessor in task.preprocessors
  )
