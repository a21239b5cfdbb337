"""Keeps compiled programs for the next start: JAX's persistent compilation cache, on by default."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from t5x_lite.parallel import host_memory

MAX_BYTES = 2 * 2**30  # of a user's programs; the oldest go first


def keep_compiled_programs(environ: Mapping[str, str] = os.environ) -> str:
  """Turns the cache on and returns its folder; '' if JAX's settings decide, or it cannot be.

  It is $XDG_CACHE_HOME/t5x_lite, for all runs; several processes have none, unless JAX is told.
  Programs for CPUs are kept apart by processor, which JAX does not look at.
  """
  config: Any = jax.config
  decided = 'JAX_COMPILATION_CACHE_DIR' in environ or config.jax_compilation_cache_dir is not None
  if decided or not config.jax_enable_compilation_cache or jax.distributed.is_initialized():
    return ''
  kind = _processor() if host_memory.computes_on_cpu(environ) else 'accelerator'
  caches = environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  folder = os.path.join(caches, 't5x_lite', kind)
  with contextlib.suppress(OSError):
    os.makedirs(folder, mode=0o700, exist_ok=True)
    total = 0
    for path in sorted(pathlib.Path(folder).iterdir(), key=os.path.getmtime, reverse=True):
      if (total := total + path.stat().st_size) > MAX_BYTES:
        path.unlink(missing_ok=True)
  if not os.access(folder, os.W_OK):
    return ''
  config.update('jax_compilation_cache_dir', folder)
  return folder


def _processor() -> str:
  """Names the instructions that there are, on which machine code depends."""
  file = pathlib.Path('/proc/cpuinfo')
  lines = file.read_text().splitlines() if file.exists() else []
  found = {line for line in lines if line.startswith(('flags', 'Features'))}
  return 'cpu-' + hashlib.sha256(str(sorted(found)).encode()).hexdigest()[:12]
