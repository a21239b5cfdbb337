"""Makes the C library keep freed memory where the CPU computes.

XLA:CPU takes a step's temporaries from malloc and frees them after it. glibc gives such large
blocks back to the kernel, which clears every page anew in the next step: a third of a step of T5
1.1 small on two cores, over half where the pages were not used before (docs/lab_notes.md).
"""

import ctypes
import glob
import os
import sys
import threading
from collections.abc import Mapping

# mallopt's parameters (malloc.h) and what they are set to.
_MALLOPT = (
  (-8, 1),  # M_ARENA_MAX: all threads share one heap; only the first can hold blocks over 64 MB
  (-4, 0),  # M_MMAP_MAX: large blocks are taken from the heap like small ones
  (-1, -1),  # M_TRIM_THRESHOLD: the heap's end is never given back
)

# TPU, TPU v5e and newer, NVIDIA, AMD
_ACCELERATORS = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*', '/dev/kfd')


def computes_on_cpu(environ: Mapping[str, str]) -> bool:
  """Guesses, without starting a JAX backend, whether JAX will use the CPU."""
  if platforms := environ.get('JAX_PLATFORMS', ''):
    return platforms.split(',')[0] == 'cpu'
  return not any(glob.glob(pattern) for pattern in _ACCELERATORS)


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
  """Makes glibc keep what is freed, for the next step; True if it does.

  Call it first: once there are threads, which have heaps of their own, it does nothing; nor where
  an accelerator computes, the C library is not glibc, or the environment sets a MALLOC_ variable
  (MALLOC_ARENA_MAX=8, say, leaves glibc as it is). The price: the process never gets smaller again.
  """
  if sys.platform != 'linux' or not computes_on_cpu(environ) or threading.active_count() > 1:
    return False
  if any(name.startswith('MALLOC_') for name in environ):
    return False
  libc = ctypes.CDLL(None)
  is_glibc = hasattr(libc, 'gnu_get_libc_version')
  return is_glibc and all(libc.mallopt(name, value) for name, value in _MALLOPT)
