"""The input iterator's position as an item of an Orbax checkpoint."""

import dataclasses
import os
from typing import Protocol

import orbax.checkpoint as ocp
from etils import epath

from t5x_lite.runs.files import retried


class SavableIterator(Protocol):
  """What a checkpoint needs of an input iterator."""

  def save(self, directory: str) -> None:
    """Writes the position of this process's iterator, before returning."""

  def restore(self, directory: str) -> None:
    """Continues from the position that `save` wrote."""


class DataHandler(ocp.CheckpointHandler):
  """Lets the iterator write into the step's directory before it commits.

  Deliberately synchronous: the iterator moves on as soon as `save` returns.
  """

  def save(self, directory: epath.Path, args: 'DataSave') -> None:
    """Writes the position into the item's directory."""
    retried(directory, args.iterator.save, os.fspath(directory))

  def restore(self, directory: epath.Path, args: 'DataRestore') -> None:
    """Goes to the position."""
    retried(directory, args.iterator.restore, os.fspath(directory))


@ocp.args.register_with_handler(DataHandler, for_save=True)
@dataclasses.dataclass
class DataSave(ocp.args.CheckpointArgs):
  """What is saved."""

  iterator: SavableIterator


@ocp.args.register_with_handler(DataHandler, for_restore=True)
class DataRestore(DataSave):
  """What is moved."""
