"""Checkpoints: saving, keeping, finding and restoring the state of a run.

One directory per step, committed by one rename, so that a process killed at
any moment leaves either a whole checkpoint or a temporary directory that the
next start removes. Layout:

  MODEL_DIR/checkpoints/STEP/state   {step, params, opt_state}, plain nested
                                     dicts of arrays in Orbax's OCDBT format
  MODEL_DIR/checkpoints/STEP/data    the input iterator, one file a process
  MODEL_DIR/checkpoints/STEP/meta    JSON: seed, process count, format version

Orbax is used through its v0 CheckpointManager and nowhere else than here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.parallel import pytrees
from t5x_lite.parallel.distributed import LostProcessError

log = logging.getLogger(__name__)

CHECKPOINTS = 'checkpoints'
FORMAT_VERSION = 1
_MODES = ('min', 'max')

_policies = ocp.checkpoint_managers


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save, what to keep, and where a new run starts from.

  Attributes:
    period: steps between checkpoints; the last step is always saved.
    keep: how many of the newest to keep; 0 keeps every one.
    keep_best: how many of the best by `best_metric` to keep besides those.
    best_metric: a metric's name as in metrics.jsonl, for example
      'eval/cmudict/loss'. Its value counts for a checkpoint of the same step.
    best_mode: 'min' or 'max'.
    restore_path: where a run that has no checkpoint of its own starts from:
      another run's directory or one STEP directory of it, or a checkpoint of
      T5X or transformers.
    restore_optimizer: take step and optimizer state from restore_path as well
      (to continue that run elsewhere) instead of only the parameters (to
      fine-tune).
    assignment_map: (pattern, replacement) pairs that map the parameters' names
      to those at restore_path; see interop/assignment.py.
    strict: refuse a restore_path with missing or left-over parameters.
  """

  period: int = 1000
  keep: int = 3
  keep_best: int = 0
  best_metric: str = ''
  best_mode: str = 'min'
  restore_path: str = ''
  restore_optimizer: bool = False
  assignment_map: Sequence[tuple[str, str | None]] = ()
  strict: bool = True

  def __post_init__(self):
    """Validates once, so that nothing fails hours into a run."""
    pairs = tuple(tuple(pair) for pair in self.assignment_map)
    object.__setattr__(self, 'assignment_map', pairs)
    if any(len(pair) != 2 for pair in pairs):
      raise UsageError(
        f'CheckpointConfig.assignment_map={self.assignment_map!r} must be '
        "pairs (pattern, replacement), such as ('decoder.*', None)"
      )
    if self.restore_optimizer and (pairs or not self.strict):
      raise UsageError(
        'CheckpointConfig.restore_optimizer takes a state as it is: leave out '
        'assignment_map and strict'
      )
    if self.period < 1:
      raise UsageError(
        f'CheckpointConfig.period={self.period} must be at least 1 step'
      )
    if self.keep < 0 or self.keep_best < 0:
      raise UsageError(
        f'CheckpointConfig.keep={self.keep} and keep_best={self.keep_best} '
        'count checkpoints: use 0 or more'
      )
    if self.best_mode not in _MODES:
      raise UsageError(
        f'CheckpointConfig.best_mode={self.best_mode!r} is not one of '
        f'{", ".join(_MODES)}'
      )
    if self.keep_best and not self.best_metric:
      raise UsageError(
        f'CheckpointConfig.keep_best={self.keep_best} needs best_metric, a '
        "name as in metrics.jsonl such as 'eval/cmudict/loss'"
      )


class SavableIterator(Protocol):
  """What a checkpoint needs of an input iterator."""

  def save(self, directory: str) -> None:
    """Writes the position of this process's iterator, before returning."""

  def restore(self, directory: str) -> None:
    """Continues from the position that `save` wrote."""


# ---- The input iterator as an Orbax item ------------------------------------


class _DataHandler(ocp.CheckpointHandler):
  """Lets the iterator write into the step's directory before it commits.

  Deliberately synchronous: the iterator moves on as soon as `save` returns.
  """

  def save(self, directory: epath.Path, args: _DataSave) -> None:
    args.iterator.save(os.fspath(directory))

  def restore(self, directory: epath.Path, args: _DataRestore) -> None:
    args.iterator.restore(os.fspath(directory))


@ocp.args.register_with_handler(_DataHandler, for_save=True)
@dataclasses.dataclass
class _DataSave(ocp.args.CheckpointArgs):
  iterator: SavableIterator


@ocp.args.register_with_handler(_DataHandler, for_restore=True)
@dataclasses.dataclass
class _DataRestore(ocp.args.CheckpointArgs):
  iterator: SavableIterator


# ---- Comparing with what is wanted ----


