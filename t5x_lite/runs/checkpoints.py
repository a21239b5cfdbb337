"""Checkpoints: saving, keeping, finding and restoring the state of a run.

One directory per step, committed by one rename, so that a process killed at any moment leaves
either a whole checkpoint or a temporary directory that the next start removes:

  MODEL_DIR/checkpoints/STEP/state    {step, params, opt_state}, nested dicts, Orbax's OCDBT format
  MODEL_DIR/checkpoints/STEP/data     the input iterator, one file a process
  MODEL_DIR/checkpoints/STEP/meta     JSON: seed, process count, format version, arrays' checksums
  MODEL_DIR/checkpoints/STEP.damaged  what is not as it was written
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath

from t5x_lite.errors import DamagedError, UsageError, check_fields
from t5x_lite.parallel import checksums, distributed, pytrees
from t5x_lite.runs import files

log = logging.getLogger(__name__)

CHECKPOINTS = 'checkpoints'
DAMAGED = '.damaged'
FORMAT_VERSION = 2
_policies = ocp.checkpoint_managers


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save, what to keep, and where a new run starts from.

  Attributes:
    period: steps between checkpoints; the last step is always saved.
    keep: how many of the newest to keep; 0 keeps every one.
    keep_best: how many of the best by `best_metric` to keep besides those.
    best_metric: a metric of metrics.jsonl, such as 'eval/cmudict/loss', at the checkpoint's step.
    best_mode: 'min' or 'max'.
    restore_path: where a run that has no checkpoint of its own starts from: another run's directory
      or one STEP directory of it, or a checkpoint of T5X or transformers.
    restore_optimizer: take step and optimizer state from restore_path as well (to continue that run
      elsewhere) instead of only the parameters (to fine-tune).
    assignment_map: (pattern, replacement) pairs that map the parameters' names to those at
      restore_path; see interop/assignment.py.
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
    pairs = tuple(tuple(pair) for pair in self.assignment_map)
    object.__setattr__(self, 'assignment_map', pairs)
    are_pairs = all(len(pair) == 2 for pair in pairs)
    plain, has_metric = self.strict and not pairs, self.best_metric or not self.keep_best
    check_fields(
      self,
      assignment_map=(are_pairs, "pairs (pattern, replacement), such as ('decoder.*', None)"),
      restore_optimizer=(plain or not self.restore_optimizer, 'without assignment_map, and strict'),
      period=(self.period >= 1, 'at least 1 step'),
      keep=(self.keep >= 0, 'a number of checkpoints, or 0 for all'),
      keep_best=(self.keep_best >= 0, 'a number of checkpoints'),
      best_mode=(self.best_mode in ('min', 'max'), 'min or max'),
      best_metric=(has_metric, "a name as in metrics.jsonl, 'eval/cmudict/loss', for keep_best"),
    )


class SavableIterator(Protocol):
  """What a checkpoint needs of an input iterator."""

  def save(self, directory: str) -> None:
    """Writes the position of this process's iterator, before returning."""

  def restore(self, directory: str) -> None:
    """Continues from the position that `save` wrote."""


class DataHandler(ocp.CheckpointHandler):
  """Lets the iterator write before the step commits, and before it moves on: not async."""

  def save(self, directory: epath.Path, args: DataArgs) -> None:
    """Writes the position into the item's directory."""
    files.retried(directory, args.iterator.save, os.fspath(directory))

  def restore(self, directory: epath.Path, args: DataArgs) -> None:
    """Goes to the position."""
    files.retried(directory, args.iterator.restore, os.fspath(directory))


