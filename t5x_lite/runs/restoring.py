"""Reads checkpoints of ours without a run, which has its Checkpointer: arrays, params, a state."""

import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from t5x_lite.parallel import pytrees
from t5x_lite.runs import checkpoints


def _state_directory(path: str) -> epath.Path:
  directory, step = checkpoints.find_checkpoint(path)
  return epath.Path(directory).absolute() / str(step) / 'state'


def _restore_items(source: str, wanted: Any, what: str) -> Any:
  """Restores the part of {step, params, opt_state} that `wanted` names."""
  item = _state_directory(source)
  plain = pytrees.to_plain(wanted)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    saved = checkpointer.metadata(item).item_metadata.tree
    part = {name: saved[name] for name in plain if name in saved}
    checkpoints.explain_mismatch(os.fspath(item.parent), part, plain, what)
    how = ocp.checkpoint_utils.construct_restore_args(plain)
    arguments = ocp.args.PyTreeRestore(plain, restore_args=how, partial_restore=True)
    restored = checkpointer.restore(item, args=arguments)
  return pytrees.from_plain(restored, wanted)


def load_arrays(path: str) -> dict[str, Any]:
  """Returns a checkpoint's state as numpy arrays by name, all in memory; needs no model."""
  item = _state_directory(path)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(item).item_metadata.tree
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    plain = checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=restore_args))
  return pytrees.flatten_names(plain)


def load_params(path: str, abstract_params: Any) -> Any:
  """Restores only the parameters, each straight into the sharding that its ShapeDtypeStruct has.

  Any mesh may have written them; floats are cast to the wanted dtype. UsageError if the checkpoint
  is missing or another model's.
  """
  return _restore_items(path, {'params': abstract_params}, 'model')['params']


def load_state(path: str, abstract_state: Any) -> Any:
  """Restores step, parameters and optimizer state of another run."""
  return _restore_items(path, abstract_state, 'model and optimizer')
