import os
import signal
import threading

import jax
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.parallel import distributed
from t5x_lite.parallel.distributed import LostProcessError, detect

OURS = {'JAX_COORDINATOR_ADDRESS': 'host:1234', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '2'}


# ---- Finding each other ----


def test_a_laptop_is_one_process():
  assert detect({}) is None
  assert detect({'HOME': '/home/me', 'TPU_WORKER_HOSTNAMES': 'localhost'}) is (None)


def test_our_own_variables_name_everything():
  group = detect(OURS)
  assert group is not None
  assert group.coordinator_address == 'host:1234'
  assert (group.process_count, group.process_index) == (4, 2)
  assert detect({**OURS, 'JAX_NUM_PROCESSES': '1'}) is None


def test_an_indexed_kubernetes_job_gives_the_index():
  environ = {**OURS, 'JOB_COMPLETION_INDEX': '3'}
  del environ['JAX_PROCESS_ID']
  group = detect(environ)
  assert group is not None and group.process_index == 3


@pytest.mark.parametrize(
  'environ, source',
  [
    ({'SLURM_NTASKS': '8', 'SLURM_PROCID': '1'}, 'SLURM'),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'Open MPI'),
    ({'TPU_WORKER_HOSTNAMES': 'a,b,c'}, 'Cloud TPU'),
    ({'MEGASCALE_NUM_SLICES': '2'}, 'Cloud TPU'),
    ({'T5X_LITE_TPU_SLICE': '1'}, 'Cloud TPU'),  # of launch/tpu_pod.sh
  ],
)
def test_launchers_are_recognised(environ, source):
  group = detect(environ)
  assert group is not None and group.source == source


@pytest.mark.parametrize(
  'environ',
  [
    {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'},
    {'SLURM_NTASKS': '8'},  # a shell inside an allocation, not a task of it
    {'OMPI_COMM_WORLD_SIZE': '1'},
  ],
)
def test_one_task_of_a_launcher_is_no_group(environ):
  assert detect(environ) is None


@pytest.mark.parametrize(
  'flags, message',
  [
    (dict(process_count=2), 'give all of'),
    (dict(coordinator_address='a:1', process_count=2), 'give all of'),
    (dict(coordinator_address='a', process_count=2, process_index=0), 'has no port'),
    (dict(coordinator_address='a:1', process_count=2, process_index=2), r'outside 0\.\.1'),
  ],
)
def test_wrong_flags_are_one_clear_line(flags, message):
  with pytest.raises(UsageError, match=message):
    distributed.initialize(**flags)


def test_one_process_needs_no_coordinator():
  distributed.initialize(process_count=1)
  distributed.barrier('alone')
  assert distributed.is_primary()


# ---- Stopping ----


def test_sigterm_is_a_request():
  before = signal.getsignal(signal.SIGTERM)
  with distributed.stop_signal() as stop:
    assert not stop.requested(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested(1)
    assert stop.received == 'SIGTERM'
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_does_not_wait():
  with distributed.stop_signal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == 'SIGINT'
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_phases_share_the_signal():
  with distributed.stop_signal() as outer:
    with distributed.stop_signal() as inner:
      os.kill(os.getpid(), signal.SIGTERM)
      assert inner.requested(0)
    assert outer.received
  with distributed.stop_signal() as stop:
    assert not stop.received


def test_threads_have_no_handlers():
  seen = []

  def run():
    with distributed.stop_signal() as stop:
      seen.append(stop.requested(0))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [False]


# ---- Losing one ----


def test_a_lost_peer_is_told_apart_from_other_errors(monkeypatch):
  gone = jax.errors.JaxRuntimeError(
    'INTERNAL: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer\nand so on'
  )
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(LostProcessError, match='lost another process'):
    with distributed.lost_process_is_an_error():
      raise gone
  with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE'):
    with distributed.lost_process_is_an_error():
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')
  monkeypatch.setattr(jax, 'process_count', lambda: 1)
  with pytest.raises(jax.errors.JaxRuntimeError, match='Connection'):
    with distributed.lost_process_is_an_error():
      raise gone
