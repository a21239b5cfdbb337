"""Gradual unfreezing: from the top layer down, one more every so many steps.

At first the top layer of encoder and decoder trains; after `every` updates the one below too, until
all do. A stack's shared position bias belongs to its first layer, as in Mesh TensorFlow's
variables; embedding, head and final norms train from the start.

Source: Raffel et al. 2020, section 3.5.1 (every 2^18 / 12 of 2^18 steps).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_lite.parallel import pytrees


class UnfreezingState(NamedTuple):
  """State of `unfreeze_gradually`."""

  count: jax.Array  # updates made
  # made for all parameters at the start: a frozen layer's stays so; that of none, a count, goes on
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
      needed = _needed(pytrees.names_of(path), names, depths)
      return new if needed is None else jnp.where(opened >= needed, new, old)

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


def _needed(path, names, depths: dict[str, int]) -> np.ndarray | int | None:
  """Returns how many layers train when this one does, or each of a stack; None for no layer."""
  for i, side in enumerate(path[:-1]):
    if side not in depths:
      continue
    if path[i + 1] == 'relpos_bias':
      return depths[side]
    if path[i + 1] == 'layers':
      if 'layers' in names:
        shape = [-1 if name == 'layers' else 1 for name in names]
        return np.arange(depths[side], 0, -1).reshape(shape)
      if path[i + 2].isdigit():
        return depths[side] - int(path[i + 2])
  return None
