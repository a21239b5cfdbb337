"""The steps as programs, with their shardings, ready to be compiled.

Training and ahead-of-time compilation make one program, for devices there or only described.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from t5x_lite.decoding import steps as decoding_steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import model_sharding, t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import logical_axes, partitioning
from t5x_lite.parallel.partitioning import Devices, MeshConfig
from t5x_lite.parallel.placement import Placement
from t5x_lite.training import losses, optimizers, schedules, steps, train_state

# From how many parameters on the loop over layers is unrolled in training on CPUs: a fifth faster,
# with 26% more memory and a longer compile, which small models do not earn back.
UNROLLED_ON_CPU = 10**7

BatchSpec = Mapping[str, tuple[tuple[int, ...], Any]]


@dataclasses.dataclass(frozen=True)
class StepProgram:
  """A step, where it runs and what it is called with."""

  placement: Placement  # mesh and rules
  jitted: jax.stages.Wrapped  # the step, with output shardings and donation
  arguments: tuple[Any, ...]  # ShapeDtypeStructs with shardings, for each argument
  spec: train_state.StateSpec | None = None  # the train state's description; None for decoding
  tx: optax.GradientTransformationExtraArgs | None = None  # the optimizer; None for decoding

  @property
  def mesh(self) -> Mesh:
    """The devices."""
    return self.placement.mesh

  def lower(self) -> jax.stages.Lowered:
    """Traces the step."""
    with self.placement.active():
      return self.jitted.lower(*self.arguments)


def _place(model: T5Config, mesh: MeshConfig, batch_size: int, devices: Devices) -> Placement:
  """Returns the placement, checked against the model and the batch."""
  placement = model_sharding.place_model(model, mesh, devices, batch_size=batch_size)
  _, shapes, axes = t5.abstract_params(model)
  logical_axes.check_rules(shapes, axes, placement.mesh, placement.rules)
  if (mesh.model or mesh.num_partitions or 1) > 1:
    logical_axes.check_axis_cuts(shapes, axes, placement.mesh, placement.rules, 'model')
  partitioning.check_batch_size(batch_size, placement.mesh)
  return placement


def _batch(batch: BatchSpec, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  spec = functools.partial(jax.ShapeDtypeStruct, sharding=partitioning.batch_sharding(mesh))
  return {name: spec(shape, dtype) for name, (shape, dtype) in batch.items()}


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
  dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
  return jax.ShapeDtypeStruct((), dtype, sharding=partitioning.replicated(mesh))


def train_program(
  *,
  model: T5Config,
  optimizer: optimizers.OptimizerConfig,
  loss: losses.LossConfig,
  batch: BatchSpec,
  mesh: MeshConfig,
  total_steps: int,
  num_microbatches: int = 1,
  skip_nonfinite: bool = False,
  histograms: bool = False,
  task_names: Sequence[str] = (),
  devices: Devices = None,
) -> StepProgram:
  """Returns the train step: (state, batch, key) -> (state, metrics).

  The batch is shape and dtype of every array of a global one; total_steps is for the schedule; the
  rest is that of `steps.make_train_step`. UsageError if something does not suit the mesh.
  """
  batch_size = next(iter(batch.values()))[0][0]
  placement = _place(model, mesh, batch_size, devices)
  ways = placement.batch_ways
  if num_microbatches < 1 or batch_size % (num_microbatches * ways):
    raise UsageError(
      f'the batch size {batch_size} does not divide into num_microbatches={num_microbatches} on '
      f'{ways} data shards: use a multiple of {num_microbatches * ways}'
    )
  on_cpu = placement.mesh.devices.flat[0].platform == 'cpu'
  _, shapes, axes = t5.abstract_params(model)
  tx = optimizers.make_optimizer(optimizer, axes, shapes)
  spec = train_state.make_spec(model, tx, placement)
  if mesh.offload_optimizer:
    if on_cpu:
      cpus = 'CPUs have no memory of their own to save'
      raise UsageError(f'MeshConfig.offload_optimizer is True, but {cpus}; set it to False')
    tx = _offloaded(tx, spec.shardings.opt_state)
    spec = train_state.make_spec(model, tx, placement, opt_state_memory='pinned_host')
  step = steps.make_train_step(
    spec.graphdef,
    tx,
    schedules.make_schedule(optimizer.schedule, total_steps),
    loss,
    num_microbatches=num_microbatches,
    unroll=on_cpu and model_sharding.count_params(shapes) >= UNROLLED_ON_CPU,
    skip_nonfinite=skip_nonfinite,
    histograms=histograms,
    task_names=task_names,
    trainable=optimizers.trainable_mask(optimizer, shapes),
  )
  outputs = (spec.shardings, partitioning.replicated(placement.mesh))
  jitted = jax.jit(step, donate_argnums=0, out_shardings=outputs)
  arguments = (spec.shapes, _batch(batch, placement.mesh), _key(placement.mesh))
  return StepProgram(placement, jitted, arguments, spec, tx)


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
  devices: Devices = None,
) -> StepProgram:
  """Returns the decode step, of the encoder's tokens: (params, batch, key) -> (tokens, scores)."""
  name = 'encoder_input_tokens'
  if not model.has_encoder or not model.has_decoder:
    raise UsageError(f'the architecture {model.architecture!r} is not decoded from inputs')
  placement = _place(model, mesh, batch[name][0][0], devices)
  graphdef, _, _ = t5.abstract_params(model)
  jitted = jax.jit(decoding_steps.make_predict_step(graphdef, config))
  params = model_sharding.inference_params(model, placement)
  tokens = _batch({name: batch[name]}, placement.mesh)
  return StepProgram(placement, jitted, (params, tokens, _key(placement.mesh)))
