"""Checks between configurations, made before a program writes anything; all raise `UsageError`."""

import dataclasses
import glob
import logging
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.tasks import catalog, mixing, step_by_step
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, refusing
from t5x_lite.errors import check_positive as check_positive
from t5x_lite.interop import checkpoint_source
from t5x_lite.models.config import T5Config
from t5x_lite.runs import checkpoints, run_directory

log = logging.getLogger(__name__)


def check_writable(directory: str) -> None:
  """Refuses a directory that cannot be written to, before hours of work."""
  if not directory:
    raise UsageError("the output directory is '': name one")
  if '://' in directory:
    return
  place = os.path.abspath(directory)
  if os.path.exists(place) and not os.path.isdir(place):
    raise UsageError(f'{directory} is a file: name a directory')
  while not os.path.exists(place):
    place = os.path.dirname(place)
  if not os.path.isdir(place):
    raise UsageError(f'{directory}: {place} is no directory')
  with refusing(f'cannot write into {directory}', OSError), tempfile.TemporaryFile(dir=place):
    pass


def resolve_model(
  model: T5Config | None,
  vocabulary: VocabularyConfig | None,
  changes: Mapping[str, Any],
  *,
  model_dir: str,
  restore_path: str,
) -> tuple[T5Config, VocabularyConfig]:
  """Returns the model, changed, and vocabulary; None takes model_dir's, else restore_path's."""
  if model is None or vocabulary is None:
    has_begun = model_dir and checkpoints.has_checkpoint(model_dir)
    path = model_dir if has_begun else restore_path
    if not path:
      what = f'train.{"model" if model is None else "vocabulary"} is not set'
      fix = 'give a file of configs/models, or CheckpointConfig.restore_path'
      raise UsageError(f'{what}, and there is no checkpoint to take it from: {fix}')
    opened = checkpoint_source.open_source(path)
    model = model or opened.config
    vocabulary = vocabulary or opened.vocabulary
    if vocabulary is None:
      raise UsageError(f'{path} does not say what its vocabulary is: set train.vocabulary')
  return model.replace(**changes), vocabulary


def resolve_dataset(
  dataset: DatasetConfig, model: T5Config, vocabulary: VocabularyConfig
) -> DatasetConfig:
  """Returns the config under the task's full name; refuses one unknown, or of another model."""
  catalog.import_modules(dataset.module)
  name = dataset.mixture_or_task_name
  dataset.check_architecture(model.architecture)
  if dataset.decoder_start_id != model.decoder_start_id:
    read = f'{name} is read with decoder_start_id={dataset.decoder_start_id}'
    raise UsageError(f'{read}, the model has {model.decoder_start_id}: make them equal')
  if model.prompt_length is not None and dataset.has_segment_ids:
    raise UsageError(f'{name} is packed, but a model with a prompt needs DatasetConfig.pack=False')
  dataset = dataclasses.replace(dataset, mixture_or_task_name=catalog.resolve(name, vocabulary))
  catalog.task_provider(dataset)
  return dataset


def task_names(dataset: DatasetConfig, vocabulary: VocabularyConfig) -> tuple[str, ...]:
  """Returns the tasks of a mixture whose losses are logged, in the order of their numbers."""
  if not dataset.per_task_loss:
    return ()
  tasks = getattr(catalog.task_provider(dataset), 'tasks', None)
  if tasks is None:
    name = dataset.mixture_or_task_name
    raise UsageError(f'DatasetConfig.per_task_loss is for mixtures, and {name} is a task')
  return tuple(catalog.short_name(task.name, vocabulary) for task in tasks)


def log_rates(dataset: DatasetConfig) -> None:
  """Says how often each task of a mixture is drawn."""
  table = mixing.table(catalog.task_provider(dataset), dataset.split)
  if table and dataset.num_epochs is not None:
    log.info('%s is read whole: its rates do not count', dataset.mixture_or_task_name)
  elif table:
    log.info('examples of %s:\n%s', dataset.mixture_or_task_name, table)


def warn_of_cuts(dataset: DatasetConfig, vocabulary: VocabularyConfig) -> dict[str, float]:
  """Says how many examples the lengths cut; returns it as metrics."""
  metrics = {}
  for task, (tokens, lost) in step_by_step.truncated(dataset).items():
    if lost.any():
      name, percent = catalog.short_name(task, vocabulary), 100.0 * lost.sum() / tokens.sum()
      log.warning(
        f'{name}: {np.count_nonzero(lost)} of the first {len(lost)} examples are longer than '
        f'{dataset.lengths} and are cut; they lose {percent:.1f}% of all tokens'
      )
      metrics[f'data/{name}/cut_examples_percent'] = 100.0 * float(np.mean(lost > 0))
      metrics[f'data/{name}/cut_tokens_percent'] = float(percent)
  return metrics


def check_model_dir(model_dir: str, model: T5Config, vocabulary: VocabularyConfig) -> None:
  """Refuses to continue another model's run."""
  if not model_dir:
    raise UsageError("model_dir is '': name the run's directory")
  # Orbax 0.12 looks for the parts of a checkpoint with a glob of the whole path, finds none in such
  # a folder, and commits a checkpoint that holds no arrays.
  if glob.has_magic(os.path.abspath(model_dir)):
    raise UsageError(f'{model_dir}: a run cannot be below a folder with *, ? or [ in its name')
  run_directory.check_resumable(model_dir, model=model, vocabulary=vocabulary)
  checkpoints.check_some_are_whole(model_dir)
