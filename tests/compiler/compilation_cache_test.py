"""Programs are kept where they may be, and nothing there can stop a run."""

import os
import subprocess
import sys

import jax
import pytest

from t5x_lite.compiler import compilation_cache

# Compiles a program, says whether it was found, and computes with it.
PROGRAM = """
import jax, jax.numpy as jnp
from t5x_lite.compiler import compilation_cache
assert compilation_cache.keep_compiled_programs()
assert not compilation_cache.keep_compiled_programs()  # decided
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event.split('/')[-1]))
x = jnp.full((64, 64), 0.5)
print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(x)), 'cache_hits' in found)
"""


@pytest.fixture
def config(monkeypatch):
  """JAX as it is where nobody has set a folder."""
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  yield jax.config
  jax.config.update('jax_compilation_cache_dir', before)
  jax.config.update('jax_enable_compilation_cache', True)


def test_one_process_keeps_them_in_the_users_folder(config, tmp_path):
  folder = compilation_cache.keep_compiled_programs({'XDG_CACHE_HOME': str(tmp_path)})
  assert folder.startswith(str(tmp_path / 't5x_lite'))
  assert os.stat(folder).st_mode & 0o777 == 0o700  # whoever writes there runs code
  assert config.jax_compilation_cache_dir == folder


def test_several_processes_have_none(config, monkeypatch):
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  assert compilation_cache.keep_compiled_programs({}) == ''
  assert config.jax_compilation_cache_dir is None


def test_the_user_decides(config, tmp_path):
  keep = compilation_cache.keep_compiled_programs
  for value in ('', 'elsewhere'):  # an empty one switches it off
    assert not keep({'XDG_CACHE_HOME': str(tmp_path), 'JAX_COMPILATION_CACHE_DIR': value})
  jax.config.update('jax_enable_compilation_cache', False)
  assert not keep({'XDG_CACHE_HOME': str(tmp_path)})
  assert config.jax_compilation_cache_dir is None
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_left_alone(config, tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  keep = compilation_cache.keep_compiled_programs
  assert keep({'XDG_CACHE_HOME': str(tmp_path / 'file')}) == ''
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  assert keep({'XDG_CACHE_HOME': str(tmp_path)}) == ''
  assert config.jax_compilation_cache_dir is None


def test_the_oldest_programs_make_room(config, tmp_path, monkeypatch):
  environ = {'XDG_CACHE_HOME': str(tmp_path)}
  folder = compilation_cache.keep_compiled_programs(environ)
  for i in range(5):
    path = f'{folder}/{i}-cache'
    with open(path, 'wb') as file:
      file.write(b'0' * 10)
    os.utime(path, (i, i))
  monkeypatch.setattr(compilation_cache, 'MAX_BYTES', 30)
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.keep_compiled_programs(environ)
  assert sorted(os.listdir(folder)) == ['2-cache', '3-cache', '4-cache']


def test_a_damaged_program_is_compiled_again(tmp_path):
  env = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  env['XDG_CACHE_HOME'] = str(tmp_path)

  def run() -> str:
    command = [sys.executable, '-c', PROGRAM]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

  total, found = run().split()
  assert found == 'False'
  assert run().split() == [total, 'True']
  for path in tmp_path.rglob('*-cache'):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
  assert run().split() == [total, 'False']
