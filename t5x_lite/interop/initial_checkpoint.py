"""Where a new run starts from: another checkpoint, of any format, or nothing.

A run that has a checkpoint of its own never comes here.
"""

import logging
from collections.abc import Callable

import jax
import optax

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import assignment, checkpoint_source, tensors
from t5x_lite.models.config import T5Config
from t5x_lite.runs import checkpoints, run_directory
from t5x_lite.runs.checkpoints import CheckpointConfig
from t5x_lite.training import train_state
from t5x_lite.training.train_state import StateSpec, TrainState

log = logging.getLogger(__name__)


# Returns the state that a run begins with, each array made where it will live.
Make = Callable[[optax.GradientTransformation, StateSpec, jax.Array], TrainState]


def open_start(
  config: CheckpointConfig, model: T5Config, vocabulary: VocabularyConfig, *, seed: int
) -> Make:
  """Checks that a new run can start from where its configuration says; UsageError if not.

  Config's restore_path is a run of ours, or a checkpoint of T5X or transformers, for a model of
  this architecture. The vocabulary must be the checkpoint's own, where that says what it is.
  Nothing has been read but names before what is returned is called.
  """
  path, with_optimizer = config.restore_path, config.restore_optimizer
  if not path:

    def draw(tx, spec, key):
      log.info('starts from scratch with seed %d', seed)
      return train_state.init_state(model, tx, spec, key)

    return draw
  opened = checkpoint_source.open_source(path)
  if with_optimizer and opened.format != 't5x_lite':
    kind = f'of the format {opened.format!r}'
    raise UsageError(f'{path} is {kind}; restore_optimizer=True needs a run of t5x_lite')
  theirs = None if opened.format == 't5x' else opened.vocabulary  # T5X's do not say what it is
  if theirs is not None and not run_directory.same_vocabulary(theirs, vocabulary):
    message = f'{path} has another vocabulary than VocabularyConfig names: ids mean other tokens'
    if config.strict:
      raise UsageError(f'{message}: use its own, or CheckpointConfig.strict=False')
    log.warning('%s', message)
  if config.strict:
    assignment.check_numerics(opened, model)
  found, report = assignment.assign(
    opened, model, assignment_map=config.assignment_map, strict=config.strict, seed=seed
  )
  log.info('%s: %s', path, report.summary())

  def load(tx, spec, key):
    if with_optimizer:
      log.info('starts from %s, optimizer included', path)
      return checkpoints.load_state(path, spec.shapes)
    params = tensors.place(found, model, spec.shardings.params)
    log.info('starts from the parameters of %s', path)
    return train_state.start_from(params, tx, spec)

  return load
