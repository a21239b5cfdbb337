"""Reads checkpoints of ours without a run, which has its Checkpointer: arrays, or a state."""

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


def load_arrays(path: str) -> dict[str, Any]:
  """Returns a checkpoint's state as numpy arrays by name, all in memory; needs no model."""
  item = _state_directory(path)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(item).item_metadata.tree
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    plain = checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=restore_args))
  return pytrees.flatten_names(plain)


def load_state(path: str, abstract_state: Any) -> Any:
  """Restores step, parameters and optimizer state of another run, or a dict of some of them.

  Each array goes straight into the sharding that its ShapeDtypeStruct has; any mesh may have
  written it, and floats are cast to the wanted dtype. UsageError if the checkpoint is missing or
  another model's.
  """
  item, plain = _state_directory(path), pytrees.to_plain(abstract_state)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    saved = checkpointer.metadata(item).item_metadata.tree
    part = {name: saved[name] for name in plain if name in saved}
    checkpoints.explain_mismatch(os.fspath(item.parent), part, plain, 'model and optimizer')
    how = ocp.checkpoint_utils.construct_restore_args(plain)
    arguments = ocp.args.PyTreeRestore(plain, restore_args=how, partial_restore=True)
    restored = checkpointer.restore(item, args=arguments)
  return pytrees.from_plain(restored, abstract_state)
