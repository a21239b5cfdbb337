"""A trained model of any format, ready to be read onto devices.

What `infer` and `eval` take, and what `train` begins from and may learn the architecture from.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import Vocabulary, VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import adapters, assignment, checkpoint_source, tensors
from t5x_lite.models.config import T5Config
from t5x_lite.runs import checkpoints, run_directory
from t5x_lite.training import train_state
from t5x_lite.training.train_state import StateSpec, TrainState

log = logging.getLogger(__name__)

# Returns the state that a run begins with, each array made where it will live.
Make = Callable[[optax.GradientTransformation, StateSpec, jax.Array], TrainState]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel(checkpoint_source.Source):
  """A checkpoint that has been checked, by the path that the user gave; only names were read."""

  vocabulary: VocabularyConfig  # its own
  directory: str  # the folder that was opened; of a run, the run's

  def load_params(self, specs: Any) -> Any:
    """Reads them onto the devices, as specs say; see `model_sharding.inference_params`."""
    return tensors.place(self.tensors, self.config, specs)


def open_model(path: str, *, adapter: str = '', **changes: Any) -> TrainedModel:
  """Opens a run of ours, a folder of transformers or T5X, or a hub id: `open_source`'s path.

  With an adapter, a folder for `adapters.put_on`. Changes are fields of T5Config, such as
  dtype='bfloat16'; '' changes none. Raises UsageError if nothing there can be read, something is
  missing in it, or it does not say what its vocabulary is.
  """
  source = checkpoint_source.open_source(path)
  if adapter:
    source = adapters.put_on(source, adapter)
  if source.vocabulary is None:
    first = 'convert it first with `t5x-lite convert --vocabulary=...`'
    raise UsageError(f'{path} does not say what its vocabulary is: {first}')
  check_vocabulary(source.config, source.vocabulary)
  config = source.config.replace(**{k: v for k, v in changes.items() if v != ''})
  found, _ = assignment.assign(source, config)
  known = vars(source) | {'path': path, 'config': config, 'tensors': found}
  known['checkpoint'] = source.checkpoint or source.path
  return TrainedModel(**known, directory=source.path)


def check_vocabulary(model: T5Config, vocabulary: VocabularyConfig, fix: str = '') -> Vocabulary:
  """Returns a vocabulary, unless it has ids that the embedding has no row for."""
  found = vocabularies.make_vocabulary(vocabulary)
  size, rows = found.vocab_size, model.vocab_size
  if size > rows:
    counts = f'the vocabulary has {size} ids, the embedding only T5Config.vocab_size={rows} rows'
    raise UsageError(f'{counts}: {fix or f"raise vocab_size to {-(-size // 128) * 128}"}')
  return found


def open_mean(paths: Sequence[str], last: int = 1, **options: Any) -> TrainedModel:
  """Opens the mean of several checkpoints, which is read like one; options are of open_model.

  Of run directories the `last` newest checkpoints count; STEP directories and other models count as
  they are. Raises UsageError if a run has fewer, or they are not of one architecture.
  """
  single = []
  for path in paths:
    steps = checkpoints.steps_in(epath.Path(path) / checkpoints.CHECKPOINTS)
    if steps and len(steps) < last:
      fix = f'train with CheckpointConfig.keep={last}'
      raise UsageError(f'{path} has {len(steps)} checkpoints, not {last}: {fix}')
    newest = [f'{path}/{checkpoints.CHECKPOINTS}/{step}' for step in steps[-last:]]
    single += newest if last > 1 and newest else [path]
  models = [open_model(path, **options) for path in single]
  check_alike(models)
  first = max(models, key=lambda model: model.step)
  if len(models) == 1:
    return first
  names = first.tensors
  found = {name: tensors.mean([model.tensors[name] for model in models]) for name in names}
  return dataclasses.replace(first, tensors=found)


def open_together(paths: str | Sequence[str], last: int = 1, **options: Any) -> list[TrainedModel]:
  """Opens a model to use, or those of an ensemble; each the mean of its last checkpoints."""
  names = [paths] if isinstance(paths, str) else paths
  # On a CPU layers one by one: no step of decoding copies one out of a stack (lab notes).
  options.setdefault('scan_layers', False if jax.default_backend() == 'cpu' else '')
  models = [open_mean([path], last, **options) for path in names]
  check_alike(models)
  return models


def load_together(models: Sequence[TrainedModel], specs: Any) -> Any:
  """Reads the parameters of an ensemble as a tuple, those of one model alone."""
  params = tuple(model.load_params(specs) for model in models)
  return params if len(params) > 1 else params[0]


def check_alike(models: Sequence[TrainedModel]) -> None:
  """Refuses to combine models of several architectures or vocabularies."""
  training = {'dropout_rate': 0.0, 'remat_policy': 'none'}  # makes no other model
  for other in models[1:]:
    if other.config.replace(**training) != models[0].config.replace(**training):
      raise UsageError(f'{other.path} has another architecture than {models[0].path}')
    if not run_directory.same_vocabulary(other.vocabulary, models[0].vocabulary):
      raise UsageError(f'{other.path} has another vocabulary than {models[0].path}')


def open_start(
  config: checkpoints.CheckpointConfig, model: T5Config, vocabulary: VocabularyConfig, *, seed: int
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
    params = tensors.place(found, model, spec.shapes.params)
    log.info('starts from the parameters of %s', path)
    return train_state.start_from(params, tx, spec)

  return load
