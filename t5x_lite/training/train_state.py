"""The train state: what a step updates and a checkpoint holds.

Abstract first: shapes, logical axes and shardings of the whole state are known before anything is
allocated, so init, restore, ahead-of-time compilation and memory reports share one description.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel.placement import Placement
from t5x_lite.training import optimizers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, optimizer state, and the number of updates made.

  Attributes:
    step: int32 scalar, updates made so far.
    params: nested dict of arrays.
    opt_state: the optimizer's state.
  """

  step: Any
  params: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class StateSpec:
  """Everything about a state but its numbers.

  Attributes:
    graphdef: makes the module from parameters: `nnx.merge(graphdef, params)`.
    shapes: TrainState of ShapeDtypeStructs, each with its sharding.
    axes: TrainState of tuples of logical axis names.
    shardings: TrainState of NamedShardings.
  """

  graphdef: Any
  shapes: TrainState
  axes: TrainState
  shardings: TrainState


def make_spec(
  cfg: T5Config,
  tx: optax.GradientTransformation,
  placement: Placement,
  *,
  opt_state_memory: str | None = None,
) -> StateSpec:
  """Describes the state of a model and optimizer on a placement.

  Args:
    cfg: the model's.
    tx: the optimizer.
    placement: where the state lives.
    opt_state_memory: JAX's memory kind for the optimizer's arrays, such as 'pinned_host'; None is
      the device's own.
  """
  graphdef, params, params_axes = t5.abstract_params(cfg)
  shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params))
  axes = TrainState((), params_axes, optimizers.opt_state_axes(tx, params, params_axes))
  shardings = placement.shardings(shapes, axes)
  if opt_state_memory is not None:
    opt_state = jax.tree.map(
      lambda x, s: s.with_memory_kind(opt_state_memory) if x.ndim else s,
      shapes.opt_state,
      shardings.opt_state,
    )
    shardings = dataclasses.replace(shardings, opt_state=opt_state)
  shapes = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  return StateSpec(graphdef, shapes, axes, shardings)


def init_state(
  cfg: T5Config, tx: optax.GradientTransformation, spec: StateSpec, key: jax.Array
) -> TrainState:
  """Draws a new state, each array made where it will live."""
  init = functools.partial(_init, cfg=cfg, tx=tx)
  return jax.jit(init, out_shardings=spec.shardings)(key)


def _init(key, *, cfg, tx):
  params = t5.init_params(cfg, key)
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def start_from(
  params: Any, tx: optax.GradientTransformation, spec: StateSpec, step: int = 0
) -> TrainState:
  """Makes a state from given parameters with a fresh optimizer state."""
  init = jax.jit(tx.init, out_shardings=spec.shardings.opt_state)
  return TrainState(
    jax.device_put(jnp.asarray(step, jnp.int32), spec.shardings.step), params, init(params)
  )
