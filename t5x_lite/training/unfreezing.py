"""Gradual unfreezing: from the top layer down, one more every so many steps.

At first the top layer of encoder and decoder trains; after `every` updates the one below too, until
all do. A stack's shared position bias belongs to its first layer, as in Mesh TensorFlow's
variables; embedding, head and final norms train from the start.

Source: Raffel et al. 2020, section 3.5.1 (every 2^18 / 12 of 2^18 steps).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite.parallel import pytrees


class UnfreezingState(NamedTuple):
  """State of `unfreeze_gradually`."""

  count: jax.Array  # updates made
  # the optimizer's state, made for all parameters at the start. That of a frozen layer stays as it
  # was made; that of none, such as a count, goes on.
  inner: Any


def unfreeze_gradually(
  tx: optax.GradientTransformation, every: int, params: Any, axes: Any, state_axes: Any
) -> optax.GradientTransformationExtraArgs:
  """Returns tx for layers that are trained; the others get no update at all.

  Gradients of frozen layers are 0 for tx, in the global norm too. They are computed all the same:
  one compiled step serves for all of training. One more layer trains after every so many updates.
  Axes are logical ones, of each parameter and of all that tx keeps.
  """
  tx = optax.with_extra_args_support(tx)
  depths = _depths(params, axes)

  def init(params):
    return UnfreezingState(jnp.zeros((), jnp.int32), tx.init(params))

  def update(updates, state, params=None, **extra_args):
    opened = state.count // every + 1

    def choose(path, new, old, names):
      trained = _trained(pytrees.names_of(path), names, depths, opened)
      if trained is None:
        return new
      if 'layers' in names:
        trained = trained.reshape([-1 if name == 'layers' else 1 for name in names])
      return jnp.where(trained, new, old)

    def masked(tree):
      zeros = jax.tree.map(jnp.zeros_like, tree)
      return jax.tree_util.tree_map_with_path(choose, tree, zeros, axes)

    updates, inner = tx.update(masked(updates), state.inner, params, **extra_args)
    inner = jax.tree_util.tree_map_with_path(choose, inner, state.inner, state_axes)
    return masked(updates), UnfreezingState(state.count + 1, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def _depths(params: Any, axes: Any) -> dict[str, int]:
  """Returns the number of layers of each stack."""
  depths: dict[str, int] = {}
  for (side, *rest), leaf, names in pytrees.leaves_with_axes(params, axes):
    if rest[0] != 'layers':
      continue
    count = leaf.shape[names.index('layers')] if 'layers' in names else int(rest[1]) + 1
    depths[side] = max(count, depths.get(side, 0))
  return depths


def _trained(path, names, depths: dict[str, int], opened: jax.Array) -> jax.Array | None:
  """Returns whether a layer trains, or each of a stack; None for no layer.

  The path ends with a parameter's; opened counts the layers that train.
  """
  for i, side in enumerate(path[:-1]):
    if side not in depths:
      continue
    if path[i + 1] == 'relpos_bias':
      return opened >= depths[side]
    if path[i + 1] == 'layers':
      if 'layers' in names:
        return jnp.arange(depths[side]) >= depths[side] - opened
      if path[i + 2].isdigit():
        return int(path[i + 2]) >= depths[side] - opened
  return None
