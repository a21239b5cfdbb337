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
from t5x_lite.parallel.placement import Placement, with_shardings
from t5x_lite.training import optimizers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, optimizer state, and the number of updates made."""

  step: Any  # int32 scalar
  params: Any  # nested dict of arrays
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class StateSpec:
  """Everything about a state but its numbers."""

  graphdef: Any  # makes the module from parameters: `nnx.merge(graphdef, params)`
  shapes: TrainState  # TrainState of ShapeDtypeStructs, each with its sharding
  axes: TrainState  # TrainState of tuples of logical axis names
  shardings: TrainState  # TrainState of NamedShardings


def make_spec(
  cfg: T5Config,
  tx: optax.GradientTransformation,
  placement: Placement,
  *,
  opt_state_memory: str | None = None,
) -> StateSpec:
  """Describes the state of a model and optimizer on a placement.

  The optimizer's arrays go to JAX's memory kind opt_state_memory: 'pinned_host', None the device's.
  """
  graphdef, params, params_axes = t5.abstract_params(cfg)
  shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params))
  axes = TrainState((), params_axes, optimizers.opt_state_axes(tx, params, params_axes))
  shardings = placement.shardings(shapes, axes)
  if opt_state_memory is not None:

    def moved(x, sharding):
      return sharding.with_memory_kind(opt_state_memory) if x.ndim else sharding

    opt_state = jax.tree.map(moved, shapes.opt_state, shardings.opt_state)
    shardings = dataclasses.replace(shardings, opt_state=opt_state)
  return StateSpec(graphdef, with_shardings(shapes, shardings), axes, shardings)


def init_state(
  cfg: T5Config, tx: optax.GradientTransformation, spec: StateSpec, key: jax.Array
) -> TrainState:
  """Draws a new state, each array made where it will live."""
  init = functools.partial(t5.init_params, cfg)
  return start_from(jax.jit(init, out_shardings=spec.shardings.params)(key), tx, spec)


def start_from(params: Any, tx: optax.GradientTransformation, spec: StateSpec) -> TrainState:
  """Makes a state from given parameters with a fresh optimizer state."""
  opt_state = jax.jit(tx.init, out_shardings=spec.shardings.opt_state)(params)
  count = jax.device_put(jnp.zeros((), jnp.int32), spec.shardings.step)
  return TrainState(count, params, opt_state)
