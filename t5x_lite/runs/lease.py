"""Keeps a second run out of a run directory, on this machine or on another.

On one machine the operating system's lock decides, and lets go of a killed run
at once. Other machines may share the file system without locks, and object
stores have none, so the run also keeps a lease there: MODEL_DIR/.lease says who
holds it and is renewed while it works. How old it is goes by the file system's
own clock, so the machines' clocks need not agree.

Two runs that begin at the same moment may both see no lease. The one whose
lease was written over stops before its next checkpoint.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.runs import files
from t5x_lite.runs.files import retried

log = logging.getLogger(__name__)

LEASE_FILE = '.lease'
_LOCK_FILE = '.lock'
RENEWAL = 10.0  # seconds between two signs of life
EXPIRY = 60.0  # after which a silent holder counts as dead


class LeaseLostError(RuntimeError):
  """Another run has taken the directory over; this one must not write there."""

  exit_code = 5


class Lease:
  """The lease that this process holds."""

  def __init__(self, model_dir: str):
    """Prepares it; nothing is written yet."""
    self._path = epath.Path(model_dir) / LEASE_FILE
    self._entry: dict[str, Any] = {
      'host': socket.gethostname(),
      'boot': _boot_id(),
      'pid': os.getpid(),
      'token': uuid.uuid4().hex,
    }
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._renew, name='lease', daemon=True)

  def take(self, *, locked: bool) -> None:
    """Writes the lease, and renews it from now on.

    Args:
      locked: this process has the machine's lock, so that whoever held a lease
        on this machine is dead.

    Raises:
      UsageError: if a run on another machine holds it.
    """
    found = self._read()
    here = all(found.get(name) == self._entry[name] for name in ('host', 'boot'))
    if not (locked and here):
      self._wait_for(found)
    self._write()
    self._thread.start()

  def _wait_for(self, first: dict[str, Any]) -> None:
    """Returns once the lease that was found has expired."""
    found, told = first, False
    while found and (age := self._age()) < EXPIRY:
      holder = f'process {found.get("pid")} on {found.get("host")}'
      if found != first:
        raise UsageError(
          f'another run is training in {self._path.parent}: {holder}, last seen {age:.0f} s ago: '
          'wait for it, stop it, or use another model_dir'
        )
      if not told:
        log.warning(
          '%s is held by %s, last seen %.0f s ago: taken over if nothing is heard for %.0f s more',
          *(self._path.parent, holder, age, EXPIRY - age),
        )
        told = True
      time.sleep(RENEWAL / 10)
      found = self._read()

  def _age(self) -> float:
    """Seconds since the lease was renewed, by the file system's clock."""
    probe = self._path.parent / f'{LEASE_FILE}.{self._entry["token"][:8]}'
    retried(probe, lambda: probe.write_text(''))
    now = _changed(probe)
    probe.unlink()
    try:
      return now - _changed(self._path)
    except FileNotFoundError:
      return EXPIRY

  def _read(self) -> dict[str, Any]:
    """Returns what the lease says; {} if there is none."""
    try:
      entry = json.loads(retried(self._path, self._path.read_text))
    except FileNotFoundError:
      return {}
    except ValueError:
      entry = None
    return entry if isinstance(entry, dict) else {'host': 'an unknown machine'}

  def _write(self) -> None:
    files.write_json(self._path, {**self._entry, 'time': round(time.time(), 3)})

  def _renew(self) -> None:
    while not self._ended.wait(RENEWAL):
      try:
        self.check()
        self._write()
      except LeaseLostError as error:
        log.error('%s', error)
        return
      except OSError as error:
        log.warning('%s was not renewed: %s', self._path, error.strerror)

  def check(self) -> None:
    """Raises LeaseLostError if another run has taken the directory over."""
    found = self._read()
    if found.get('token', self._entry['token']) != self._entry['token']:
      raise LeaseLostError(
        f'process {found.get("pid")} on {found.get("host")} has taken over '
        f'{self._path.parent}: stopped before writing there'
      )

  def release(self) -> None:
    """Ends the renewal; the next run need not wait."""
    self._ended.set()
    self._thread.join()
    if self._read().get('token') == self._entry['token']:
      self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(model_dir: str) -> Iterator[Lease]:
  """Keeps a second run out of a directory while this one works there.

  Yields:
    The lease; to be checked before something is written that matters.

  Raises:
    UsageError: if another process holds the directory.
  """
  epath.Path(model_dir).mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    locked = '://' not in model_dir and _lock_here(model_dir, stack)
    lease = Lease(model_dir)
    lease.take(locked=locked)
    stack.callback(lease.release)
    yield lease


def _boot_id() -> str:
  """Tells machines apart that have the same name, as containers do."""
  with contextlib.suppress(OSError), open('/proc/sys/kernel/random/boot_id') as file:
    return file.read().strip()
  return ''


def _changed(path: epath.Path) -> float:
  """Returns when a file was written, by the clock of whoever keeps it."""
  place = os.fspath(path)
  return path.stat().mtime if '://' in place else os.path.getmtime(place)


def _lock_here(model_dir: str, stack: contextlib.ExitStack) -> bool:
  """Takes the operating system's lock; it ends with the process.

  Returns:
    False where the file system has no locks.
  """
  import fcntl

  file = stack.enter_context(open(os.path.join(model_dir, _LOCK_FILE), 'w'))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UsageError(
      f'another run is training in {model_dir}: wait for it, stop it, or use another model_dir'
    ) from error
  except OSError as error:
    log.warning('%s has no file locks (%s): a lease alone keeps others out', model_dir, error)
    return False
  return True
