"""Placement: a mesh, and the rules by which arrays are cut over it."""

import contextlib
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from t5x_lite.parallel import logical_axes, partitioning, pytrees
from t5x_lite.parallel.logical_axes import LogicalAxisRules, spec
from t5x_lite.parallel.partitioning import BATCH_AXES, Devices, MeshConfig


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where arrays live. Two equal placements trace to the same program."""

  mesh: Mesh  # the devices
  rules: LogicalAxisRules  # from logical axes to mesh axes
  config: MeshConfig  # what both were made of, every size resolved

  def shardings(self, shapes: Any, axes: Any) -> Any:
    """Returns a NamedSharding for every leaf.

    Axes are shapes' tree with a tuple of logical names in place of each array. Rules for single
    parameters also cut what the optimizer keeps for them, whose paths end with the parameter's.
    """

    def sharding(path: Any, x: Any, names: Any) -> NamedSharding:
      name = pytrees.path_name(path)
      return NamedSharding(self.mesh, spec(names, x.shape, self.mesh.shape, self.rules, name))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)

  def specs(self, shapes: Any, axes: Any) -> Any:
    """Returns shapes' tree of ShapeDtypeStructs with their shardings."""
    return with_shardings(shapes, self.shardings(shapes, axes))

  def active(self) -> contextlib.AbstractContextManager[None]:
    """Makes the model's constraints effective for what is traced inside."""
    return logical_axes.axis_rules(self.mesh, self.rules)

  @property
  def batch_ways(self) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(self.mesh.shape[name] for name in BATCH_AXES)

  def whole_batch(self, size: int) -> int:
    """Returns the least batch size from `size` on that can be cut evenly."""
    return -(-size // self.batch_ways) * self.batch_ways


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """Returns shapes' tree of ShapeDtypeStructs with these shardings."""
  make = jax.ShapeDtypeStruct
  return jax.tree.map(lambda x, s: make(x.shape, x.dtype, sharding=s), shapes, shardings)


def make_placement(config: MeshConfig, devices: Devices = None, **hints: Any) -> Placement:
  """The placement that a config means on these devices, or all; see `partitioning.resolve`."""
  config = partitioning.resolve(config, devices, **hints)
  rules = partitioning.logical_axis_rules(config)
  return Placement(partitioning.make_mesh(config, devices), rules, config)


def single_device() -> Placement:
  """Returns a placement on the first device alone."""
  return make_placement(MeshConfig(data=1, fsdp=1, model=1), jax.devices()[:1])
