"""A run's small files: whole or not there, and tried again.

Network file systems hang and recover; what is written here waits for them. A checkpoint that cannot
be written is told in one line, and nothing is lost before it.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from etils import epath

from t5x_lite.errors import first_line

T = TypeVar('T')
log = logging.getLogger(__name__)

# What may be gone at the next try; a full disk or a missing permission stays, and is told at once.
TRANSIENT = frozenset(
  {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET, errno.EREMOTEIO}
)
_DELAYS = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds before each new try

# Orbax logs a failed write with a traceback for each thread, and raises it: SaveError says it once.
logging.getLogger('absl').addFilter(
  lambda record: not (record.exc_info and 'orbax' in record.pathname)
)


def retried(what: object, call: Callable[..., T], *args: Any) -> T:
  """Returns what `call(*args)` returns, which must bear a second call; the log names `what`.

  Raises the last OSError, if waiting did not help; at once if it cannot.
  """
  for delay in _DELAYS:
    try:
      return call(*args)
    except OSError as error:
      if error.errno not in TRANSIENT:
        raise
      log.warning('%s: %s; tried again in %.1f s', what, error.strerror, delay)
    time.sleep(delay)
  return call(*args)


def same(one: str, other: str) -> bool:
  """Whether two paths are one file, which need not be there."""
  there = all(map(os.path.exists, (one, other)))
  return one == other or (there and os.path.samefile(one, other))


def write_text(path: epath.Path, text: str | bytes) -> None:
  """Writes all of the file or nothing: a run may be killed at any moment."""
  # Several cells of a study write one report.
  temporary = path.parent / f'{path.name}.tmp-{os.getpid()}'

  def write() -> None:
    temporary.write_text(text) if isinstance(text, str) else temporary.write_bytes(text)
    temporary.replace(path)

  retried(path, write)


def write_json(path: epath.Path, value: Any) -> None:
  """The same of a value as JSON."""
  write_text(path, json.dumps(value, indent=2) + '\n')


def json_object(text: str) -> dict[str, Any]:
  """Returns the JSON object that a text is; an empty one if it is none, or damaged."""
  with contextlib.suppress(ValueError, RecursionError):
    return found if isinstance(found := json.loads(text), dict) else {}
  return {}


# Made by `scratch`; removed when the process ends.
_SCRATCH: list[tempfile.TemporaryDirectory] = []


def scratch() -> epath.Path:
  """Returns a new folder that lives as long as the process."""
  _SCRATCH.append(tempfile.TemporaryDirectory(prefix='t5x_lite_'))
  return epath.Path(_SCRATCH[-1].name)


class SaveError(RuntimeError):
  """A checkpoint could not be written; those before it are whole."""

  exit_code = 7
  exit_at_once = True  # Orbax's threads would complain at length


def check_space(directory: epath.Path, tree: Any) -> None:
  """Raises OSError(ENOSPC) where arrays cannot fit on a local disk, before Orbax's threads do."""
  if '://' in os.fspath(directory):
    return
  # By half, since arrays are compressed, zeros to nothing.
  needed = sum(array.nbytes for array in jax.tree.leaves(tree)) // 2
  if shutil.disk_usage(directory).free < needed:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cause(error: BaseException) -> str:
  """Returns the reason of a failed write: the file system's, if it is one."""
  found: BaseException | None = error
  while found is not None:
    if isinstance(found, OSError) and found.strerror:
      return found.strerror
    found = found.__cause__ or found.__context__
  codes = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO
  return next((text for text in map(os.strerror, codes) if text in str(error)), first_line(error))
