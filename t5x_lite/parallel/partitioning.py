"""Where arrays live: meshes of devices by name or size, and batches on them.

Nothing else in the project names a mesh axis. How logical axes become shardings is in
logical_axes.py.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import UsageError, check_fields, check_one_of
from t5x_lite.parallel.hardware import find_chip
from t5x_lite.parallel.logical_axes import LogicalAxisRules

log = logging.getLogger(__name__)

Devices = Sequence[jax.Device] | None  # None: all that there are
MESH_AXES = ('data', 'fsdp', 'model')
BATCH_AXES = ('data', 'fsdp')
PRESETS = ('auto', 'dp', 'fsdp', 'fsdp_tp')

# What 'auto' takes for a parameter: 4 bytes each for it, its gradient and Adafactor's transients.
_BYTES_PER_PARAMETER = 12
# ... and how much of a device's memory they may fill before they are cut, beside activations.
_REPLICATED_FRACTION = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How devices are arranged, and what is cut along which mesh axis.

  Sizes that are given win over the preset. 'data' is the only axis that spans slices or, on GPUs,
  the first to span nodes; 'model' is innermost.

  Attributes:
    preset: 'auto' picks by the devices, the model's size and the batch size; 'dp' replicates
      parameters; 'fsdp' cuts parameters, optimizer state and batch over all devices of a slice
      (ZeRO-3); 'fsdp_tp' cuts matrices over 'model' too, as `model` says or is usual for the chip.
    data: replicas of the parameters; -1 takes the devices that are left.
    fsdp: devices over which batch and parameters are cut.
    model: tensor parallelism.
    num_partitions: T5X's: model=num_partitions, the rest to data, with parameter_dims=2 to fsdp.
    num_slices: TPU slices joined by the data-center network; None asks the devices.
    activation_dims: 1, or 2 to cut activations' embed over 'model' too.
    parameter_dims: 1, or 2 to cut parameters' embed over 'fsdp'. None is 2, but T5X's 1 with
      num_partitions.
    additional_rules: (logical axis, mesh axis or axes or None) pairs before the standard rules.
    parameter_rules: (regular expression, pairs) pairs: such rules for only the parameters in whose
      path the expression is found, for example (('token_embedder', (('vocab', ('fsdp', 'model')),
      ('embed', None))),).
    offload_optimizer: keep the optimizer's state in host memory between steps.
  """

  preset: str = 'auto'
  data: int | None = None
  fsdp: int | None = None
  model: int | None = None
  num_partitions: int | None = None
  num_slices: int | None = None
  activation_dims: int = 1
  parameter_dims: int | None = None
  additional_rules: Sequence[Any] = ()
  parameter_rules: Sequence[Any] = ()
  offload_optimizer: bool = False

  def __post_init__(self):
    for name in ('additional_rules', 'parameter_rules'):
      object.__setattr__(self, name, _as_tuples(getattr(self, name)))
    check_one_of('MeshConfig.preset', self.preset, PRESETS)
    sizes = {name: getattr(self, name) for name in MESH_AXES}
    counts = {name: getattr(self, name) for name in ('num_partitions', 'num_slices')}
    left = 'positive, or -1 for the devices that are left'
    check_fields(
      self,
      **{name: (n in (None, -1) or n > 0, left) for name, n in sizes.items()},
      **{name: (n is None or n > 0, 'positive') for name, n in counts.items()},
      activation_dims=(self.activation_dims in (1, 2, None), '1 or 2'),
      parameter_dims=(self.parameter_dims in (1, 2, None), '1 or 2'),
    )
    if list(sizes.values()).count(-1) > 1:
      raise UsageError('At most one of MeshConfig data, fsdp, model can be -1.')
    given = ', '.join(name for name, size in sizes.items() if size is not None)
    if self.num_partitions is not None and (given or self.preset != 'auto'):
      beside = f'{self.num_partitions} beside {given or "preset"}'
      raise UsageError(f'MeshConfig.num_partitions is {beside}; give one or the other.')
    if given and self.preset != 'auto' and (self.preset, given) != ('fsdp_tp', 'model'):
      beside = f'{self.preset!r} beside {given}'
      raise UsageError(f'MeshConfig.preset is {beside}; give sizes or a preset.')
    for rule in self.additional_rules:
      _check_rule('additional_rules', rule)
    for rule in self.parameter_rules:
      if isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
        form = 'each entry is (regular expression, ((logical axis, mesh axis), ...)).'
        raise UsageError(f'MeshConfig.parameter_rules has {rule!r}; {form}')
      for inner in rule[1]:
        _check_rule('parameter_rules', inner)


