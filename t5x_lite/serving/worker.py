"""The two threads that talk to the device, between any number of waiting clients.

Requests wait in a bounded queue; one thread puts them into free slots of a `ContinuousBatch`,
decodes a chunk, and hands every client what is there. Whatever else needs the device (embeddings,
scores, beam search), and may compile for seconds, runs in the other, one call at a time.
"""

import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from t5x_lite.decoding.continuous import ContinuousBatch, Request
from t5x_lite.decoding.prediction import Output

log = logging.getLogger(__name__)

Deliver = Callable[[Output | Exception], Any]


class QueueFullError(RuntimeError):
  """As many requests wait as may; try again later."""


class StoppedError(RuntimeError):
  """The worker has stopped, or is about to."""


@dataclasses.dataclass(frozen=True)
class _Job:
  ticket: int
  request: Request
  deliver: Deliver


class Worker:
  """Feeds a ContinuousBatch from a queue. Its methods may be called from any thread."""

  def __init__(self, batch: ContinuousBatch, *, max_queue: int = 256):
    """Starts the thread that alone uses the batch; max_queue requests may wait, as many calls."""
    self._batch, self.max_queue = batch, max_queue
    self._waiting: collections.deque[_Job] = collections.deque()
    self._running: dict[int, _Job] = {}  # by slot
    self._starting: list[_Job] = []  # on their way into slots, which may compile for seconds
    self._cancelled: set[int] = set()
    self._tickets = itertools.count()
    self._changed = threading.Condition()
    self._stopping = False
    self._thread = threading.Thread(target=self._loop, name='device', daemon=True)
    self._thread.start()
    self._calls, self._num_calls = ThreadPoolExecutor(1, thread_name_prefix='calls'), 0

  @property
  def num_waiting(self) -> int:
    """Requests that have no slot yet."""
    return len(self._waiting)

  @property
  def num_running(self) -> int:
    """Requests that are being decoded."""
    return len(self._running)

  @property
  def alive(self) -> bool:
    """Whether requests are served."""
    return self._thread.is_alive() and not self._stopping

  def submit(self, request: Request, deliver: Deliver) -> int:
    """Queues a request and returns a ticket for `cancel`.

    Deliver is called from the worker's thread with everything decoded so far, after each chunk,
    until an Output has ended or an exception comes instead. Raises QueueFullError if too many wait,
    and StoppedError after `stop`.
    """
    ticket = next(self._tickets)
    with self._changed:
      self._check_room(len(self._waiting))
      self._waiting.append(_Job(ticket, request, deliver))
      self._changed.notify()
    return ticket

  def call(self, function: Callable[[], Any]) -> Future:
    """Queues a function that uses the device; raises as `submit` does."""

    def done(_: Future) -> None:
      with self._changed:
        self._num_calls -= 1

    with self._changed:
      self._check_room(self._num_calls - 1)  # one is running
      self._num_calls += 1
      future = self._calls.submit(function)
    future.add_done_callback(done)
    return future

  def cancel(self, ticket: int) -> None:
    """Forgets a request; nothing is delivered for it any more. Once it has ended, does nothing."""
    with self._changed:
      known = (*self._waiting, *self._starting, *self._running.values())
      if any(job.ticket == ticket for job in known):
        self._cancelled.add(ticket)
        self._changed.notify()

  def stop(self) -> None:
    """Finishes what was accepted, then ends the thread."""
    with self._changed:
      self._stopping = True
      self._changed.notify()
    self._thread.join()
    self._calls.shutdown()

  def _check_room(self, waiting: int) -> None:
    if not self.alive:
      raise StoppedError('the server is stopping')
    if waiting >= self.max_queue:
      raise QueueFullError(f'{waiting} requests are waiting already; try again later')

  def _loop(self) -> None:
    while True:
      with self._changed:
        while not (self._waiting or self._running):
          if self._stopping:
            return
          self._changed.wait()
      try:
        self._turn()
      except Exception as error:  # a bug or a lost device: say so to all, and go on
        log.exception('decoding failed')
        with self._changed:
          failed = [*self._running.values(), *self._starting, *self._waiting]
          self._running, self._starting = {}, []
          self._waiting.clear()
        for job in failed:
          job.deliver(error)
        self._batch.reset()

  def _turn(self) -> None:
    """Fills free slots, decodes a chunk, delivers."""
    with self._changed:
      gone = [slot for slot, job in self._running.items() if job.ticket in self._cancelled]
      kept = [job for job in self._waiting if job.ticket not in self._cancelled]
      self._waiting = collections.deque(kept)
      self._cancelled.clear()
      for slot in gone:
        del self._running[slot]
      free = min(self._batch.num_free + len(gone), len(self._waiting))
      jobs = self._starting = [self._waiting.popleft() for _ in range(free)]
    self._batch.drop(gone)
    if jobs:
      slots = self._batch.add([job.request for job in jobs])
      with self._changed:
        self._running.update(zip(slots, jobs, strict=True))
        self._starting = []
    if not self._running:
      return
    for slot, output in self._batch.advance().items():
      job = self._running[slot]
      if output.ended:
        with self._changed:
          del self._running[slot]
      if job.ticket not in self._cancelled:
        job.deliver(output)
