"""Compares a checkpoint of ours on disk with the checksums it was saved with.

On the first process alone, block by block, before any of it is used. It costs one more reading of
the files, which the restore then finds in the page cache.
"""

import concurrent.futures
import errno
import json
import os
from typing import Any

from etils import epath

from t5x_lite.errors import DamagedError, first_line
from t5x_lite.interop import zarr
from t5x_lite.interop.tensors import Tensor, blocks
from t5x_lite.parallel import checksums
from t5x_lite.runs.files import retried

_THREADS = 4
_PART = 1 << 24  # elements that a thread has in memory at a time
_ITEMS = '_CHECKPOINT_METADATA'
# Errors that say nothing of what is in a file.
_ELSEWHERE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def verify(step: str, prefix: str = '') -> None:
  """Checks one STEP directory; DamagedError names what is missing or changed.

  Checkpoints of earlier versions, and of other programs, have no checksums and pass if their arrays
  can be opened. With a prefix such as 'params.' only arrays whose names begin so are compared.
  """
  root = epath.Path(step)
  try:
    text = retried(root, (root / _ITEMS).read_text)
    items = json.loads(text).get('item_handlers', {})
  except (OSError, ValueError, AttributeError) as error:
    raise DamagedError(f'{root / _ITEMS} is missing or damaged') from error
  for item in items:
    if not (root / item).is_dir():
      raise DamagedError(f'{root / item} is missing')
  saved = read_meta(root).get('checksums') or {}
  try:
    stored = zarr.orbax_tensors(root / 'state', zarr.Reader())
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


def read_meta(root: epath.Path) -> dict[str, Any]:
  """Returns the meta item of a step, empty if it never had one; DamagedError if it was changed."""
  if not (root / 'meta').is_dir():
    return {}
  path = root / 'meta' / 'metadata'
  try:
    meta = json.loads(retried(path, path.read_text))
  except (OSError, ValueError) as error:
    raise DamagedError(f'{path} is missing or damaged') from error
  if not isinstance(meta, dict):
    raise DamagedError(f'{path} is damaged')
  checksums.check_signed(meta, os.fspath(path))
  return meta


def _checksum(tensor: Tensor) -> int:
  parts = blocks(tensor.shape, _PART)
  sums = (checksums.of_part(tensor.read(index), tensor.shape, index) for index in parts)
  return sum(sums) & 0xFFFFFFFF
