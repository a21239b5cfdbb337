"""Checksums of arrays, of small JSON files and of files.

An array's is a sum over its elements, so that each device, host or block adds its part, and the
number does not depend on how the array is cut: the bits of each element times an odd number that
depends on its place, modulo 2**32. Any one changed bit changes it, and so does a block moved.
"""

import hashlib
import json
import math
import operator
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
_RUN = 1 << 16  # elements that are summed at a time


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


def of_part(part: np.ndarray, shape: Sequence[int], index: Sequence[slice]) -> int:
  """Returns what a part of an array of this shape adds to its checksum.

  One slice a dim names the part, whose elements follow each other in the array.
  """
  starts = (at.indices(size)[0] for at, size in zip(index, shape, strict=True))
  offset = sum(map(operator.mul, starts, _strides(shape)))
  part = np.ascontiguousarray(part).reshape(-1)
  bits = part.view(_BITS[part.dtype.itemsize])
  odd = np.arange(1, 2 * _RUN, 2, dtype=np.uint32)
  total = 0
  for first in range(0, bits.size, _RUN):  # no array of all their places is needed
    run = bits[first : first + _RUN].astype(np.uint32, copy=False)
    total += int(np.dot(run, odd[: run.size]))
    total += 2 * (offset + first) * int(np.sum(run, dtype=np.uint64))
  return total & 0xFFFFFFFF


def _strides(shape: Sequence[int]) -> list[int]:
  return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def signed(entry: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with a checksum of itself."""
  return {**entry, _SIGNATURE: _digest(entry)}


def read_signed(path: epath.Path) -> dict[str, Any]:
  """Returns the object of a file; DamagedError unless it is there as it was signed."""
  try:
    entry = json.loads(path.read_text())
  except (FileNotFoundError, ValueError) as error:
    raise DamagedError(f'{path} is missing or damaged') from error
  if not isinstance(entry, dict) or entry.get(_SIGNATURE) != _digest(entry):
    raise DamagedError(f'{path} is not as it was written')
  return entry


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