def _as_tuples(value: Any) -> Any:
  """Returns nested lists as tuples: gin hands over lists."""
  if isinstance(value, Mapping):
    value = tuple(value.items())
  if isinstance(value, (list, tuple)):
    return tuple(_as_tuples(item) for item in value)
  return value


def _check_rule(name: str, rule: Any) -> None:
  target = rule[1] if isinstance(rule, tuple) and len(rule) == 2 else 0
  targets = target if isinstance(target, tuple) else (target,)
  if not {*targets} <= {*MESH_AXES, None} or len({*targets}) < len(targets):
    form = '(logical axis, mesh axis, several different ones, or None)'
    axes = f'mesh axes are {", ".join(MESH_AXES)}'
    raise UsageError(f'MeshConfig.{name} has {rule!r}; a rule is {form}; {axes}.')


def logical_axis_rules(config: MeshConfig) -> LogicalAxisRules:
  """Returns the rules, in order of precedence.

  Source: t5x/partitioning.py standard_logical_axis_rules; its second parameter dim is on 'fsdp'.
  """
  rules: list[tuple[str, Any]] = [*config.additional_rules, ('batch', BATCH_AXES), ('kv', None)]
  rules += [(name, 'model') for name in ('vocab', 'mlp', 'heads', 'joined_kv')]
  if config.activation_dims == 2:
    rules.append(('embed', 'model'))
  if _parameter_dims(config) == 2:
    rules.append(('embed', 'fsdp'))
  whole = ('embed', 'relpos_buckets', 'length', 'layers', 'lora_rank', 'adapter', 'prompt')
  rules += [(name, None) for name in whole]
  return LogicalAxisRules(tuple(rules), tuple(config.parameter_rules), len(config.additional_rules))


def _parameter_dims(config: MeshConfig) -> int:
  return config.parameter_dims or (2 if config.num_partitions is None else 1)


def resolve(
  config: MeshConfig,
  devices: Devices = None,
  *,
  num_params: int = 0,
  num_heads: int | None = None,
  batch_size: int | None = None,
) -> MeshConfig:
  """Returns the config with every size a positive number.

  Devices are all of them by default. The model's num_params and the global batch_size are for
  'auto', num_heads is for 'fsdp_tp': 'model' should divide it. UsageError if they do not fit.
  """
  devices = list(jax.devices() if devices is None else devices)
  found = len(set(map(_slice, devices)))
  num_slices = config.num_slices or found
  given = f'MeshConfig.num_slices={num_slices}'
  if len(devices) % num_slices:
    raise UsageError(f'{given} does not divide the {len(devices)} devices at hand.')
  if found > 1 and found != num_slices:
    raise UsageError(f'{given}, but the devices at hand come from {found} slices.')
  per_slice = len(devices) // num_slices
  if config.num_partitions is not None:
    rest = 'fsdp' if _parameter_dims(config) == 2 else 'data'
    sizes = {'data': num_slices, 'fsdp': 1, 'model': config.num_partitions, rest: -1}
  elif config.preset == 'fsdp_tp':
    model = config.model or _model_axis(devices, per_slice, num_heads)
    sizes = {'data': num_slices, 'fsdp': -1, 'model': model}
  elif any(getattr(config, name) is not None for name in MESH_AXES):
    sizes = {name: getattr(config, name) or 1 for name in MESH_AXES}
    if -1 not in sizes.values() and config.data is None:
      sizes['data'] = -1
  else:
    sizes = _sizes_of_preset(config.preset, devices, num_slices, num_params, batch_size)
  sizes = _complete(sizes, len(devices))
  if sizes['data'] % num_slices:
    raise UsageError(
      f'MeshConfig.data={sizes["data"]} is no multiple of the {num_slices} slices: only the data '
      f'axis can span slices; give fsdp x model that divides {per_slice}.'
    )
  sizes |= {'num_slices': num_slices, 'parameter_dims': _parameter_dims(config)}
  return dataclasses.replace(config, preset='auto', num_partitions=None, **sizes)


