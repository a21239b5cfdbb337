"""Keeps a second run out of a run directory, on this machine or on another.

On one machine the operating system's lock decides, and ends with the process. Other machines may
share the file system without locks, and object stores have none: there MODEL_DIR/.lease says who
holds the directory, and is renewed; its age goes by the file system's clock. Of two runs that begin
at the same moment, the one whose lease was written over stops before its next checkpoint.
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
from t5x_lite.runs.files import retried, write_json

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
      'machine': uuid.getnode(),  # containers may all have one name
      'pid': os.getpid(),
      'token': uuid.uuid4().hex,
    }
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._renew, name='lease', daemon=True)

  def take(self, *, locked: bool) -> None:
    """Writes and renews the lease, once its holder is dead; one here is, if we have the lock."""
    found = first = self._read()
    here = all(found.get(name) == self._entry[name] for name in ('host', 'machine'))
    while found and not (locked and here) and (age := self._age()) < EXPIRY:
      holder = _holder(found)
      if found != first:  # it is alive
        fix = f'{holder}, last seen {age:.0f} s ago: wait for it, stop it, or use another model_dir'
        raise UsageError(f'another run is training in {self._path.parent}: {fix}')
      log.warning('%s is held by %s, last seen %.0f s ago: waiting', self._path, holder, age)
      time.sleep(RENEWAL / 2)
      found = self._read()
    self._write()
    self._thread.start()

  def _age(self) -> float:
    """Seconds since the lease was renewed, by the file system's clock."""
    probe = self._path.parent / f'{LEASE_FILE}.{self._entry["token"][:8]}'
    retried(probe, probe.write_text, 'what time is it?')
    try:
      return _changed(probe) - _changed(self._path)
    except FileNotFoundError:
      return EXPIRY
    finally:
      probe.unlink()

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
    write_json(self._path, {**self._entry, 'time': round(time.time(), 3)})

  def _renew(self) -> None:
    while not self._ended.wait(RENEWAL):
      try:
        self.check()
        self._write()
      except LeaseLostError:
        return  # `check` tells the run
      except Exception as error:
        log.warning('%s was not renewed: %s', self._path, error)

  def check(self) -> None:
    """Raises LeaseLostError if another run has taken the directory over."""
    found = self._read()
    if found.get('token', self._entry['token']) != self._entry['token']:
      where = self._path.parent
      raise LeaseLostError(f'{_holder(found)} has taken over {where}: stopped before writing there')

  def release(self) -> None:
    """Ends the renewal; the next run need not wait."""
    self._ended.set()
    self._thread.join()
    if self._read().get('token') == self._entry['token']:
      self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(model_dir: str) -> Iterator[Lease]:
  """Keeps a second run out of a directory, by a UsageError; yields the lease, to be checked."""
  epath.Path(model_dir).mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    lease = Lease(model_dir)
    lease.take(locked='://' not in model_dir and _lock_here(model_dir, stack))
    stack.callback(lease.release)
    yield lease


def _holder(found: dict[str, Any]) -> str:
  return f'process {found.get("pid")} on {found.get("host")}'


def _changed(path: epath.Path) -> float:
  """Returns when a file was written, by the clock of whoever keeps it."""
  place = os.fspath(path)
  return path.stat().mtime if '://' in place else os.path.getmtime(place)


def _lock_here(model_dir: str, stack: contextlib.ExitStack) -> bool:
  """Takes the operating system's lock; False where the file system has none."""
  import fcntl

  file = stack.enter_context(open(os.path.join(model_dir, _LOCK_FILE), 'w'))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    fix = 'wait for it, stop it, or use another model_dir'
    raise UsageError(f'another run is training in {model_dir}: {fix}') from error
  except OSError as error:
    log.warning('%s has no file locks (%s): a lease alone keeps others out', model_dir, error)
    return False
  return True
