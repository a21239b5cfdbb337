"""Zarr arrays of T5X, Orbax and our own checkpoints, through TensorStore."""

import json
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.interop.tensors import Index, Tensor

# As T5X: large enough for object stores, small enough to be read in parts.
CHUNK_BYTES = 64 << 20

METADATA = '_METADATA'
_ZARRAY = '.zarray'
_OCDBT = 'manifest.ocdbt'


def url(path: str | os.PathLike) -> str:
  """Returns a path as TensorStore's URL, without a slash at its end."""
  path = os.fspath(path).rstrip('/')
  return path if '://' in path else f'file://{urllib.parse.quote(os.path.abspath(path))}'


class Reader:
  """Reads the arrays of one checkpoint.

  The last array whose chunks hold much more than was asked for is kept, so that reading a scanned
  model layer by layer decodes each array once.
  """

  def __init__(self):
    self._last: tuple[str, np.ndarray] | None = None

  def tensor(self, spec: Mapping[str, Any], name: str, **options: Any) -> Tensor:
    """Opens an array.

    Args:
      spec: of TensorStore, without a context.
      name: for messages.
      **options: of tensorstore.open.

    Raises:
      UsageError: if it is not there or damaged.
    """
    try:
      array = ts.open(dict(spec), open=True, read=True, **options).result()
    except (ValueError, OSError) as error:
      raise UsageError(f'cannot read {name}: {_line(error)}') from error
    dtype = np.dtype(array.dtype.numpy_dtype)
    return Tensor(tuple(array.shape), dtype, self._fetch(array, name), name)

  def _fetch(self, array: Any, name: str) -> Callable[[Index], np.ndarray]:
    def fetch(index: Index) -> np.ndarray:
      last = self._last  # another thread may replace it
      if last is not None and last[0] == name:
        return last[1][index]
      try:
        if _is_wasteful(array, index):
          whole = np.asarray(array.read().result())
          self._last = (name, whole)
          return whole[index]
        return np.asarray(array[index].read().result() if index else array.read().result())
      except (ValueError, OSError) as error:
        raise UsageError(f'cannot read {name}: {_line(error)}') from error

    return fetch


def _is_wasteful(array: Any, index: Index) -> bool:
  """True if the chunks that are touched hold twice what is asked for."""
  asked = decoded = 1
  for part, size, chunk in zip(
    index, array.shape, array.chunk_layout.read_chunk.shape or (), strict=False
  ):
    start, stop, _ = part.indices(size)
    if stop <= start:
      return False
    asked *= stop - start
    first, last = start // chunk, -(-stop // chunk)
    decoded *= min(size, last * chunk) - first * chunk
  return decoded >= 2 * asked


def _line(error: Exception) -> str:
  """Returns the first line of TensorStore's long messages."""
  return str(error).splitlines()[0][:300]


def file_tensor(
  directory: epath.Path, name: str, reader: Reader, *, complete: bool = False
) -> Tensor:
  """Opens an array that has a directory of its own.

  Args:
    directory: where.
    name: for messages.
    reader: of the checkpoint.
    complete: chunks of zeros are stored too, so one that is missing was lost.

  Raises:
    UsageError: if it is not there or damaged.
  """
  if not (directory / _ZARRAY).exists():
    raise UsageError(f'cannot read {name}: {directory} has no {_ZARRAY}')
  spec = {'driver': 'zarr', 'kvstore': f'{url(directory)}/'}
  return reader.tensor({**spec, 'fill_missing_data_reads': not complete}, name)


def orbax_tensors(directory: epath.Path, reader: Reader) -> dict[str, Tensor]:
  """Opens all arrays of an Orbax item, one store or a directory an array.

  Returns:
    Tensors by Orbax's names: the tree's keys joined by dots.
  """
  complete = _stores_zeros(directory)
  if not (directory / _OCDBT).exists():
    return {
      child.name: file_tensor(child, child.name, reader, complete=complete)
      for child in sorted(directory.iterdir())
      if (child / _ZARRAY).exists()
    }
  store = {'driver': 'ocdbt', 'base': f'{url(directory)}/'}
  listing = ts.KvStore.open(store).result().list().result()
  suffix = f'/{_ZARRAY}'.encode()
  result = {}
  for key in sorted(listing):
    if key.endswith(suffix):
      name = key[: -len(suffix)].decode()
      spec = {
        'driver': 'zarr',
        'kvstore': {**store, 'path': f'{name}/'},
        'fill_missing_data_reads': not complete,
      }
      result[name] = reader.tensor(spec, name)
  return result


def _stores_zeros(directory: epath.Path) -> bool:
  """True if an Orbax item says that chunks of zeros are stored as well."""
  file = directory / METADATA
  if not file.is_file():
    return False
  try:
    entry = json.loads(file.read_text())
  except ValueError as error:
    raise UsageError(f'{file} is not JSON: {error}') from error
  return bool(entry.get('store_array_data_equal_to_fill_value'))


# ---- Writing ----------------------------------------------------------------


def chunk_shape(shape: Sequence[int], itemsize: int, *, whole_dims: int = 0) -> list[int]:
  """Returns chunks of at most CHUNK_BYTES, cut along the leading dims.

  Args:
    shape: of the array.
    itemsize: bytes an element.
    whole_dims: leading dims with chunks of one, such as that of the layers.
  """
  chunk = [1] * whole_dims + list(shape[whole_dims:])
  for dim in range(whole_dims, len(shape)):
    rest = int(np.prod(chunk)) * itemsize
    if rest <= CHUNK_BYTES:
      break
    chunk[dim] = max(1, chunk[dim] * CHUNK_BYTES // rest)
  return [max(1, size) for size in chunk]


def create(
  path: str,
  shape: Sequence[int],
  dtype: np.dtype,
  chunks: Sequence[int],
  compressor: Mapping[str, Any],
) -> Any:
  """Creates an array; write to it by assigning to parts of it."""
  spec = {
    'driver': 'zarr',
    'kvstore': f'{url(path)}/',
    'dtype': dtype.name,
    # A chunk of zeros is stored too, so that one that is missing was lost.
    'store_data_equal_to_fill_value': True,
    'metadata': {'shape': list(shape), 'chunks': list(chunks), 'compressor': dict(compressor)},
  }
  return ts.open(spec, create=True, context=_UNSYNCED).result()


# Not each file is forced to the disk: the directory gets its name only when all are written, and a
# power cut in between costs a conversion, not a run.
_UNSYNCED = ts.Context({'file_io_sync': False})

ORBAX_COMPRESSOR = {'id': 'zstd', 'level': 1}


def orbax_metadata(names: Mapping[tuple[str, ...], tuple[int, ...]]) -> str:
  """Returns the _METADATA of an Orbax item of plain nested dicts.

  Args:
    names: shape of each array by its keys.

  Source: orbax/checkpoint/_src/metadata/tree.py, the form that version 0.12 writes with
  use_ocdbt=False and earlier ones read.
  """
  tree = {
    str(keys): {
      'key_metadata': [{'key': key, 'key_type': 2} for key in keys],
      'value_metadata': {
        'value_type': 'jax.Array',
        'skip_deserialize': False,
        'write_shape': list(shape),
      },
    }
    for keys, shape in names.items()
  }
  return json.dumps(
    {
      'tree_metadata': tree,
      'use_ocdbt': False,
      'use_zarr3': False,
      'store_array_data_equal_to_fill_value': True,
      'custom_metadata': None,
    }
  )