def _explain_mismatch(
  where: str, saved: Mapping[str, Any], wanted: Mapping[str, Any], what: str
) -> None:
  """Raises one clear line unless the trees agree in names and shapes."""
  saved_flat = pytrees.flatten_names(saved)
  wanted_flat = pytrees.flatten_names(wanted)
  fix = f'use the {what} that wrote it, or another model_dir to start a new run'
  for name, leaf in wanted_flat.items():
    if name not in saved_flat:
      raise UsageError(
        f'the checkpoint {where} has no {name}, which this {what} needs: {fix}'
      )
    if tuple(saved_flat[name].shape) != tuple(leaf.shape):
      raise UsageError(
        f'the checkpoint {where} has {name} of shape '
        f'{tuple(saved_flat[name].shape)}, this {what} needs '
        f'{tuple(leaf.shape)}: {fix}'
      )
  for name in saved_flat:
    if name not in wanted_flat:
      raise UsageError(
        f'the checkpoint {where} has {name}, which this {what} does not: {fix}'
      )


# ---- Finding ----------------------------------------------------------------


def _steps_in(directory: epath.Path) -> list[int]:
  """The committed steps in a `checkpoints` directory, ascending."""
  if not directory.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if path.name.isdigit() and (path / 'state').is_dir()
  )


def has_checkpoint(model_dir: str) -> bool:
  """Whether a run has a checkpoint that it can continue from."""
  return bool(_steps_in(epath.Path(model_dir) / CHECKPOINTS))


def find_checkpoint(path: str) -> tuple[str, int]:
  """Returns the `checkpoints` directory and step that a user's path means.

  Args:
    path: a run directory or its `checkpoints` (the newest step is meant), or
      one step's directory.

  Raises:
    UsageError: if there is no checkpoint there.
  """
  root = epath.Path(path)
  if not root.exists():
    raise UsageError(f'no such checkpoint or run directory: {path}')
  if root.name.isdigit() and (root / 'state').is_dir():
    return os.fspath(root.parent), int(root.name)
  for directory in (root / CHECKPOINTS, root):
    steps = _steps_in(directory)
    if steps:
      return os.fspath(directory), steps[-1]
  raise UsageError(
    f'{path} holds no checkpoint: give a run directory (with '
    f'{CHECKPOINTS}/STEP inside) or one STEP directory'
  )


# ---- Restoring without a manager --------------------------------------------


def _restore_items(directory: str, step: int, wanted: Any, what: str) -> Any:
  """Restores the part of {step, params, opt_state} that `wanted` names."""
  path = epath.Path(directory).absolute() / str(step)
  plain = pytrees.to_plain(wanted)
  # Items that stay unread are named too: Orbax warns of those it cannot read.
  handler = ocp.CompositeCheckpointHandler(
    state=ocp.PyTreeCheckpointHandler(),
    data=_DataHandler(),
    meta=ocp.JsonCheckpointHandler(),
    metrics=ocp.JsonCheckpointHandler(),
  )
  with ocp.Checkpointer(handler) as checkpointer:
    saved = checkpointer.metadata(path).item_metadata['state'].tree
    part = {name: saved[name] for name in plain if name in saved}
    _explain_mismatch(os.fspath(path), part, plain, what)
    arguments = ocp.args.PyTreeRestore(
      plain,
      restore_args=ocp.checkpoint_utils.construct_restore_args(plain),
      partial_restore=True,
    )
    restored = checkpointer.restore(
      path, args=ocp.args.Composite(state=arguments)
    )
  return pytrees.from_plain(restored['state'], wanted)


def load_arrays(path: str) -> dict[str, Any]:
  """Returns every array of a checkpoint's state by name, as numpy arrays.

  For inspection and conversion: no model is needed, all of it must fit into
  this process's memory.
  """
  directory, step = find_checkpoint(path)
  item = epath.Path(directory).absolute() / str(step) / 'state'
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(item).item_metadata.tree
    restore_args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    plain = checkpointer.restore(
      item, args=ocp.args.PyTreeRestore(restore_args=restore_args)
    )
  return pytrees.flatten_names(plain)


def load_params(path: str, abstract_params: Any) -> Any:
  """Restores only the parameters, straight into their shardings.

  Args:
    path: see `find_checkpoint`.
    abstract_params: ShapeDtypeStructs of the wanted tree; with a sharding each
      lands where it says, whatever mesh wrote the checkpoint. A float
      parameter is cast to the wanted dtype.

  Raises:
    UsageError: if the checkpoint is missing or another model's.
  """
  directory, step = find_checkpoint(path)
  wanted = {'params': abstract_params}
  return _restore_items(directory, step, wanted, 'model')['params']


def load_state(path: str, abstract_state: Any) -> Any:
  """Restores step, parameters and optimizer state of another run."""
  directory, step = find_checkpoint(path)
  return _restore_items(directory, step, abstract_state, 'model and optimizer')


# ---- A run's own checkpoints ------------------------------------------------


