"""A run's small files: whole or not there, and tried again.

Network file systems hang and recover; what is written here waits for them.
"""

import errno
import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from etils import epath

log = logging.getLogger(__name__)

T = TypeVar('T')

# What may be gone at the next try; a full disk or a missing permission stays, and is told at once.
TRANSIENT = frozenset(
  {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET, errno.EREMOTEIO}
)
_DELAYS = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds before each new try


def retried(what: object, call: Callable[..., T], *args: Any) -> T:
  """Returns what `call(*args)` returns; it must bear being called again.

  The log says what it was, such as a path.

  Raises:
    OSError: the last of them, if waiting did not help; at once if it cannot.
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


def write_text(path: epath.Path, text: str) -> None:
  """Writes all of the file or nothing: a run may be killed at any moment."""
  temporary = path.parent / (path.name + '.tmp')

  def write() -> None:
    temporary.write_text(text)
    temporary.replace(path)

  retried(path, write)


def write_json(path: epath.Path, value: Any) -> None:
  """The same of a value as JSON."""
  write_text(path, json.dumps(value, indent=2) + '\n')
