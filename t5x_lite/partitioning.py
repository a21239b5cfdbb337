"""Where arrays live: the mesh, logical axis rules, and shardings.

Parameters and activations name their dimensions logically ('embed', 'mlp',
'batch', ...); rules map those names to mesh axes. Nothing else in the project
names a mesh axis. Words: an `axis` belongs to the mesh or is a logical name, a
`dim` to an array.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import UsageError

MESH_AXES = ('data', 'fsdp', 'model')
BATCH_AXES = ('data', 'fsdp')

LogicalAxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How many devices each mesh axis has, and what is cut along it.

  Attributes:
    data: replicas of the parameters; -1 takes the devices that are left.
    fsdp: devices over which batch, and with parameter_dims=2 also parameters,
      are cut (ZeRO-3); T5X does this on its 'data' axis.
    model: tensor parallelism (T5X's num_partitions).
    activation_dims: 1, or 2 to cut activations' embed over 'model' too.
    parameter_dims: 1, or 2 to cut parameters' embed over 'fsdp' too.
    additional_rules: (logical name, mesh axis or axes or None) pairs, tried
      before the standard rules.
  """

  data: int = -1
  fsdp: int = 1
  model: int = 1
  activation_dims: int = 1
  parameter_dims: int = 1
  additional_rules: tuple[tuple[str, Any], ...] = ()

  def __post_init__(self):
    for name in MESH_AXES:
      size = getattr(self, name)
      if size != -1 and size < 1:
        raise UsageError(
            f'MeshConfig.{name} is {size}; it must be positive, or -1 for the '
            'devices that are left.'
        )
    if sum(getattr(self, name) == -1 for name in MESH_AXES) > 1:
      raise UsageError('At most one of MeshConfig data, fsdp, model can be -1.')
    for name in ('activation_dims', 'parameter_dims'):
      if getattr(self, name) not in (1, 2):
        raise UsageError(
            f'MeshConfig.{name} is {getattr(self, name)}; allowed are 1 and 2.'
        )


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
  """Returns (data, fsdp, model) with -1 resolved.

  Raises:
    UsageError: if the axes do not multiply to the number of devices.
  """
  sizes = [config.data, config.fsdp, config.model]
  known = int(np.prod([s for s in sizes if s != -1]))
  if -1 in sizes and num_devices % known == 0:
    sizes[sizes.index(-1)] = num_devices // known
  if int(np.prod(sizes)) != num_devices:
    raise UsageError(
        f'The mesh data={config.data} fsdp={config.fsdp} model={config.model} '
        f'does not multiply to the {num_devices} devices at hand.'
    )
  return sizes[0], sizes[1], sizes[2]


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns a ('data', 'fsdp', 'model') mesh over the given devices, or all."""
  devices = list(devices) if devices is not None else jax.devices()
  shape = mesh_shape(config, len(devices))
  # Since jax 0.9 the default axis type is Explicit, under which ordinary
  # sharding constraints change their meaning.
  return jax.make_mesh(
      shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def logical_axis_rules(config: MeshConfig) -> LogicalAxisRules:
  """Returns the rules, in order of precedence.

  Source: t5x/partitioning.py standard_logical_axis_rules. What T5X cuts over
  'data' with two parameter dims is cut over 'fsdp' here.
  """
  rules: list[tuple[str, Any]] = [
      *config.additional_rules,
      ('batch', BATCH_AXES),
      ('vocab', 'model'),
      ('mlp', 'model'),
      ('heads', 'model'),
      ('kv', None),
      ('joined_kv', 'model'),
  ]
  if config.activation_dims == 2:
    rules.append(('embed', 'model'))
  if config.parameter_dims == 2:
    rules.append(('embed', 'fsdp'))
  rules += [
      ('embed', None),
      ('relpos_buckets', None),
      ('length', None),
      ('layers', None),
  ]
  return tuple(rules)


def spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh_sizes: Mapping[str, int],
    rules: LogicalAxisRules,
) -> PartitionSpec:
  """Returns the partition spec of an array with these logical axes.

  Rules are tried in order; each mesh axis is used at most once an array (as in
  flax's logical_to_mesh_axes). A rule whose mesh axes do not divide the dim is
  passed over, so the dim stays whole rather than being padded.

  Raises:
    UsageError: if a name has no rule at all.
  """
  assert len(axes) == len(shape), (axes, shape)
  result: list[Any] = [None] * len(axes)
  done = [name is None for name in axes]
  used: set[str] = set()
  for name, target in rules:
    for i, axis in enumerate(axes):
      if axis != name or done[i]:
        continue
      if target is None:
        done[i] = True
        continue
      names = (target,) if isinstance(target, str) else tuple(target)
      unknown = [n for n in names if n not in mesh_sizes]
      if unknown:
        raise UsageError(
            f'The rule {(name, target)} names the mesh axis {unknown[0]!r}; '
            f'the mesh has {", ".join(mesh_sizes)}.'
        )
      size = int(np.prod([mesh_sizes[n] for n in names]))
      if used.isdisjoint(names) and shape[i] % size == 0:
        result[i] = target
        used.update(names)
        done[i] = True
        break
  known = {name for name, _ in rules}
  for axis in axes:
    if axis is not None and axis not in known:
      raise UsageError(
          f'No rule names the logical axis {axis!r}; rules exist for '
          f'{", ".join(sorted(known))}.'
      )
  return PartitionSpec(*result)


def shardings(shapes: Any, axes: Any, mesh: Mesh, rules: LogicalAxisRules):
  """Returns a NamedSharding for every leaf.

  Args:
    shapes: pytree of arrays or ShapeDtypeStructs.
    axes: the same tree with a tuple of logical names in place of each array.
    mesh: the mesh.
    rules: see `logical_axis_rules`.
  """
  return jax.tree.map(
      lambda x, names: NamedSharding(
          mesh, spec(names, x.shape, dict(mesh.shape), rules)),
      shapes,
      axes,
  )


# Set while a program traces its step; read by the model's constraints. A
# context, not an argument, so that the model's signatures stay about the model.
_ACTIVE: contextvars.ContextVar[tuple[Mesh, LogicalAxisRules] | None] = (
    contextvars.ContextVar('t5x_lite_axis_rules', default=None))


@contextlib.contextmanager
def axis_rules(mesh: Mesh, rules: LogicalAxisRules) -> Iterator[None]:
  """Makes `constrain` effective for what is traced inside."""
  token = _ACTIVE.set((mesh, rules))
  try:
    yield
  finally:
    _ACTIVE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation's sharding by logical names.

  Outside `axis_rules`, or on one device, it returns x unchanged.
  """
  active = _ACTIVE.get()
  if active is None or active[0].size == 1:
    return x
  mesh, rules = active
  partition = spec(axes, x.shape, dict(mesh.shape), rules)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its leading dim over all data axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises UsageError unless the batch divides over the mesh's data axes."""
  ways = int(np.prod([mesh.shape[name] for name in BATCH_AXES]))
  if batch_size % ways:
    raise UsageError(
        f'The batch size {batch_size} does not divide over the mesh: data x '
        f'fsdp is {ways}; use a multiple of {ways} or another mesh.'
    )


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh):
  """Turns this host's rows into arrays over the whole mesh.

  Args:
    batch: arrays with a leading batch dim, this process's share of it.
    mesh: the mesh.
  """
  sharding = batch_sharding(mesh)
  return {
      name: jax.make_array_from_process_local_data(sharding, array)
      for name, array in batch.items()
  }
