"""Matrices in 8 bits, for inference: symmetric, with a float32 scale for each output channel."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """Stands where a matrix, or a stack of them, would; indexing gives its numbers back."""

  values: jax.Array  # int8
  scales: jax.Array  # float32, of size 1 along the dim of inputs

  @property
  def size(self) -> int:
    """Number of elements."""
    return self.values.size

  def __getitem__(self, index: Any) -> jax.Array:
    """Returns the float32 array that this stands for, or what is at an index of it."""
    return (self.values.astype(jnp.float32) * self.scales)[index]


def quantize(path: Sequence[str], weights: jax.Array) -> Int8:
  """Rounds the parameter at a path to the nearest of 255 steps a channel, where it lies.

  A channel is a column of a kernel, and a row of the embedding, tied to the head or not.
  """
  return _quantize(weights, -1 if path[-1] == 'embedding' else -2)


@jax.jit(static_argnums=1)
def _quantize(weights: jax.Array, axis: int) -> Int8:
  largest = jnp.max(jnp.abs(weights), axis=axis, keepdims=True)
  scales = jnp.where(largest > 0, largest / 127.0, 1.0)
  return Int8(jnp.round(weights / scales).astype(jnp.int8), scales)
