"""What every test runs under; set before anything imports jax."""

import gc
import os
import pathlib
import sys

import pytest

from tests import xla_flags

assert 'jax' not in sys.modules, 'jax must be imported after this file'

_ROOT = pathlib.Path(__file__).parents[1]

# Environment variables and not jax.config, so that the programs which tests
# start as processes of their own run under the same rules.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8', xla_flags.QUICK]
).strip()
# They also find the package, installed or not, from any directory.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get('PYTHONPATH')]))
# A missing broadcast is a bug in waiting: x_BL + y_B must be written out.
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
# Shared by the xdist workers and the programs that tests start.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{_ROOT}/.cache/jax')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
# Ahead-of-time TPU compiles: no lock file, no question to a metadata server.
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
# No test may wait for a network that is not there.
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['TRANSFORMERS_OFFLINE'] = '1'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
# The GPU build of torch comes with triton, which brings the process down when it
# is imported after TensorFlow (two copies of LLVM). The oracles run on the CPU.
sys.modules['triton'] = None

# Files that take longest, which no worker may begin when the other has ended.
_FIRST = (
  'multiprocess_test.py',
  'kill_test.py',
  'tour_test.py',
  'serve_test.py',
  'study_test.py',
  'train_test.py',
  't5_test.py',
  'finetune_test.py',
  'damage_test.py',
  'steps_test.py',
)


def pytest_collection_finish():
  """Spares the collector what imports have made: it stays until the end."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items):
  """Puts the longest files first; `--no-loadscope-reorder` leaves them there."""
  place = {name: i for i, name in enumerate(_FIRST)}
  items.sort(key=lambda item: place.get(item.path.name, len(_FIRST)))


_MOST_BYTES = 3 * 2**30


def _resident_bytes():
  pages = pathlib.Path('/proc/self/statm')
  return int(pages.read_text().split()[1]) * 4096 if pages.exists() else 0


@pytest.fixture(autouse=True, scope='module')
def bounded_memory():
  """Drops compiled programs that a file leaves behind: two workers had 15 GB of them."""
  yield
  if _resident_bytes() > _MOST_BYTES and 'jax' in sys.modules:
    sys.modules['jax'].clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _no_signal_before():
  """A process ends after the signal that a program obeyed; that of the tests goes on."""
  if module := sys.modules.get('t5x_lite.parallel.distributed'):
    module._obeyed = ''
