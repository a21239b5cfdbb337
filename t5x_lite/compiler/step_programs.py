"""The steps as programs: with their shardings, ready to be compiled.

Training and ahead-of-time compilation make the same program here, for devices
that are there or for a topology that is only described.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from t5x_lite.decoding import steps as decoding_steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.hardware import Topology
from t5x_lite.parallel.partitioning import LogicalAxisRules, MeshConfig
from t5x_lite.training import losses, optimizers, steps, train_state
from t5x_lite.training.optimizers import OptimizerConfig

BatchSpec = Mapping[str, tuple[tuple[int, ...], Any]]


@dataclasses.dataclass(frozen=True)
class Program:
  """A step, where it runs and what it is called with.

  Attributes:
    mesh_config: resolved.
    mesh: of the devices.
    rules: of the model's constraints.
    jitted: the step, with output shardings and donation.
    arguments: ShapeDtypeStructs with shardings, for each argument.
    spec: the train state's description; None for decoding.
    tx: the optimizer; None for decoding.
  """

  mesh_config: MeshConfig
  mesh: Mesh
  rules: LogicalAxisRules
  jitted: jax.stages.Wrapped
  arguments: tuple[Any, ...]
  spec: train_state.StateSpec | None = None
  tx: optax.GradientTransformationExtraArgs | None = None

  def lower(self) -> jax.stages.Lowered:
    """Traces the step."""
    with partitioning.axis_rules(self.mesh, self.rules):
      return self.jitted.lower(*self.arguments)


def _place(
  model: T5Config,
  mesh: MeshConfig,
  batch_size: int,
  devices: Sequence[jax.Device] | None,
) -> tuple[MeshConfig, Mesh, LogicalAxisRules, Any, Any]:
  _, shapes, axes = t5.abstract_params(model)
  mesh = partitioning.resolve(
    mesh,
    devices,
    num_params=train_state.count_params(shapes),
    num_heads=model.num_heads,
    batch_size=batch_size,
  )
  device_mesh = partitioning.make_mesh(mesh, devices)
  rules = partitioning.logical_axis_rules(mesh)
  partitioning.check_rules(shapes, axes, device_mesh, rules)
  partitioning.check_batch_size(batch_size, device_mesh)
  return mesh, device_mesh, rules, shapes, axes


def _batch(batch: BatchSpec, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  sharding = partitioning.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for name, (shape, dtype) in batch.items()
  }


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
  dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
  return jax.ShapeDtypeStruct((), dtype, sharding=partitioning.replicated(mesh))


def train_program(
  *,
  model: T5Config,
  optimizer: OptimizerConfig,
  loss: losses.LossConfig,
  batch: BatchSpec,
  mesh: MeshConfig,
  total_steps: int,
  num_microbatches: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Program:
  """Returns the train step: (state, batch, key) -> (state, metrics).

  Args:
    model: the architecture.
    optimizer: and its schedule.
    loss: what is minimised.
    batch: shape and dtype of every array of a global batch.
    mesh: how devices are arranged.
    total_steps: for the schedule.
    num_microbatches: parts that a batch is cut into to save memory.
    devices: all of them by default.
  """
  batch_size = next(iter(batch.values()))[0][0]
  mesh, device_mesh, rules, shapes, axes = _place(
    model, mesh, batch_size, devices
  )
  ways = device_mesh.shape['data'] * device_mesh.shape['fsdp']
  if num_microbatches < 1 or batch_size % (num_microbatches * ways):
    raise UsageError(
      f'the batch size {batch_size} does not divide into '
      f'num_microbatches={num_microbatches} on {ways} data shards: use a '
      f'multiple of {num_microbatches * ways}'
    )
  tx = optimizers.make_optimizer(optimizer, axes, shapes)
  spec = train_state.make_spec(model, tx, device_mesh, rules)
  if mesh.offload_optimizer:
    if device_mesh.devices.flat[0].platform == 'cpu':
      raise UsageError(
        'MeshConfig.offload_optimizer is True, but CPUs have no memory of '
        'their own to save; set it to False'
      )
    tx = _offloaded(tx, spec.shardings.opt_state)
    spec = train_state.make_spec(
      model, tx, device_mesh, rules, opt_state_memory='pinned_host'
    )
  step = steps.make_train_step(
    spec.graphdef,
    tx,
    optimizers.make_schedule(optimizer.schedule, total_steps),
    loss,
    num_microbatches=num_microbatches,
    trainable=(
      None
      if optimizer.trainable is None
      else optimizers.trainable_mask(optimizer, shapes)
    ),
  )
  jitted = jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(spec.shardings, partitioning.replicated(device_mesh)),
  )
  arguments = (spec.shapes, _batch(batch, device_mesh), _key(device_mesh))
  return Program(mesh, device_mesh, rules, jitted, arguments, spec, tx)


def _offloaded(
  tx: optax.GradientTransformationExtraArgs, shardings: Any
) -> optax.GradientTransformationExtraArgs:
  """Returns tx for a state that lies in host memory between updates."""

  def update(updates, state, params=None, **extra_args):
    state = jax.device_put(state, shardings)
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def decode_program(
  *,
  model: T5Config,
  config: DecodingConfig,
  batch: BatchSpec,
  mesh: MeshConfig,
  devices: Sequence[jax.Device] | None = None,
) -> Program:
  """Returns the decode step: (params, batch, key) -> (tokens, scores).

  Of the batch only the encoder's tokens are used.
  """
  name = 'encoder_input_tokens'
  if not model.has_encoder or not model.has_decoder:
    raise UsageError(
      f'the architecture {model.architecture!r} is not decoded from inputs'
    )
  mesh, device_mesh, rules, shapes, axes = _place(
    model, mesh, batch[name][0][0], devices
  )
  graphdef, _, _ = t5.abstract_params(model)
  shardings = partitioning.shardings(shapes, axes, device_mesh, rules)
  # At rest parameters are what training left; for decoding they are cast once.
  dtype = jnp.dtype(model.dtype)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
    shapes,
    shardings,
  )
  jitted = jax.jit(decoding_steps.make_predict_step(graphdef, config))
  arguments = (
    params,
    _batch({name: batch[name]}, device_mesh),
    _key(device_mesh),
  )
  return Program(mesh, device_mesh, rules, jitted, arguments)


# ---- TPUs that are not there ----

# XLA:TPU estimates fused convolutions recursively and runs out of its threads'
# 64 kB stacks where dropout is recomputed (T5 base with remat_policy='full',
# dropout_rate=0.1, libtpu 0.0.42.1: a segmentation fault in the compiler).
_LIBTPU_STACK = '--fibers_default_thread_stack_size'


def prepare_libtpu() -> None:
  """Sets what libtpu reads from the environment when it is loaded."""
  flags = os.environ.get('LIBTPU_INIT_ARGS', '')
  if _LIBTPU_STACK not in flags:
    flags = f'{flags} {_LIBTPU_STACK}={4 * 2**20}'.strip()
    os.environ['LIBTPU_INIT_ARGS'] = flags
  # Several compiles at a time; no question to a metadata server that is not
  # there; errors only.
  for name, value in (
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_MIN_LOG_LEVEL', '3'),
    ('TPU_STDERR_LOG_LEVEL', '3'),
  ):
    os.environ.setdefault(name, value)


def topology_devices(
  topology: Topology, num_slices: int = 1
) -> list[jax.Device]:
  """Returns the devices of TPU slices that need not exist.

  Raises:
    UsageError: if libtpu is not installed, or knows no such topology.
  """
  from jax.experimental import topologies

  prepare_libtpu()
  options: dict[str, Any] = {}
  if num_slices > 1:
    options['num_slices'] = num_slices
  if topology.chip.name == 'v4':  # one device a chip, as v4 is used
    options['chip_config_name'] = 'megacore'
  try:
    found = topologies.get_topology_desc(
      topology.name, platform='tpu', **options
    )
  except NotImplementedError as error:
    raise UsageError(
      f'--topology={topology.name} is refused: {str(error).splitlines()[0]}'
    ) from error
  except (RuntimeError, ValueError) as error:
    text = str(error)
    if 'libtpu' in text.lower() or 'tpu plugin' in text.lower():
      raise UsageError(
        "compiling for TPUs needs libtpu: pip install 't5x_lite[tpu]' "
        f'({text.splitlines()[0]})'
      ) from error
    raise UsageError(
      f'XLA:TPU knows no topology {topology.name}: {text.splitlines()[0]}'
    ) from error
  return list(found.devices)
