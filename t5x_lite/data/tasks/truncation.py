"""How much of a task's text its lengths cut off, told before hours of training.

Only tasks whose text is tokenized as it is: denoising objectives cut documents into pieces of the
lengths and lose nothing.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import seqio

from t5x_lite.data import vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.tasks import catalog
from t5x_lite.data.vocabularies import VocabularyConfig

# Examples of each task that are looked at.
SAMPLE = 500


@dataclasses.dataclass(frozen=True)
class Cut:
  """How many of a task's first examples lose tokens to the lengths, and what share of theirs."""

  task: str
  examples: int
  cut: int
  percent_of_tokens: float


def measure(cfg: DatasetConfig, vocabulary: VocabularyConfig, sample: int = SAMPLE) -> list[Cut]:
  """Tokenizes the first `sample` examples of each supervised task and counts."""
  encode = vocabularies.make_vocabulary(vocabulary).encode
  found = []
  for task in seqio.get_subtasks(catalog.task_provider(cfg)):
    if cfg.split not in task.splits or cfg.use_cached or not is_supervised(task, cfg):
      continue
    examples = cut = tokens = lost = 0
    for example in itertools.islice(_texts(task, cfg.split), sample):
      counts = {feature: len(encode(text)) + 1 for feature, text in example.items()}
      over = sum(max(0, count - cfg.lengths[feature]) for feature, count in counts.items())
      tokens += sum(counts.values())
      lost += over
      cut += over > 0
      examples += 1
    name = catalog.short_name(task.name, vocabulary)
    found.append(Cut(name, examples, cut, percent_of_tokens=100.0 * lost / max(1, tokens)))
  return found


def is_supervised(task: Any, cfg: DatasetConfig) -> bool:
  """True if the lengths cut a task's examples, which are tokenized as they are."""
  return {'inputs', 'targets'} <= cfg.lengths.keys() and any(
    preprocessor in catalog.TRIMMED_TOKENIZERS for preprocessor in task.preprocessors
  )


def _texts(task: Any, split: str) -> Iterator[dict[str, str]]:
  """Yields {feature: text} of each example before the tokenization."""
  for row in catalog.untokenized(task, split).as_numpy_iterator():
    columns = {key: np.ravel(row[key]) for key in ('inputs', 'targets') if key in row}
    for values in zip(*columns.values(), strict=True):
      if all(isinstance(value, bytes) for value in values):
        texts = (value.decode('utf-8', 'replace') for value in values)
        yield dict(zip(columns, texts, strict=True))
