"""Freed memory comes back without page faults, and only where it should."""

import os
import subprocess
import sys

import pytest

from t5x_lite.parallel import host_memory

# Two rounds of 256 MB in a thread, as XLA:CPU does it; prints page faults.
SCRIPT = """
import concurrent.futures, ctypes, resource, sys
from t5x_lite.parallel import host_memory
if sys.argv[1] == 'keep':
  assert host_memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def once():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(ctypes.c_size_t(2**28))
  ctypes.memset(block, 1, 2**28)
  libc.free(ctypes.c_void_p(block))
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with concurrent.futures.ThreadPoolExecutor(1) as pool:
  print(pool.submit(once).result(), pool.submit(once).result())
"""


# The command line, and what it made of the question; then a usage error.
PROGRAM = """
import sys
from t5x_lite import main
from t5x_lite.parallel import host_memory
keep = host_memory.keep_freed_memory
host_memory.keep_freed_memory = lambda: print(keep())
main.main(sys.argv[1:])
"""


def run(script: str, *argv: str) -> list[str]:
  """Returns the words that a fresh process printed."""
  env = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
  env.pop('GLIBC_TUNABLES', None)
  done = subprocess.run(
    [sys.executable, '-c', script, *argv],
    env={**env, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.split()


def faults(mode: str) -> tuple[int, int]:
  # A thread allocates: the second heap of a process cannot grow that large.
  first, second = map(int, run(SCRIPT, mode))
  return first, second


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_second_step_finds_its_memory():
  first, second = faults('keep')
  assert first > 50  # pages may be of 2 MB
  assert second < 10


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_glibc_alone_gives_it_back():
  _, second = faults('leave')
  assert second > 50


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_the_command_line_is_early_enough():
  assert run(PROGRAM, 'infer') == ['True']


def test_programs_that_do_not_compute_leave_it():
  assert run(PROGRAM, 'convert', 'nowhere', 'nowhere2') == []


class AskedLibcError(Exception):
  """Nothing spoke against changing malloc."""


@pytest.fixture
def alone(monkeypatch):
  """A process without threads, which xdist's workers are not."""

  def refuse(name):
    raise AskedLibcError

  monkeypatch.setattr(host_memory.sys, 'platform', 'linux')
  monkeypatch.setattr(host_memory.threading, 'active_count', lambda: 1)
  monkeypatch.setattr(host_memory.ctypes, 'CDLL', refuse)


@pytest.mark.parametrize(
  'environ',
  [
    {'JAX_PLATFORMS': 'cuda'},
    {'JAX_PLATFORMS': 'tpu,cpu'},
    {'JAX_PLATFORMS': 'cpu', 'MALLOC_ARENA_MAX': '8'},
  ],
)
def test_left_alone(alone, environ):
  assert not host_memory.keep_freed_memory(environ)


def test_left_alone_only_for_a_reason(alone, monkeypatch):
  with pytest.raises(AskedLibcError):
    host_memory.keep_freed_memory({'JAX_PLATFORMS': 'cpu'})
  monkeypatch.setattr(host_memory.threading, 'active_count', lambda: 2)
  assert not host_memory.keep_freed_memory({'JAX_PLATFORMS': 'cpu'})


def test_computes_on_cpu(monkeypatch):
  assert host_memory.computes_on_cpu({'JAX_PLATFORMS': 'cpu'})
  monkeypatch.setattr(host_memory.glob, 'glob', lambda pattern: [])
  assert host_memory.computes_on_cpu({})
  monkeypatch.setattr(host_memory.glob, 'glob', lambda pattern: ['/dev/accel0'])
  assert not host_memory.computes_on_cpu({})
  assert host_memory.computes_on_cpu({'JAX_PLATFORMS': 'cpu'})
