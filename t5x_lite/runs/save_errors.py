"""What becomes of a write that fails: one line, and nothing lost before it."""

import errno
import logging
import os
import shutil
from typing import Any

import jax
from etils import epath

# Orbax logs a failed write with a traceback for each thread, and raises it: SaveError says it once.
logging.getLogger('absl').addFilter(
  lambda record: not (record.exc_info and 'orbax' in record.pathname)
)


class SaveError(RuntimeError):
  """A checkpoint could not be written; those before it are whole."""

  exit_code = 7
  exit_at_once = True  # Orbax's threads would complain at length


def check_space(directory: epath.Path, tree: Any) -> None:
  """Raises OSError(ENOSPC) where arrays cannot fit, before Orbax's threads fail one by one.

  Of a directory that is not on a local file system nothing is known.
  """
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
  text = str(error)
  for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
    if os.strerror(code) in text:
      return os.strerror(code)
  return (text.splitlines() or [type(error).__name__])[0][:200]
