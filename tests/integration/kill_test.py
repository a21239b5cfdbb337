"""A run killed at any moment and started again ends as if nothing had been."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from t5x_lite.runs import checkpoints, metric_writers
from tests import tiny_run, xla_flags

# Whole trainings in processes of their own; `make test-quick` leaves them out.
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 30
# The first inside a save, the others at random moments. KILLS=50 tries fifty.
# docs/reliability.md has what came of it.
KILLS = int(os.environ.get('KILLS', '4'))


def start(model_dir, **arguments):
  """Starts a training in a process of its own, on one device."""
  given = {'model_dir': str(model_dir), 'total_steps': STEPS, **arguments}
  log = open(f'{model_dir}.log', 'ab')
  return subprocess.Popen(
    [sys.executable, '-m', 'tests.tiny_run', json.dumps(given)],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': xla_flags.QUICK},
    stdout=log,
    stderr=subprocess.STDOUT,
  )


def finish(model_dir, **arguments):
  process = start(model_dir, **arguments)
  log = pathlib.Path(f'{model_dir}.log')
  assert process.wait(timeout=500) == 0, log.read_text()[-3000:]


def kill_when(process, due, timeout=400.0):
  """Sends SIGKILL as soon as `due()`; returns False if it ended before."""
  end = time.monotonic() + timeout
  while time.monotonic() < end:
    if process.poll() is not None:
      return False
    if due():
      process.send_signal(signal.SIGKILL)
      process.wait()
      return True
    time.sleep(0.002)
  raise TimeoutError('the moment never came')


def assert_ends_the_same(a, b):
  """Compares every array of the last checkpoints, bit for bit."""
  states = []
  for model_dir in (a, b):
    directory, step = checkpoints.find_checkpoint(str(model_dir))
    assert step == STEPS
    states.append(tiny_run.saved_arrays(f'{directory}/{step}'))
  assert states[0].keys() == states[1].keys()
  for name, array in states[0].items():
    assert array.tobytes() == states[1][name].tobytes(), name
  for model_dir in (a, b):
    losses = metric_writers.read_metrics(str(model_dir))
    assert [entry['step'] for entry in losses] == list(range(1, STEPS + 1))
    states.append(np.array([entry['loss'] for entry in losses]))
  np.testing.assert_array_equal(states[2], states[3])


def saving(model_dir):
  root = pathlib.Path(model_dir) / 'checkpoints'
  return any(root.glob('*tmp*')) if root.is_dir() else False


def latest(model_dir):
  root = pathlib.Path(model_dir) / 'checkpoints'
  steps = [int(p.name) for p in root.glob('*') if p.name.isdigit()]
  return max(steps, default=0)


def stop_and_kill_in_a_save(model_dir):
  """Stops a run of a few steps with SIGTERM, then kills it while it saves."""
  metrics = model_dir / 'metrics.jsonl'

  # SIGTERM: saves between two periods, says so and exits with 0.
  process = start(model_dir, period=1000)
  while process.poll() is None and not (
    metrics.exists() and len(metrics.read_text().splitlines()) >= 4
  ):
    time.sleep(0.002)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=120) == 0
  log = pathlib.Path(f'{model_dir}.log').read_text()
  assert f'SIGTERM: saved at step {latest(model_dir)} of {STEPS}' in log
  stopped = latest(model_dir)

  def in_a_save():
    return latest(model_dir) > stopped and saving(model_dir)

  assert kill_when(start(model_dir, period=1), in_a_save)
  assert stopped < latest(model_dir) < STEPS
  assert 'continues' in pathlib.Path(f'{model_dir}.log').read_text()


def test_stopped_and_killed_ends_the_same(tmp_path):
  """Kills are spread over start-up, steps, saves and the end."""
  uninterrupted = tmp_path / 'uninterrupted'
  finish(uninterrupted)
  rng = random.Random(0)
  stop_and_kill_in_a_save(tmp_path / 'run0')
  kills, runs = 1, 0
  while kills < KILLS:
    model_dir = tmp_path / f'run{runs}'
    runs += 1
    for _ in range(min(4, KILLS - kills)):
      if not kill_some_time(model_dir, rng):
        break
      kills += 1
    finish(model_dir)
    assert_ends_the_same(uninterrupted, model_dir)
    assert not saving(model_dir)
  print(f'{kills} kills in {runs} runs')


def kill_some_time(model_dir, rng):
  """Starts the run and kills it; returns False if it ended before."""
  process = start(model_dir, period=rng.choice([1, 2, 5]))
  # At any time, before the first step too; or soon after some checkpoint.
  least, delay = 0, rng.uniform(2.0, 25.0)
  if rng.random() < 0.7:
    least = min(STEPS - 2, latest(model_dir) + rng.randint(1, 6))
    delay = rng.uniform(0.0, 0.3)
  ready = []

  def due():
    if not ready and latest(model_dir) >= least:
      ready.append(time.monotonic())
    return ready and time.monotonic() > ready[0] + delay

  return kill_when(process, due)
