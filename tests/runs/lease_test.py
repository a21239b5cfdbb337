"""Two runs of one directory: on one machine, and on two that share a disk."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from t5x_lite.errors import UsageError
from t5x_lite.runs import lease

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import sys
from t5x_lite.runs import lease
lease.RENEWAL = 0.2
lease.socket.gethostname = lambda: sys.argv[2]
with lease.lock(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def naps(monkeypatch):
  """Makes waiting short, and returns what was waited."""
  monkeypatch.setattr(lease, 'RENEWAL', 0.2)
  monkeypatch.setattr(lease, 'EXPIRY', 1.5)
  naps = []
  monkeypatch.setattr(lease.time, 'sleep', lambda s, sleep=time.sleep: naps.append(s) or sleep(s))
  return naps


def hold(directory, host):
  """Starts a process that holds the directory under a machine's name."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(directory), host],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  assert process.stdout.readline() == 'held\n'
  return process


def write_foreign(directory, **fields):
  directory.mkdir(parents=True, exist_ok=True)
  entry = {'host': 'node-7', 'machine': 7, 'pid': 4711, 'token': 't', 'time': time.time(), **fields}
  (directory / '.lease.new').write_text(json.dumps(entry))
  (directory / '.lease.new').rename(directory / '.lease')


def test_one_run_at_a_time_on_this_machine(tmp_path):
  with lease.lock(str(tmp_path)):
    with pytest.raises(UsageError, match='another run is training'):
      with lease.lock(str(tmp_path)):
        pass
  with lease.lock(str(tmp_path)) as held:
    held.check()
  assert not (tmp_path / '.lease').exists()


def test_a_killed_process_leaves_the_directory_to_the_next_on_its_machine(tmp_path, naps):
  """At once: the machine's lock says that it is dead, its lease does not."""
  process = hold(tmp_path, lease.socket.gethostname())
  with pytest.raises(UsageError, match='another run is training'):
    with lease.lock(str(tmp_path)):
      pass
  process.kill()
  process.wait()
  assert (tmp_path / '.lease').exists()
  with lease.lock(str(tmp_path)):
    pass
  assert not naps


def test_a_run_on_another_machine_is_named_and_kept_out(tmp_path, monkeypatch):
  """Two processes, where the file system shares files and no locks."""
  process = hold(tmp_path, 'node-7')
  monkeypatch.setattr(lease, '_lock_here', lambda *_: True)  # each machine has its own
  with pytest.raises(UsageError, match=rf'process {process.pid} on node-7, last seen 0 s ago'):
    with lease.lock(str(tmp_path)):
      pass
  assert json.loads((tmp_path / '.lease').read_text())['host'] == 'node-7'

  # It ends as it should: nobody waits.
  process.communicate('')
  assert process.returncode == 0 and not (tmp_path / '.lease').exists()
  with lease.lock(str(tmp_path)):
    pass


def test_a_dead_machines_lease_is_taken_over_when_it_has_expired(tmp_path, naps, caplog):
  process = hold(tmp_path, 'node-7')
  process.kill()
  process.wait()
  with lease.lock(str(tmp_path)) as held:
    held.check()
    assert json.loads((tmp_path / '.lease').read_text())['pid'] == os.getpid()
  assert naps and f'is held by process {process.pid} on node-7' in caplog.text


def test_an_old_lease_costs_no_wait(tmp_path, naps):
  write_foreign(tmp_path)
  os.utime(tmp_path / '.lease', (time.time() - 100, time.time() - 100))
  with lease.lock(str(tmp_path)):
    pass
  assert not naps


def test_clocks_need_not_agree(tmp_path):
  """What counts is when the file changed, not what its writer's clock said."""
  write_foreign(tmp_path, time=time.time() + 10_000)
  os.utime(tmp_path / '.lease', (time.time() - 100, time.time() - 100))
  with lease.lock(str(tmp_path)):
    pass


@pytest.mark.parametrize('content', ['', '[]', '{"host"', '\0'])
def test_a_lease_that_nobody_can_read_counts_until_it_expires(tmp_path, naps, content):
  (tmp_path / '.lease').write_text(content)
  with lease.lock(str(tmp_path)):
    pass
  assert naps


def test_it_is_renewed_while_the_run_works(tmp_path):
  with lease.lock(str(tmp_path)):
    first = (tmp_path / '.lease').read_text()
    end = time.monotonic() + 60
    while (tmp_path / '.lease').read_text() == first:
      assert time.monotonic() < end, 'not renewed'
      time.sleep(0.05)


def test_who_has_lost_it_stops_before_it_writes(tmp_path):
  with lease.lock(str(tmp_path)) as held:
    write_foreign(tmp_path)
    with pytest.raises(lease.LeaseLostError, match='process 4711 on node-7 has taken over'):
      held.check()
    thread = next(t for t in threading.enumerate() if t.name == 'lease')
    thread.join(60)  # nor is it renewed
  assert json.loads((tmp_path / '.lease').read_text())['host'] == 'node-7'


def test_without_locks_the_lease_alone_decides(tmp_path, monkeypatch, caplog):
  import fcntl

  def no_locks(*_):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  process = hold(tmp_path, lease.socket.gethostname())
  with pytest.raises(UsageError, match='last seen'):
    with lease.lock(str(tmp_path)):
      pass
  assert 'has no file locks' in caplog.text
  process.communicate('')
