"""Checksums of arrays, of small JSON files and of files.

An array's is a sum over its elements, so that each device, host or block adds its part, and the
number does not depend on how the array is cut: the bits of each element times an odd number that
depends on its place, modulo 2**32. Any one changed bit changes it, and so does a block moved.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from t5x_lite.errors import DamagedError
from t5x_lite.parallel import pytrees

_SIGNATURE = 'sha256'
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of_tree(tree: Any) -> dict[str, int]:
  """Returns the checksum of each array of nested dicts by Orbax's name, 'params.encoder.layers...'.

  Computed where the arrays lie, on any mesh; the tree is the same on all processes.
  """
  flat = {name.replace('/', '.'): leaf for name, leaf in pytrees.flatten_names(tree).items()}
  return {name: int(x) for name, x in jax.device_get(_sums(flat)).items()}


_sums = jax.jit(lambda flat: {name: _sum(array) for name, array in flat.items()})


def _sum(array: jax.Array) -> jax.Array:
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize])
  place = jnp.zeros((), jnp.uint32)
  for dim, stride in enumerate(_strides(array.shape)):
    place += np.uint32(stride & 0xFFFFFFFF) * jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
  return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def of_block(block: np.ndarray, shape: Sequence[int], start: Sequence[int]) -> int:
  """Returns what a block that starts at `start` of an array of this shape adds to its checksum."""
  block = np.ascontiguousarray(block)
  if block.dtype == np.bool_:
    block = block.astype(np.uint8)
  bits = block.view(_BITS[block.dtype.itemsize])
  if tuple(block.shape[1:]) == tuple(shape[1:]):
    # Its elements follow each other: no array of their places is needed.
    return _of_run(bits.reshape(-1), (start[0] if shape else 0) * math.prod(shape[1:]))
  place = np.zeros((1,) * block.ndim, np.uint32)
  for dim, stride in enumerate(_strides(shape)):
    steps = (np.arange(block.shape[dim]) + start[dim]).astype(np.uint32)
    along = [-1 if i == dim else 1 for i in range(block.ndim)]
    place = place + (steps * np.uint32(stride & 0xFFFFFFFF)).reshape(along)
  return int(np.sum(bits.astype(np.uint32) * (2 * place + 1), dtype=np.uint32))


def of_part(part: np.ndarray, shape: Sequence[int], index: Sequence[slice]) -> int:
  """The same of the part that one slice a dim names."""
  return of_block(part, shape, [at.indices(n)[0] for at, n in zip(index, shape, strict=True)])


def _of_run(bits: np.ndarray, offset: int, run: int = 1 << 16) -> int:
  """Returns the checksum of elements that follow each other."""
  odd = np.arange(1, 2 * run, 2, dtype=np.uint32)
  total = 0
  for first in range(0, bits.size, run):
    part = bits[first : first + run].astype(np.uint32, copy=False)
    total += int(np.dot(part, odd[: part.size]))
    total += 2 * (offset + first) * int(np.sum(part, dtype=np.uint64))
  return total & 0xFFFFFFFF


def _strides(shape: Sequence[int]) -> list[int]:
  return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def signed(entry: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with a checksum of itself."""
  return {**entry, _SIGNATURE: _digest(entry)}


def check_signed(entry: Mapping[str, Any], where: str) -> None:
  """Raises DamagedError unless the object is as it was signed; what older versions wrote is not."""
  if _SIGNATURE in entry and entry[_SIGNATURE] != _digest(entry):
    raise DamagedError(f'{where} is not as it was written')


def _digest(entry: Mapping[str, Any]) -> str:
  rest = {name: value for name, value in entry.items() if name != _SIGNATURE}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def of_files(directory: epath.Path, prefix: str) -> dict[str, str]:
  """Returns the SHA-256 of the files whose names begin so, by name."""
  return {
    path.name: of_file(path)
    for path in sorted(directory.iterdir())
    if path.name.startswith(prefix) and path.is_file()
  }


def of_file(path: epath.Path) -> str:
  """Returns the SHA-256 of a file."""
  return hashlib.sha256(path.read_bytes()).hexdigest()


def check_files(directory: epath.Path, digests: Mapping[str, str]) -> None:
  """Raises DamagedError unless the files are there as they were written."""
  for path in map(directory.joinpath, digests):
    if not path.exists() or of_file(path) != digests[path.name]:
      raise DamagedError(f'{path} is {"not as it was written" if path.exists() else "missing"}')
