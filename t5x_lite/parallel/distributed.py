"""Many processes: how they find each other, agree to stop, and meet.

Everything rests on JAX's own runtime (`jax.distributed`): nothing here opens a socket. A program
calls `initialize` before it touches a device, and the train loop asks `StopSignal.requested(step)`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import os
import signal
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_lite.errors import DamagedError, UsageError, first_line

log = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT_SECONDS = 60  # until a lost process is noticed; JAX's own default is 100
START_TIMEOUT_SECONDS = 300  # that a start and an end wait for the slowest process


class LostProcessError(RuntimeError):
  """Another process of the run died, so a collective could not finish."""

  exit_code = 5
  exit_at_once = True  # JAX's own clean-up would wait for the lost process to say goodbye


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
  """Where the processes meet, how many, which this is; '' or None asks JAX's cluster detection."""

  coordinator_address: str = ''
  process_count: int | None = None
  process_index: int | None = None
  source: str = 'flags'


def detect(environ: Mapping[str, str]) -> ProcessGroup | None:
  """Returns the process group that the environment describes, or None for one.

  Asked in this order: our own variables (set by `launch/local_multiprocess.sh` and the Kubernetes
  manifest), SLURM, Open MPI, Cloud TPU. An allocation of one process is no group, so that a shell
  inside a SLURM job runs the same command as a laptop does.
  """

  def number(name: str) -> int | None:
    value = environ.get(name, '')
    return int(value) if value.isdigit() else None

  def several(name: str) -> bool:
    return (number(name) or 1) > 1

  source = 'JAX_COORDINATOR_ADDRESS'
  address, count = environ.get(source, ''), number('JAX_NUM_PROCESSES')
  index = number('JAX_PROCESS_ID')
  if index is None:
    index = number('JOB_COMPLETION_INDEX')  # a Kubernetes indexed job
  if address and count is not None and index is not None:
    return None if count == 1 else ProcessGroup(address, count, index, source)
  if several('SLURM_NTASKS') and number('SLURM_PROCID') is not None:
    return ProcessGroup(source='SLURM')
  if several('OMPI_COMM_WORLD_SIZE'):
    return ProcessGroup(source='Open MPI')
  # GKE names the others in the environment; for a TPU slice JAX asks Google's metadata server.
  gke = ',' in environ.get('TPU_WORKER_HOSTNAMES', '') or several('MEGASCALE_NUM_SLICES')
  if gke or environ.get('T5X_LITE_TPU_SLICE'):
    return ProcessGroup(source='Cloud TPU')
  return None


def initialize(
  *,
  coordinator_address: str = '',
  process_count: int | None = None,
  process_index: int | None = None,
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT_SECONDS,
) -> None:
  """Joins the other processes of this run; does nothing for a single process.

  Call it before anything touches a JAX device. An empty coordinator_address (`host:port` of process
  0) asks the environment. After heartbeat_timeout seconds of silence a process counts as lost.
  Raises UsageError if only some of the three addresses are given, or they contradict each other.
  """
  given = (coordinator_address, process_count, process_index)
  group = detect(os.environ) if given == ('', None, None) else _checked_group(*given)
  if group is None:
    return
  try:
    jax.distributed.initialize(
      coordinator_address=group.coordinator_address or None,
      num_processes=group.process_count,
      process_id=group.process_index,
      initialization_timeout=START_TIMEOUT_SECONDS,
      heartbeat_timeout_seconds=heartbeat_timeout,
      shutdown_timeout_seconds=START_TIMEOUT_SECONDS,
    )
  except RuntimeError as error:
    others = f'the other processes (found through {group.source})'
    message = f'could not join {others} within {START_TIMEOUT_SECONDS} s'
    raise LostProcessError(f'{message}: {first_line(error)}') from error
  index, count = jax.process_index(), jax.process_count()
  log.info('process %d of %d, found through %s', index, count, group.source)


def _checked_group(address: str, count: int | None, index: int | None) -> ProcessGroup | None:
  """Turns the three flags into a group, or says which of them is wrong."""
  if count == 1 and not index:
    return None
  if not address or count is None or index is None:
    needed = 'give all of coordinator_address, process_count and process_index, or none of them'
    raise UsageError(f'{needed} (got {address!r}, {count} and {index})')
  if ':' not in address:
    raise UsageError(f'coordinator_address={address!r} has no port: write host:port')
  if not 0 <= index < count:
    raise UsageError(f'process_index={index} is outside 0..{count - 1} (process_count={count})')
  return ProcessGroup(address, count, index)


def is_primary() -> bool:
  """True for the one process that writes logs, metrics and small files."""
  return jax.process_index() == 0