@ocp.args.register_with_handler(DataHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DataArgs(ocp.args.CheckpointArgs):
  """What is saved, or moved."""

  iterator: SavableIterator


def steps_in(directory: epath.Path) -> list[int]:
  """Returns the committed steps in a `checkpoints` directory, ascending."""
  if not directory.is_dir():
    return []
  found = (path for path in directory.iterdir() if path.name.isdecimal())
  return sorted(int(path.name) for path in found if (path / 'state').is_dir())


def make_meta(step: int, sums: Mapping[str, int], **more: Any) -> dict[str, Any]:
  """Returns what a checkpoint says of itself, with checksums."""
  meta = {'format_version': FORMAT_VERSION, 'step': step, 'process_count': jax.process_count()}
  return checksums.signed({**meta, 'checksums': dict(sums), **more})


def read_meta(root: epath.Path) -> dict[str, Any]:
  """Returns the meta item of a step; DamagedError if it was changed."""
  path = root / 'meta' / 'metadata'
  return files.retried(path, checksums.read_signed, path)


def has_checkpoint(model_dir: str) -> bool:
  """Whether a run has a checkpoint that it can continue from."""
  return bool(steps_in(epath.Path(model_dir) / CHECKPOINTS))


def check_some_are_whole(model_dir: str) -> None:
  """Raises UsageError where all there was is damaged: no silent new start."""
  root = epath.Path(model_dir) / CHECKPOINTS
  damaged = root.is_dir() and any(path.name.endswith(DAMAGED) for path in root.iterdir())
  if damaged and not has_checkpoint(model_dir):
    fix = 'use another model_dir, or move them away to begin anew'
    raise UsageError(f'{root} holds damaged checkpoints alone (STEP{DAMAGED}): {fix}')


def find_checkpoint(path: str) -> tuple[str, int]:
  """Returns the `checkpoints` directory and step that a path means; UsageError if there is none.

  That is a run directory or its `checkpoints`, for the newest step, or one step's directory.
  """
  root = epath.Path(path)
  if not root.exists():
    raise UsageError(f'no such checkpoint or run directory: {path}')
  if root.name.isdecimal() and (root / 'state').is_dir():
    return os.fspath(root.parent), int(root.name)
  for directory in (root / CHECKPOINTS, root):
    if steps := steps_in(directory):
      return os.fspath(directory), steps[-1]
  fix = f'give a run directory (with {CHECKPOINTS}/STEP inside) or one STEP directory'
  raise UsageError(f'{path} holds no checkpoint: {fix}')


def load_state(path: str, abstract_state: Any) -> Any:
  """Restores step, parameters and optimizer state of another run, or a dict of some of them.

  Each array goes straight into the sharding that its ShapeDtypeStruct has; any mesh may have
  written it, and floats are cast to the wanted dtype. UsageError if the checkpoint is missing or
  another model's, DamagedError if its metadata lost an array.
  """
  directory, step = find_checkpoint(path)
  root = epath.Path(directory).absolute() / str(step)
  item, plain = root / 'state', pytrees.to_plain(abstract_state)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    saved = checkpointer.metadata(item).item_metadata.tree
    # Of the optimizer's state too, where the wanted one is empty.
    wanted = pytrees.leaves(abstract_state, is_leaf=lambda x: x is not abstract_state)
    part = {name: saved[name] for (name,), _ in wanted if name in saved}
    _check_names(root, part, plain)
    how = ocp.checkpoint_utils.construct_restore_args(plain)
    arguments = ocp.args.PyTreeRestore(plain, restore_args=how, partial_restore=True)
    restored = checkpointer.restore(item, args=arguments)
  return pytrees.from_plain(restored, abstract_state)


class Checkpointer(contextlib.AbstractContextManager):
  """The checkpoints of one run: asynchronous saves and exact restores."""

  def __init__(self, model_dir: str, config: CheckpointConfig):
    """Opens MODEL_DIR/checkpoints; creates it and removes leftovers there."""
    self.config = config
    self.directory = epath.Path(model_dir).absolute() / CHECKPOINTS
    self.damaged: list[int] = []  # steps that were set aside
    handlers: dict[str, Any] = {'state': ocp.StandardCheckpointHandler(), 'data': DataHandler()}
    handlers['meta'] = ocp.JsonCheckpointHandler()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_preservation_policy(config),
      # Only makes Orbax write the metrics; the policy above decides.
      best_fn=(lambda _: 0.0) if config.keep_best else None,
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)

  @property
  def latest_step(self) -> int | None:
    """The newest committed step, or None."""
    return max(steps_in(self.directory), default=None)

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
    """Starts saving; returns once the state and iterator may move on, False if `step` was saved.

    The state is copied off the devices before; the iterator stands before the batch of `step`. This
    step's metrics are for `keep_best`, and `meta` are small facts that the restart wants to know.
    """
    if step in self._manager.all_steps():
      self._amend(step, {'metrics/metrics': self._best(metrics), 'meta/metadata': meta})
      return False
    plain = pytrees.to_plain(state)
    facts = make_meta(step, checksums.of_tree(plain), **(meta or {}))
    items: dict[str, Any] = {'state': ocp.args.StandardSave(plain)}
    items['meta'] = ocp.args.JsonSave(facts)
    if iterator is not None:
      items['data'] = DataArgs(iterator)
    with self._told_in_one_line(step):
      files.check_space(self.directory, plain)
      arguments = ocp.args.Composite(**items)
      return self._manager.save(step, args=arguments, metrics=self._best(metrics), force=True)

  def _amend(self, step: int, found: Mapping[str, Any]) -> None:
    """Adds to a checkpoint what was measured after it: a stop had been in a hurry."""
    self.wait()
    paths = {self.directory / str(step) / name: new for name, new in found.items() if new}
    with self._told_in_one_line(step):
      for path, new in paths.items() if distributed.is_primary() else ():
        old = json.loads(files.retried(path, path.read_text)) if path.exists() else None
        if old is not None and old != (entry := {**old, **new}):
          files.write_json(path, checksums.signed(entry) if path.name == 'metadata' else entry)
    distributed.barrier(f'amended {step}')
    self._manager.reload()

  @contextlib.contextmanager
  def _told_in_one_line(self, step: int | None = None) -> Iterator[None]:
    """Turns a failed write, such as on a full disk, into a SaveError."""
    try:
      yield
    except (distributed.LostProcessError, UsageError):
      raise
    except Exception as error:
      latest = self.latest_step
      last = 'there is none' if latest is None else f'it is of step {latest}'
      what = 'a checkpoint' if step is None else f'the checkpoint of step {step}'
      why = f'{what} could not be written into {self.directory}: {files.cause(error)}'
      fix = f'the last good one stays ({last}): make room and start again'
      raise files.SaveError(f'{why}; {fix}') from error

  def _best(self, metrics: Mapping[str, float] | None) -> Any:
    """The metric that ranks a checkpoint, if it was measured at this step."""
    if not self.config.keep_best:
      return None
    name = self.config.best_metric
    if metrics and name in metrics:
      return {name: float(metrics[name])}
    if metrics:
      log.warning('best_metric %r was not measured; there are %s', name, ', '.join(sorted(metrics)))
    return {}

  def restore(
    self,
    abstract_state: Any,
    iterator: SavableIterator | None = None,
    *,
    verify: Callable[[str], None] | None = None,
  ) -> tuple[Any, dict[str, Any]]:
    """Returns the newest whole checkpoint's state and `meta`; the iterator moves to its place.

    A damaged one is set aside as STEP.damaged, and the one before is used. The abstract state is of
    ShapeDtypeStructs with shardings, on any mesh; the first process calls `verify` with a step's
    directory, which raises DamagedError. UsageError if the checkpoint is another model's or
    optimizer's, or none is whole.
    """
    while (step := self.latest_step) is not None:
      try:
        return self._restore(step, abstract_state, iterator, verify)
      except DamagedError as error:
        self._set_aside(step, error)
    fix = 'the damaged ones are there as STEP.damaged: use another model_dir to begin anew'
    raise UsageError(f'no checkpoint in {self.directory} is whole; {fix}')

  def _set_aside(self, step: int, error: DamagedError) -> None:
    """Gives a damaged checkpoint a name that says so."""
    log.error('the checkpoint of step %d is damaged and set aside: %s', step, error)
    distributed.barrier(f'damaged {step}')
    if distributed.is_primary():
      target = self.directory / f'{step}{DAMAGED}'
      if target.exists():
        target.rmtree()
      (self.directory / str(step)).rename(target)
    distributed.barrier(f'set aside {step}')
    self.damaged.append(step)
    self._manager.reload()

  def _restore(
    self,
    step: int,
    abstract_state: Any,
    iterator: SavableIterator | None,
    verify: Callable[[str], None] | None,
  ) -> tuple[Any, dict[str, Any]]:
    root = self.directory / str(step)
    if verify is not None:
      distributed.alike(root, lambda: distributed.is_primary() and verify(os.fspath(root)))
    try:
      state, meta = load_state(os.fspath(root), abstract_state), read_meta(root)
    except (UsageError, distributed.LostProcessError, MemoryError, jax.errors.JaxRuntimeError):
      raise  # the device's or a peer's fault: the checkpoint is as it was
    except Exception as error:
      # The arrays were as they were written; it is what Orbax keeps beside them, for all processes.
      raise DamagedError(f'{root}: {files.cause(error)}') from error
    data = root / 'data'
    if iterator is not None and data.is_dir():
      distributed.alike(data, lambda: files.retried(data, iterator.restore, os.fspath(data)))
    elif iterator is not None:
      log.warning('%s is not there: the data is read from its beginning', data)
    return state, meta

  def wait(self) -> None:
    """Blocks until every started save is committed."""
    with self._told_in_one_line():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Finishes the saves under way and lets go of the directory."""
    with self._told_in_one_line():
      self._manager.close()

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    """Closes, but does not wait for a process that is gone."""
    if kind is None or not issubclass(kind, distributed.LostProcessError):
      self.close()


def _check_names(root: epath.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Raises UsageError, one clear line, unless names and shapes agree.

  DamagedError where a checkpoint of this very model has metadata that lost an array.
  """
  has, needs = pytrees.flatten_names(saved), pytrees.flatten_names(wanted)
  names, asked = ({name.replace('/', '.') for name in flat} for flat in (has, needs))
  if asked == read_meta(root)['checksums'].keys() and names != asked:
    raise DamagedError(f'{root} has lost the metadata of its arrays')
  for name in (*needs, *has):
    if name not in has:
      problem = f'no {name}, which this model and optimizer needs'
    elif name not in needs:
      problem = f'{name}, which this model and optimizer does not'
    elif (found := tuple(has[name].shape)) != (shape := tuple(needs[name].shape)):
      problem = f'{name} of shape {found}, this model and optimizer needs {shape}'
    else:
      continue
    fix = 'use the model and optimizer that wrote it, or another model_dir to start a new run'
    raise UsageError(f'the checkpoint {root} has {problem}: {fix}')


def _preservation_policy(config: CheckpointConfig) -> Any:
  """Newest N or best N; `best_fn` with `max_to_keep` would delete the newest, and lose work."""
  if not config.keep:
    return _policies.LatestN(None)  # all of them
  newest = _policies.LatestN(config.keep)
  if not config.keep_best:
    return newest

  def quality(metrics: Mapping[str, float]) -> float:
    value = metrics.get(config.best_metric, math.nan) * (1 if config.best_mode == 'max' else -1)
    return -math.inf if math.isnan(value) else value

  best = {'n': config.keep_best, 'keep_checkpoints_without_metrics': False}
  best_ones = _policies.BestN(get_metric_fn=quality, **best)
  return _policies.AnyPreservationPolicy([newest, best_ones])
