"""How much of a task's text its lengths cut off, told before hours of training.

Only tasks whose text is tokenized as it is: denoising objectives cut documents
into pieces of the lengths and lose nothing.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
import seqio

from t5x_lite.data import vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.tasks import catalog, text_preprocessors
from t5x_lite.data.vocabularies import VocabularyConfig

# Examples of each task that are looked at.
SAMPLE = 500

# Tokenizers whose examples the lengths cut.
_TRIMMED = (
  text_preprocessors.tokenize_rows,
  seqio.preprocessors.tokenize,
  seqio.preprocessors.tokenize_and_append_eos,
)


@dataclasses.dataclass(frozen=True)
class Cut:
  """What the lengths cut of a task's first examples.

  Attributes:
    task: its name.
    examples: that were looked at.
    cut: of them, those that lose tokens.
    percent_of_tokens: that are lost, of all.
  """

  task: str
  examples: int
  cut: int
  percent_of_tokens: float


def measure(cfg: DatasetConfig, vocabulary: VocabularyConfig, sample: int = SAMPLE) -> list[Cut]:
  """Tokenizes the first examples of each supervised task and counts.

  Args:
    cfg: names the task or mixture, the split and the lengths.
    vocabulary: the model's.
    sample: examples of each task.
  """
  provider = catalog.task_provider(cfg)
  encode = vocabularies.make_vocabulary(vocabulary).encode
  found = []
  for task in seqio.get_subtasks(provider):
    if cfg.split not in task.splits or cfg.use_cached:
      continue
    if not is_supervised(task, cfg):
      continue
    examples = cut = tokens = lost = 0
    texts = _texts(task, cfg.split)
    for example in itertools.islice(texts, sample):
      over = 0
      for feature, text in example.items():
        count = len(encode(text)) + 1
        tokens += count
        over += max(0, count - cfg.lengths[feature])
      lost += over
      cut += over > 0
      examples += 1
    percent = 100.0 * lost / max(1, tokens)
    name = catalog.short_name(task.name, vocabulary)
    found.append(Cut(name, examples, cut, percent))
  return found


def is_supervised(task: Any, cfg: DatasetConfig) -> bool:
  """True if the lengths cut a task's examples, which are tokenized as they are."""
  return {'inputs', 'targets'} <= cfg.lengths.keys() and any(
    preprocessor in _TRIMMED for preprocessor in task.preprocessors
  )


def _texts(task: Any, split: str) -> Any:
  """Yields {feature: text} of each example before the tokenization."""
  dataset = task.source.get_dataset(split=split, shuffle=False)
  for preprocessor in task.preprocessors:
    if preprocessor in _TRIMMED:
      break
    dataset = seqio.utils.add_kwargs_to_transform(
      preprocessor, output_features=task.output_features
    )(dataset)
  for row in dataset.as_numpy_iterator():
    columns = {key: np.ravel(row[key]) for key in ('inputs', 'targets') if key in row}
    for values in zip(*columns.values(), strict=True):
      if all(isinstance(value, bytes) for value in values):
        yield {
          key: value.decode('utf-8', 'replace') for key, value in zip(columns, values, strict=True)
        }
