"""Parameters in bfloat16 with float32 copies that the optimizer updates.

What the model reads, what devices exchange and what gradients weigh is halved; no update is lost to
rounding, since it goes to the float32 copy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MasterWeightsState(NamedTuple):
  """The parameters in float32, and the state of the optimizer that updates them."""

  master: Any
  inner: Any


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` applied to float32 copies of the parameters.

  The updates that come out lead from the parameters to the rounded copies, whatever `learning_rate`
  they will be multiplied by, which update needs as an extra argument. Parameters that are float32
  already are their own copies.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    master = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return MasterWeightsState(master, inner.init(master))

  def update(updates, state, params=None, *, learning_rate=None, **extra_args):
    if params is None or learning_rate is None:
      raise ValueError('master_weights needs update(grads, state, params, learning_rate=...).')
    rate = jnp.float32(learning_rate)
    safe_rate = jnp.maximum(rate, jnp.finfo(jnp.float32).tiny)
    updates = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    steps, new = inner.update(updates, state.inner, state.master, learning_rate=rate, **extra_args)
    master = jax.tree.map(lambda m, u: m + rate * u, state.master, steps)
    # From each parameter to its copy: added, it rounds as the copy rounds. At a rate of 0 nothing
    # has moved.
    result = jax.tree.map(
      lambda m, p: jnp.where(rate > 0, (m - p.astype(jnp.float32)) / safe_rate, 0.0), master, params
    )
    return result, MasterWeightsState(master, new)

  return optax.GradientTransformationExtraArgs(init, update)
