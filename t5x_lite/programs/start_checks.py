"""Checks between configurations, made before a program writes anything.

Each config validates itself; what is here concerns two of them at a time. All
checks raise `UsageError`.
"""

import dataclasses

from t5x_lite.data import vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.tasks import catalog
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.models.config import T5Config
from t5x_lite.runs import run_directory

_CONVERTERS = {
  'encoder_decoder': ('enc_dec',),
  'decoder': ('lm', 'prefix_lm'),
  'encoder': (),
}


def check_positive(name: str, value: int | None) -> None:
  """Refuses a count or period below 1; None stands for no bound."""
  if value is not None and value < 1:
    raise UsageError(f'{name} is {value}; it must be at least 1')


def check_model(model: T5Config, vocabulary: VocabularyConfig) -> None:
  """Refuses a vocabulary with ids that the embedding has no row for."""
  size = vocabularies.make_vocabulary(vocabulary).vocab_size
  if size > model.vocab_size:
    raise UsageError(
      f'the vocabulary has {size} ids, the embedding only T5Config.vocab_size='
      f'{model.vocab_size} rows: raise vocab_size to {-(-size // 128) * 128}'
    )


def resolve_dataset(
  dataset: DatasetConfig, model: T5Config, vocabulary: VocabularyConfig
) -> DatasetConfig:
  """Returns the config under the task's full name, which has a vocabulary.

  Raises:
    UsageError: if the data is not registered, or made for another model.
  """
  catalog.import_modules(dataset.module)
  name = dataset.mixture_or_task_name
  kinds = _CONVERTERS[model.architecture]
  if dataset.feature_converter not in kinds:
    allowed = ' or '.join(repr(kind) for kind in kinds) or 'none that trains'
    raise UsageError(
      f'{name} is read with feature_converter={dataset.feature_converter!r}; '
      f'the architecture {model.architecture!r} needs {allowed}'
    )
  if dataset.decoder_start_id != model.decoder_start_id:
    raise UsageError(
      f'{name} is read with decoder_start_id={dataset.decoder_start_id}, the '
      f'model has {model.decoder_start_id}: make them equal'
    )
  dataset = dataclasses.replace(
    dataset, mixture_or_task_name=catalog.resolve(name, vocabulary)
  )
  catalog.task_provider(dataset)
  return dataset


def check_model_dir(
  model_dir: str, model: T5Config, vocabulary: VocabularyConfig
) -> None:
  """Refuses to continue another model's run."""
  if not model_dir:
    raise UsageError("model_dir is '': name the run's directory")
  run_directory.check_resumable(model_dir, model=model, vocabulary=vocabulary)