class Checkpointer:
  """The checkpoints of one run: asynchronous saves and exact restores."""

  def __init__(self, model_dir: str, config: CheckpointConfig):
    """Opens MODEL_DIR/checkpoints; creates it and removes leftovers there."""
    self.config = config
    self.directory = epath.Path(model_dir).absolute() / CHECKPOINTS
    self._manager = ocp.CheckpointManager(
      self.directory,
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'data': _DataHandler(),
        'meta': ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_preservation_policy(config),
        # Only makes Orbax write the metrics; the policy above decides.
        best_fn=(lambda _: 0.0) if config.keep_best else None,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
    )

  @property
  def latest_step(self) -> int | None:
    """The newest committed step, or None."""
    steps = _steps_in(self.directory)
    return steps[-1] if steps else None

  def all_steps(self) -> list[int]:
    """The kept steps, ascending."""
    return _steps_in(self.directory)

  def should_save(self, step: int) -> bool:
    """True if a checkpoint is due at this step."""
    return step > 0 and step % self.config.period == 0

  def save(
    self,
    step: int,
    state: Any,
    iterator: SavableIterator | None,
    *,
    metrics: Mapping[str, float] | None = None,
    meta: Mapping[str, Any] | None = None,
  ) -> bool:
    """Starts saving; returns once the state and iterator may move on.

    Args:
      step: a step that is already there is left alone.
      state: the TrainState; copied off the devices before this returns.
      iterator: the input iterator, standing before the batch of `step`.
      metrics: this step's metrics, for `keep_best`.
      meta: small facts that the restart wants to know.

    Returns:
      False if this step was already saved.
    """
    if step in self._manager.all_steps():
      return False
    items: dict[str, Any] = {
      'state': ocp.args.StandardSave(pytrees.to_plain(state)),
      'meta': ocp.args.JsonSave(
        {
          'format_version': FORMAT_VERSION,
          'step': step,
          'process_count': jax.process_count(),
          **(meta or {}),
        }
      ),
    }
    if iterator is not None:
      items['data'] = _DataSave(iterator)
    return self._manager.save(
      step,
      args=ocp.args.Composite(**items),
      metrics=self._best(metrics),
      force=True,
    )

  def _best(self, metrics: Mapping[str, float] | None) -> Any:
    """The metric that ranks a checkpoint, if it was measured at this step."""
    if not self.config.keep_best:
      return None
    name = self.config.best_metric
    if metrics and name not in metrics:
      log.warning(
        'best_metric %r was not measured; there are %s',
        name,
        ', '.join(sorted(metrics)),
      )
    value = (metrics or {}).get(name)
    return {} if value is None else {name: float(value)}

  def restore(
    self, abstract_state: Any, iterator: SavableIterator | None = None
  ) -> tuple[Any, dict[str, Any]]:
    """Restores the newest checkpoint and moves the iterator to its place.

    Args:
      abstract_state: ShapeDtypeStructs with shardings, on any mesh.
      iterator: the input iterator to continue, or None to leave data alone.

    Returns:
      The state and the checkpoint's `meta`, empty if it has none.

    Raises:
      UsageError: if the checkpoint is another model's or optimizer's.
    """
    step = self.latest_step
    assert step is not None, 'restore needs a checkpoint'
    wanted = pytrees.to_plain(abstract_state)
    where = os.fspath(self.directory / str(step))
    saved = self._manager.item_metadata(step)['state']
    _explain_mismatch(
      where,
      saved.tree if hasattr(saved, 'tree') else saved,
      wanted,
      'model and optimizer',
    )
    # What was converted from another format has neither of the last two.
    items: dict[str, Any] = {'state': ocp.args.StandardRestore(wanted)}
    if (self.directory / str(step) / 'meta').is_dir():
      items['meta'] = ocp.args.JsonRestore()
    if iterator is not None:
      if (self.directory / str(step) / 'data').is_dir():
        items['data'] = _DataRestore(iterator)
      else:
        log.warning(
          '%s has no position in the data: it is read from its beginning', where
        )
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    state = pytrees.from_plain(restored['state'], abstract_state)
    return state, restored.get('meta') or {}

  def wait(self) -> None:
    """Blocks until every started save is committed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Finishes the saves under way and lets go of the directory."""
    self._manager.close()

  def __enter__(self) -> Self:
    """Returns the checkpointer itself."""
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    """Closes, but does not wait for a process that is gone."""
    if kind is None or not issubclass(kind, LostProcessError):
      self.close()


def _preservation_policy(config: CheckpointConfig) -> Any:
  """Newest N or best N.

  Orbax's own `best_fn` with `max_to_keep` deletes the newest checkpoint when it
  is not among the best, and a restart then loses work.
  """
  if not config.keep:
    return _policies.LatestN(None)  # all of them
  policies: list[Any] = [_policies.LatestN(config.keep)]
  if config.keep_best:
    sign = 1.0 if config.best_mode == 'max' else -1.0

    def quality(metrics: Mapping[str, float]) -> float:
      value = sign * metrics.get(config.best_metric, math.nan)
      return -math.inf if math.isnan(value) else value

    policies.append(
      _policies.BestN(
        get_metric_fn=quality,
        n=config.keep_best,
        keep_checkpoints_without_metrics=False,
      )
    )
  return _policies.AnyPreservationPolicy(policies)