def _complete(sizes: dict[str, int], num_devices: int) -> dict[str, Any]:
  """Replaces a -1 by the devices that are left."""
  known = math.prod(size for size in sizes.values() if size != -1)
  full = {name: num_devices // known if size == -1 else size for name, size in sizes.items()}
  if math.prod(full.values()) != num_devices:
    mesh = ' '.join(f'{name}={size}' for name, size in sizes.items())
    raise UsageError(f'The mesh {mesh} does not multiply to the {num_devices} devices at hand.')
  return full


def _sizes_of_preset(
  preset: str, devices: Sequence[Any], num_slices: int, num_params: int, batch_size: int | None
) -> dict[str, int]:
  """Returns the sizes of 'dp', 'fsdp' or 'auto'."""
  per_slice = len(devices) // num_slices
  if preset == 'dp':
    return {'data': -1, 'fsdp': 1, 'model': 1}
  if preset == 'fsdp':
    return {'data': num_slices, 'fsdp': -1, 'model': 1}
  # The batch can be cut at most as often as it has rows; what is left cuts matrices instead.
  ways = per_slice
  while ways > 1 and (per_slice % ways or (batch_size or 0) % (num_slices * ways)):
    ways -= 1
  chip = find_chip(devices[0].device_kind)
  if chip is None or num_params * _BYTES_PER_PARAMETER <= _REPLICATED_FRACTION * chip.hbm_bytes:
    return {'data': num_slices * ways, 'fsdp': 1, 'model': -1}
  return {'data': num_slices, 'fsdp': ways, 'model': -1}


def _model_axis(devices: Sequence[jax.Device], per_slice: int, num_heads: int | None) -> int:
  """Returns how many ways 'fsdp_tp' cuts matrices by default."""
  chip = find_chip(devices[0].device_kind)
  most = 2 if chip is None else chip.model_axis
  if devices[0].platform == 'gpu':  # NVLink ends where the node ends
    most = _gpus_per_node(devices)
  while per_slice % most or (num_heads or most) % most:
    most -= 1
  return most


def _slice(device: jax.Device) -> int:
  # On GPUs JAX calls a node a slice; there any axis may span them.
  return getattr(device, 'slice_index', None) or 0 if device.platform == 'tpu' else 0


def _gpus_per_node(devices: Sequence[jax.Device]) -> int:
  """Returns how many GPUs NVLink joins, with one process a node or a GPU."""
  indices = [(getattr(d, 'slice_index', None), d.process_index) for d in devices]
  nodes = [process if index is None else index for index, process in indices]
  return nodes.count(nodes[0])


def make_mesh(config: MeshConfig, devices: Devices = None, **hints: Any) -> Mesh:
  """Returns a ('data', 'fsdp', 'model') mesh; for the arguments see `resolve`."""
  devices = list(jax.devices() if devices is None else devices)
  config = resolve(config, devices, **hints)
  data, fsdp, model = sizes = [getattr(config, name) for name in MESH_AXES]
  if devices[0].platform == 'gpu':  # refused by T5X too: a model axis that crosses nodes unevenly
    local = _gpus_per_node(devices)
    if model % local and local % model:
      neither = f'MeshConfig.model={model} is neither a factor nor a multiple'
      raise UsageError(f'{neither} of the {local} GPUs of a node.')
  num_slices = config.num_slices or 1
  # Devices that know of no slices (CPUs standing in for TPUs) are cut in order.
  groups = np.array(sorted(devices, key=_slice)).reshape(num_slices, -1)
  shape = (data // num_slices, fsdp, model)
  array = np.stack([_arrange(shape, group.tolist()) for group in groups])
  # Since jax 0.9 the default axis type is Explicit, under which ordinary sharding constraints
  # change their meaning.
  return Mesh(array.reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Lays mesh axes along the torus of one slice; in order elsewhere."""
  if devices[0].platform != 'tpu':
    return np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(shape)
  try:
    return mesh_utils.create_device_mesh(shape, devices)
  except NotImplementedError:  # some sizes fit no product of whole torus dims
    log.warning('the mesh %s cuts through the torus of the slice', shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its leading dim over all data axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises UsageError unless the batch divides over the mesh's data axes."""
  ways = math.prod(mesh.shape[name] for name in BATCH_AXES)
  if batch_size % ways:
    fix = f'data x fsdp is {ways}; use a multiple of {ways} or another mesh.'
    raise UsageError(f'The batch size {batch_size} does not divide over the mesh: {fix}')


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh):
  """Turns this process's rows of a batch into arrays over the whole mesh."""
  make = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
  return {name: make(array) for name, array in batch.items()}
