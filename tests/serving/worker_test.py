import queue
import threading

import pytest

from t5x_lite.decoding.continuous import ContinuousBatch, Request
from t5x_lite.parallel.placement import single_device
from t5x_lite.serving.worker import QueueFullError, StoppedError, Worker
from tests.models import tiny

CFG = tiny.config()


def make_batch(**arguments):
  return ContinuousBatch(
    CFG,
    tiny.params(CFG),
    placement=single_device(),
    max_decode_length=6,
    **{'chunk': 2, 'num_slots': 2, **arguments},
  )


@pytest.fixture
def worker():
  worker = Worker(make_batch(), max_queue=16)
  yield worker
  worker.stop()


def submit(worker, request):
  outputs = queue.Queue()
  ticket = worker.submit(request, outputs.put)
  return ticket, outputs


def last(outputs):
  while True:
    output = outputs.get(timeout=120)
    if isinstance(output, Exception) or output.ended:
      return output


def test_everybody_gets_their_own_and_calls_go_beside(worker):
  rows = [[5 + i, 9, 1] for i in range(9)]
  expected = dict(make_batch().run(Request(tokens=row) for row in rows))
  waiting = [submit(worker, Request(tokens=row))[1] for row in rows]
  call = worker.call(lambda: threading.current_thread().name)
  assert [last(outputs).tokens for outputs in waiting] == [
    expected[i].tokens for i in range(len(rows))
  ]
  assert call.result(timeout=60).startswith('calls')
  assert worker.num_waiting == worker.num_running == 0


def test_a_full_queue_refuses_and_a_cancelled_request_gives_its_place():
  batch, hold, entered = make_batch(num_slots=1), threading.Event(), threading.Event()
  advance = batch.advance

  def slow():
    entered.set()
    hold.wait()
    return advance()

  batch.advance = slow
  worker = Worker(batch, max_queue=2)
  try:
    _, first = submit(worker, Request(tokens=[7, 1]))
    assert entered.wait(60)  # the thread is busy
    (ticket, cancelled), (_, kept) = [submit(worker, Request(tokens=[5, 1])) for _ in range(2)]
    with pytest.raises(QueueFullError, match='2 requests'):
      worker.submit(Request(tokens=[5, 1]), print)
    worker.cancel(ticket)
    hold.set()
    assert last(first).ended and last(kept).ended
    assert cancelled.empty()
  finally:
    hold.set()
    worker.stop()


def test_a_long_call_holds_up_other_calls_alone():
  hold, worker = threading.Event(), Worker(make_batch(), max_queue=2)
  try:
    calls = [worker.call(hold.wait), worker.call(lambda: 'next'), worker.call(lambda: 'last')]
    with pytest.raises(QueueFullError, match='2 requests'):
      worker.call(print)
    assert last(submit(worker, Request(tokens=[5, 1]))[1]).ended
    assert not any(call.done() for call in calls)
    hold.set()
    assert calls[1].result(timeout=60) == 'next'
  finally:
    hold.set()
    worker.stop()


def test_what_was_accepted_is_finished_before_it_stops():
  worker = Worker(make_batch(num_slots=1))
  waiting = [submit(worker, Request(tokens=[5 + i, 1]))[1] for i in range(4)]
  worker.stop()
  assert all(last(outputs).ended for outputs in waiting)
  assert not worker.alive
  with pytest.raises(StoppedError):
    worker.submit(Request(tokens=[5, 1]), print)


def test_a_failure_is_told_to_those_it_hits_and_the_next_is_served(worker):
  with pytest.raises(ZeroDivisionError):
    worker.call(lambda: 1 // 0).result(timeout=60)
  _, broken = submit(worker, Request(tokens=['no id']))
  assert isinstance(last(broken), Exception)
  _, outputs = submit(worker, Request(tokens=[5, 1]))
  assert last(outputs).ended


def test_who_leaves_while_slots_are_prepared_gives_them_back():
  batch, hold = make_batch(num_slots=1), threading.Event()
  add, entered = batch.add, threading.Event()

  def slow(requests):
    entered.set()
    hold.wait()
    return add(requests)

  batch.add = slow
  worker = Worker(batch)
  try:
    ticket, outputs = submit(worker, Request(tokens=[5, 1]))
    assert entered.wait(60)
    worker.cancel(ticket)
    hold.set()
    _, other = submit(worker, Request(tokens=[6, 1]))
    assert last(other).ended and outputs.empty()
  finally:
    hold.set()
    worker.stop()


def test_a_large_top_k_is_all_of_the_vocabulary():
  [(_, output)] = make_batch().run([Request(tokens=[5, 1], top_k=2**40, temperature=1.0)])
  assert output.ended
