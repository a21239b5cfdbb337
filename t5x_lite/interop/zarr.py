"""Zarr arrays of T5X, Orbax and our own checkpoints, through TensorStore."""

import concurrent.futures
import errno
import functools
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from t5x_lite.errors import DamagedError, UsageError, first_line, refusing
from t5x_lite.interop.tensors import Index, Tensor, blocks
from t5x_lite.parallel import checksums
from t5x_lite.runs import checkpoints, files

CHUNK_BYTES = 64 << 20  # as T5X: large enough for object stores, small enough to be read in parts
_CHECKED = 1 << 24  # elements in memory of each thread that verifies
_THREADS = 4

METADATA = '_METADATA'
_ZARRAY = '.zarray'
_OCDBT = 'manifest.ocdbt'
ITEMS = '_CHECKPOINT_METADATA'
# Errors that say nothing of what is in a file.
_ELSEWHERE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


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
    self._whole = functools.lru_cache(maxsize=1)(lambda array: array.read().result())

  def tensor(self, kvstore: Any, name: str, *, complete: bool = False, **more: Any) -> Tensor:
    """Opens the array in a TensorStore kvstore, with more members of its spec: its metadata, say.

    It is complete if chunks of zeros are stored too, so that one that is missing was lost. Raises
    UsageError with its name, here or when it is read, if it is not there or damaged.
    """
    spec = {'driver': 'zarr', 'kvstore': kvstore, 'fill_missing_data_reads': not complete, **more}
    with refusing(f'cannot read {name}', ValueError, OSError):
      options = {'open': True, 'read': True, 'assume_metadata': 'metadata' in more}
      array = ts.open(spec, **options).result()

    def fetch(index: Index) -> np.ndarray:
      with refusing(f'cannot read {name}', ValueError, OSError):
        if _is_wasteful(array, index):
          return self._whole(array)[index]
        return np.asarray(array[index].read().result())

    return Tensor(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), fetch, name)


def _is_wasteful(array: Any, index: Index) -> bool:
  """True if the chunks that are touched hold twice what is asked for."""
  asked = decoded = 1
  chunks = array.chunk_layout.read_chunk.shape or ()
  for part, size, chunk in zip(index, array.shape, chunks, strict=False):
    start, stop, _ = part.indices(size)
    if stop <= start:
      return False
    asked *= stop - start
    first, last = start // chunk, -(-stop // chunk)
    decoded *= min(size, last * chunk) - first * chunk
  return decoded >= 2 * asked


def file_tensor(directory: epath.Path, name: str, reader: Reader) -> Tensor:
  """Opens an array that has a directory of its own; for the rest see `Reader.tensor`."""
  if not (directory / _ZARRAY).exists():
    raise UsageError(f'cannot read {name}: {directory} has no {_ZARRAY}')
  return reader.tensor(f'{url(directory)}/', name)


def orbax_tensors(directory: epath.Path, reader: Reader) -> dict[str, Tensor]:
  """Opens all arrays of an Orbax item, of either layout, by its names: keys joined by dots."""
  file = directory / METADATA
  with refusing(f'{file} is not JSON', ValueError):
    entry = json.loads(file.read_text()) if file.is_file() else {}
  complete = bool(entry.get('store_array_data_equal_to_fill_value'))  # chunks of zeros as well
  if (directory / _OCDBT).exists():
    all_of_it = {'driver': 'ocdbt', 'base': f'{url(directory)}/'}
    keys = sorted(key.decode() for key in ts.KvStore.open(all_of_it).result().list().result())
    names = [key.removesuffix(f'/{_ZARRAY}') for key in keys if key.endswith(f'/{_ZARRAY}')]
    stores: dict[str, Any] = {name: {**all_of_it, 'path': f'{name}/'} for name in names}
  else:
    paths = [path for path in sorted(directory.iterdir()) if (path / _ZARRAY).exists()]
    stores = {path.name: f'{url(path)}/' for path in paths}
  return {name: reader.tensor(store, name, complete=complete) for name, store in stores.items()}


