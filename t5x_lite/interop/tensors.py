"""Lazy tensors: read when they are asked for, and only the part asked for.

A checkpoint of any format is a mapping from canonical names (tensor_names.py) to these; so are a
model in memory and what replaces a missing parameter.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.interop import tensor_names
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees

Index = tuple[slice, ...]
Progress = Callable[[str], None]  # told the name of each array that was written


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array somewhere."""

  shape: tuple[int, ...]
  dtype: np.dtype  # as stored
  fetch: Callable[[Index], np.ndarray]  # returns the part that one slice a dim names
  origin: str  # its name where it is stored, for messages

  def read(self, index: Index | None = None) -> np.ndarray:
    """Returns the whole, or the part that one slice a dim names."""
    return self.fetch(index or (slice(None),) * len(self.shape))

  @property
  def size(self) -> int:
    """Number of elements."""
    return int(np.prod(self.shape))

  def transposed(self) -> 'Tensor':
    """Returns the transpose of a matrix."""
    return dataclasses.replace(self, shape=self.shape[::-1], fetch=lambda i: self.fetch(i[::-1]).T)

  def layer(self, axis: int, i: int) -> 'Tensor':
    """Returns what is at i of an axis, without that axis."""

    def fetch(index: Index) -> np.ndarray:
      return self.fetch((*index[:axis], slice(i, i + 1), *index[axis:])).squeeze(axis)

    shape = (*self.shape[:axis], *self.shape[axis + 1 :])
    return dataclasses.replace(self, shape=shape, fetch=fetch)


Tensors = Mapping[str, Tensor]


def of_array(array: Any, origin: str = 'memory') -> Tensor:
  """Wraps a numpy or JAX array."""
  shape, dtype = tuple(array.shape), np.dtype(array.dtype)
  return Tensor(shape, dtype, lambda index: np.asarray(array[index]), origin)


def of_params(params: Any, cfg: T5Config) -> dict[str, Tensor]:
  """Returns a model's parameters as tensors; nothing is copied yet."""
  cfg.check_writable()
  result = {}
  for path, leaf in pytrees.leaves(params):
    result |= of_leaf(of_array(leaf, '/'.join(path)), cfg, path)
  return result


def of_leaf(whole: Tensor, cfg: T5Config, path: Sequence[str]) -> dict[str, Tensor]:
  """Returns the tensors that one leaf of our tree is, by their canonical names."""
  names = tensor_names.leaf_names(cfg, path)
  if not tensor_names.is_stacked(cfg, path):
    return {names[0]: whole}
  return {name: whole.layer(0, i) for i, name in enumerate(names)}


def mean(parts: Sequence[Tensor]) -> Tensor:
  """Returns the mean of tensors of one shape, taken in float64 as it is read."""

  def fetch(index: Index) -> np.ndarray:
    total = parts[0].fetch(index).astype(np.float64)
    for part in parts[1:]:
      total += part.fetch(index)
    return (total / len(parts)).astype(parts[0].dtype)

  return dataclasses.replace(parts[0], fetch=fetch, origin=f'the mean of {len(parts)}')


def place(tensors: Tensors, cfg: T5Config, specs: Any = None) -> Any:
  """Reads tensors into a parameter tree, each part to the device that keeps it.

  One leaf at a time; of a leaf that is cut over devices, one part at a time. No device ever holds
  more than its own share. They are cast to the dtypes of specs, a tree of ShapeDtypeStructs with
  shardings, by default the model's on the first device; int8 makes an `Int8`.
  """
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  specs = t5.abstract_params(cfg)[1] if specs is None else specs

  def make(keys: Any, leaf: Any) -> Any:
    path, rounded = pytrees.names_of(keys), leaf.dtype == np.int8
    leaf = leaf.update(dtype=np.float32) if rounded else leaf
    stacked = tensor_names.is_stacked(cfg, path)
    parts = [tensors[name] for name in tensor_names.leaf_names(cfg, path)]
    done: dict[Any, np.ndarray] = {}

    def fetch(index: Index | None) -> np.ndarray:
      index = index or ()
      # Replicas ask for the same part once a device.
      key = tuple((s.start, s.stop) for s in index)
      if key not in done:
        done[key] = _assemble(parts, index, leaf, stacked)
      return done[key]

    sharding = leaf.sharding or here
    placed = jax.make_array_from_callback(leaf.shape, sharding, fetch).block_until_ready()
    return quantize(placed, -1 if path[-1] == 'embedding' else -2) if rounded else placed

  return jax.tree_util.tree_map_with_path(make, specs)


def _assemble(parts: Sequence[Tensor], index: Index, leaf: Any, stacked: bool) -> np.ndarray:
  """Returns part of a leaf, filled layer by layer."""
  if not stacked:
    return parts[0].read(index).astype(leaf.dtype)
  layers = range(*index[0].indices(len(parts)))
  shape = [len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)]
  out = np.empty(shape, leaf.dtype)
  for row, layer in enumerate(layers):
    out[row] = parts[layer].read(index[1:])
  return out


def blocks(shape: Sequence[int], limit: int = 1 << 26) -> list[Index]:
  """Cuts an array along its first dim into parts of at most limit elements, or of one row."""
  if not shape or int(np.prod(shape)) <= limit:
    return [(slice(None),) * len(shape)]
  rows = max(1, limit // max(1, int(np.prod(shape[1:]))))
  starts = range(0, shape[0], rows)
  rest = (slice(None),) * (len(shape) - 1)
  return [(slice(a, b), *rest) for a, b in itertools.pairwise((*starts, shape[0]))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """Stands where a matrix, or a stack of them, would, for inference: 8 bits, symmetric."""

  values: jax.Array  # int8
  scales: jax.Array  # float32, of each output channel: of size 1 along the dim of inputs

  @property
  def size(self) -> int:
    """Number of elements."""
    return self.values.size

  def __getitem__(self, index: Any) -> jax.Array:
    """Returns the float32 array that this stands for, or what is at an index of it."""
    return (self.values.astype(jnp.float32) * self.scales)[index]


@jax.jit(static_argnums=1)
def quantize(weights: jax.Array, axis: int) -> Int8:
  """Rounds a parameter to the nearest of 255 steps a channel, where it lies.

  A channel goes along the axis: a column of a kernel, a row of the embedding, tied or not.
  """
  largest = jnp.max(jnp.abs(weights), axis=axis, keepdims=True)
  scales = jnp.where(largest > 0, largest / 127.0, 1.0)
  return Int8(jnp.round(weights / scales).astype(jnp.int8), scales)
