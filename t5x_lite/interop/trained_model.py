"""A trained model of any format, ready to be read onto devices.

What `infer` and `eval` take, and where `train` learns the architecture from if
no one names it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import adapters, assignment, checkpoint_source, tensors
from t5x_lite.interop.checkpoint_source import Source
from t5x_lite.models.config import T5Config


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A checkpoint that has been checked; only names have been read.

  Attributes:
    path: as the user gave it.
    directory: the folder that was opened; of a run, the run's.
    checkpoint: the same; of a run, the folder of the step.
    format: one of `checkpoint_source.FORMATS`.
    config: the architecture.
    vocabulary: its own.
    step: updates made, 0 if unknown.
    lengths: task feature lengths of training; empty if unknown.
    found: its tensors by canonical name, unread.
  """

  path: str
  directory: str
  checkpoint: str
  format: str
  config: T5Config
  vocabulary: VocabularyConfig
  step: int
  lengths: Mapping[str, int]
  found: Mapping[str, tensors.Tensor]

  def load_params(self, specs: Any) -> Any:
    """Reads the parameters, each part to the device that keeps it.

    Args:
      specs: tree of ShapeDtypeStructs with shardings; see
        `model_sharding.inference_params`.
    """
    shardings = jax.tree.map(lambda spec: spec.sharding, specs)
    return tensors.place(dict(self.found), self.config, shardings, specs)


def open_model(path: str, *, adapter: str = '', **changes: Any) -> TrainedModel:
  """Opens a run of ours, a folder of transformers or T5X, or a hub id.

  Args:
    path: see `checkpoint_source.open_source`.
    adapter: a folder for `adapters.put_on`, or ''.
    **changes: fields of T5Config to change, such as dtype='bfloat16'.

  Raises:
    UsageError: if nothing there can be read, something is missing in it, or it
      does not say what its vocabulary is.
  """
  source = checkpoint_source.open_source(path)
  if adapter:
    source = adapters.put_on(source, adapter)
  return of_source(source, path, **changes)


def of_source(source: Source, path: str, **changes: Any) -> TrainedModel:
  """The same of a source that is open."""
  if source.vocabulary is None:
    raise UsageError(
      f'{path} does not say what its vocabulary is: convert it first with '
      '`t5x-lite convert --vocabulary=...`'
    )
  check_vocabulary(source.config, source.vocabulary)
  config = source.config.replace(**changes)
  found, _ = assignment.assign(source, config)
  return TrainedModel(
    path=path,
    directory=source.path,
    checkpoint=source.checkpoint or source.path,
    format=source.format,
    config=config,
    vocabulary=source.vocabulary,
    step=source.step,
    lengths=source.lengths,
    found=found,
  )


def check_vocabulary(model: T5Config, vocabulary: VocabularyConfig) -> None:
  """Refuses a vocabulary with ids that the embedding has no row for."""
  size = vocabularies.make_vocabulary(vocabulary).vocab_size
  if size > model.vocab_size:
    raise UsageError(
      f'the vocabulary has {size} ids, the embedding only T5Config.vocab_size='
      f'{model.vocab_size} rows: raise vocab_size to {-(-size // 128) * 128}'
    )