def chunk_shape(shape: Sequence[int], itemsize: int, *, whole_dims: int = 0) -> list[int]:
  """Returns chunks of at most CHUNK_BYTES, cut along the leading dims; of one along whole_dims."""
  chunk = [1] * whole_dims + list(shape[whole_dims:])
  for dim in range(whole_dims, len(shape)):
    rest = int(np.prod(chunk)) * itemsize
    if rest <= CHUNK_BYTES:
      break
    chunk[dim] = max(1, chunk[dim] * CHUNK_BYTES // rest)
  return [max(1, size) for size in chunk]


def create(path: str, shape: Sequence[int], dtype: np.dtype, chunks: Any, compressor: Any) -> Any:
  """Creates an array; write to it by assigning to parts of it."""
  metadata = {'shape': list(shape), 'chunks': list(chunks), 'compressor': dict(compressor)}
  # A chunk of zeros is stored too, so that one that is missing was lost.
  options = {'metadata': metadata, 'store_data_equal_to_fill_value': True}
  spec = {'driver': 'zarr', 'kvstore': f'{url(path)}/', 'dtype': dtype.name, **options}
  return ts.open(spec, create=True, context=_UNSYNCED).result()


def write(
  path: str, parts: Sequence[Tensor], dtype: np.dtype, compressor: Any, axis: int | None = None
) -> tuple[Any, int]:
  """Writes an array, or its layers along `axis`, part by part; returns it and its checksum.

  That of layers along another axis than the first is 0: their elements do not follow each other.
  """
  shape = list(parts[0].shape)
  if axis is None:
    chunks = chunk_shape(shape, dtype.itemsize)
  else:
    first, *chunks = chunk_shape([len(parts), *shape], dtype.itemsize, whole_dims=1)
    shape.insert(axis, len(parts))
    chunks.insert(axis, first)
  array, total = create(path, shape, dtype, chunks, compressor), 0
  for layer, part in enumerate(parts):
    for index in blocks(part.shape):
      block, where = part.read(index).astype(dtype, copy=False), list(index)
      if axis is not None:
        block = np.expand_dims(block, axis)
        where.insert(axis, slice(layer, layer + 1))
      array[tuple(where)].write(block).result()
      total += 0 if axis else checksums.of_part(block, shape, where)
  return array, total & 0xFFFFFFFF


# Not each file is forced to the disk: the directory gets its name only when all are written, and a
# power cut in between costs a conversion, not a run.
_UNSYNCED = ts.Context({'file_io_sync': False})

ORBAX_COMPRESSOR = {'id': 'zstd', 'level': 1}


def orbax_metadata(shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> str:
  """Returns the _METADATA of an Orbax item of plain nested dicts, given shapes by the arrays' keys.

  As orbax/checkpoint/_src/metadata/tree.py 0.12 writes it with use_ocdbt=False; older ones read it.
  """
  tree = {}
  for keys, shape in shapes.items():
    value = {'value_type': 'jax.Array', 'skip_deserialize': False, 'write_shape': list(shape)}
    named = [{'key': key, 'key_type': 2} for key in keys]
    tree[str(keys)] = {'key_metadata': named, 'value_metadata': value}
  options = {'use_ocdbt': False, 'use_zarr3': False, 'store_array_data_equal_to_fill_value': True}
  return json.dumps({'tree_metadata': tree, **options, 'custom_metadata': None})


def verify(step: str, prefix: str = '') -> None:
  """Compares a STEP directory of ours with its checksums; DamagedError names what is not the same.

  Block by block, before any of it is used: one more reading of the files, which the restore then
  finds in the page cache.
  With a prefix such as 'params.' only arrays whose names begin so are compared.
  """
  root = epath.Path(step)
  try:
    text = files.retried(root, (root / ITEMS).read_text)
    items = json.loads(text).get('item_handlers', {})
  except (OSError, ValueError, AttributeError) as error:
    raise DamagedError(f'{root / ITEMS} is missing or damaged') from error
  for item in items:
    if not (root / item).is_dir():
      raise DamagedError(f'{root / item} is missing')
  saved = checkpoints.read_meta(root)['checksums']
  try:
    stored = orbax_tensors(root / 'state', Reader())
    names = sorted(name for name in saved.keys() & stored.keys() if name.startswith(prefix))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      sums = list(pool.map(lambda name: _checksum(stored[name]), names))
  except (OSError, ValueError) as error:
    if getattr(error, 'errno', None) in _ELSEWHERE:
      raise
    raise DamagedError(f'{root} cannot be read: {first_line(error)}') from error
  if lost := sorted(saved.keys() - stored.keys()):
    raise DamagedError(f'{root / "state"} has lost {lost[0]}')
  for name, total in zip(names, sums, strict=True):
    if total != saved[name]:
      raise DamagedError(f'{name} in {root} is not as it was written')


def _checksum(tensor: Tensor) -> int:
  parts = blocks(tensor.shape, _CHECKED)
  sums = (checksums.of_part(tensor.read(index), tensor.shape, index) for index in parts)
  return sum(sums) & 0xFFFFFFFF