def data_shard(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, int]:
  """Returns which part of every batch this process loads, and of how many.

  Processes that only share a model axis need the same rows, so there may be fewer parts than
  processes. The sharding is a batch's, whose leading dim is cut into consecutive blocks. Raises
  UsageError if a process would need rows that are not one equal block.
  """
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  bounds = {index[0].indices(batch_size)[:2] for index in indices if index}
  first, last = min(a for a, _ in bounds), max(b for _, b in bounds)
  size = last - first
  if sum(b - a for a, b in bounds) != size or first % size or batch_size % size:
    raise UsageError(
      'the mesh gives this process rows of the batch that do not follow each other: let data x '
      'fsdp be a multiple of the number of processes, or model of the devices of a process'
    )
  return first // size, batch_size // size


def barrier(name: str) -> None:
  """Waits until every process is here; LostProcessError if one is lost meanwhile."""
  if jax.process_count() == 1:
    return
  try:
    multihost_utils.sync_global_devices(name)
  except Exception as error:
    raise LostProcessError(f'a process did not reach {name!r}: {first_line(error)}') from error


# True in what process 0 does by itself, where nothing may wait for the others.
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar('alone', default=False)


def primary_alone(what: object, call: Callable[[], Any]) -> None:
  """Makes a call on process 0, whose error is one of all, as `alike` says."""
  context = contextvars.copy_context()
  context.run(_alone.set, True)
  alike(what, lambda: is_primary() and context.run(call))


def anywhere(condition: bool) -> bool:
  """Returns, on every process, whether the condition holds on any of them."""
  if jax.process_count() == 1 or _alone.get():
    return condition
  return bool(np.any(multihost_utils.process_allgather(np.array(condition, np.int32))))


def alike(what: object, call: Callable[[], Any]) -> Any:
  """Returns what a call returns; made on all processes, an error of one is an error of all.

  The others raise a DamagedError if it is one, else a UsageError, which name `what`.
  """
  found = problem = None
  try:
    found = call()
  except Exception as error:  # raised below, when all know of it
    problem = error
  for kind, told in ((DamagedError, DamagedError), (Exception, UsageError)):
    if anywhere(isinstance(problem, kind)):
      raise problem or told(f'{what}: another process says why')
  return found


def from_primary(count: Callable[[], int]) -> int:
  """Returns, on every process, the number from 0 on that the first one, alone, comes to.

  Raises what count raises, as `alike` does: no process waits for another.
  """
  found = alike('process 0 failed', lambda: count() if is_primary() else 0)
  if jax.process_count() > 1 and not _alone.get():
    # Two numbers of 31 bits: jax has no int64 unless it is told to.
    parts = np.array([found >> 31, found & 0x7FFFFFFF], np.int32)
    high, low = map(int, multihost_utils.broadcast_one_to_all(parts))
    found = (high << 31) + low
  return found


@contextlib.contextmanager
def lost_process_is_an_error() -> Iterator[None]:
  """Turns a collective that failed since its peer is gone into one clear line.

  gloo raises at once when a peer's connection closes. Where the transport waits instead (TPU,
  NCCL), the coordination service ends this process after the heartbeat timeout.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    signs = ('gloo', 'connection', 'peer', 'unavailable', 'heartbeat', 'nccl')
    if jax.process_count() == 1 or not any(sign in str(error).lower() for sign in signs):
      raise
    raise LostProcessError(
      f'process {jax.process_index()} of {jax.process_count()} lost another process of the run and '
      f'stops; start all of them again to continue from the last checkpoint ({first_line(error)})'
    ) from error


class StopSignal:
  """Says when to save and stop: after SIGTERM, or a first Ctrl-C.

  With several processes, JAX's preemption service names one step at which all of them see True.
  """

  def __init__(self):
    self.received = ''

  def requested(self, step: int) -> bool:
    """True at the step at which every process should save and stop."""
    global _obeyed
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.received = 'SIGTERM'
    _obeyed = self.received
    return bool(self.received)

  def handle(self, number: int, _: types.FrameType | None) -> None:
    """Receives a signal; the second one interrupts."""
    if self.received:  # asked twice: the user does not want to wait
      raise KeyboardInterrupt
    self.received = signal.Signals(number).name


_active: StopSignal | None = None
_obeyed = ''


def stopped_by() -> str:
  """The signal that this process stopped early for, or '' if it did not."""
  return _obeyed


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
  """Catches SIGTERM and the first Ctrl-C while the block runs.

  A block inside another one shares its signal, so that a program of several phases learns that one
  of them was stopped. With several processes SIGTERM belongs to JAX's service. Outside the main
  thread Python installs no handlers: the signals then do what they did before.
  """
  global _active, _obeyed
  if _active is not None:
    yield _active
    return
  stop = StopSignal()
  _obeyed = ''
  previous = {}
  if jax.process_count() == 1:
    with contextlib.suppress(ValueError):  # not the main thread
      for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, stop.handle)
  _active = stop
  try:
    yield stop
  finally:
    _active, _obeyed = None, stop.received  # which may have come after the last question
    for number, handler in previous.items():
      signal.signal(number, handler)
