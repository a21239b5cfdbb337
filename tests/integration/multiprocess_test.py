"""Several processes on this machine train as one does."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import t5x_lite
from t5x_lite import main
from t5x_lite.runs import checkpoints, metric_writers
from tests import tiny_run, xla_flags

# Whole trainings in processes of their own; `make test-quick` leaves them out.
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
# PROCESSES=4 has both axes of the mesh across processes at once.
PROCESSES = int(os.environ.get('PROCESSES', '2'))
# All processes make every batch, so that it is the same for any number.
DATA = {'host_sharding': 'replicated'}


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start(model_dir, count, *, devices=1, **arguments):
  """Starts `count` processes of one training."""
  given = {'model_dir': str(model_dir), 'total_steps': 6, 'dataset': DATA}
  command = ['tests.tiny_run', json.dumps({**given, **arguments})]
  return start_module(command, model_dir, count, devices=devices)


def start_module(command, log_prefix, count, *, devices=1):
  """Starts `count` processes of a module that find each other."""
  environ = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} {xla_flags.QUICK}',
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{free_port()}',
    'JAX_NUM_PROCESSES': str(count),
  }
  processes = []
  for index in range(count):
    log = open(f'{log_prefix}.{index}.log', 'ab')
    processes.append(
      subprocess.Popen(
        [sys.executable, '-m', *command],
        cwd=ROOT,
        env={**environ, 'JAX_PROCESS_ID': str(index)},
        stdout=log,
        stderr=subprocess.STDOUT,
      )
    )
  return processes


def read_log(model_dir, index):
  return pathlib.Path(f'{model_dir}.{index}.log').read_text()


def wait(processes, model_dir, timeout=500):
  codes = [process.wait(timeout=timeout) for process in processes]
  logs = '\n'.join(read_log(model_dir, i)[-2000:] for i in range(len(processes)))
  assert codes == [0] * len(codes), logs


def losses(model_dir):
  entries = metric_writers.read_metrics(str(model_dir))
  return {e['step']: e['loss'] for e in entries if 'loss' in e}


def steps_logged(model_dir):
  path = pathlib.Path(model_dir) / 'metrics.jsonl'
  return len(path.read_text().splitlines()) if path.exists() else 0


def when_logged(processes, model_dir, least, timeout=400.0):
  end = time.monotonic() + timeout
  while steps_logged(model_dir) < least:
    assert time.monotonic() < end, read_log(model_dir, 0)[-2000:]
    assert all(process.poll() is None for process in processes)
    time.sleep(0.01)


def assert_losses_are_those_of(single, model_dir, *, until):
  expected, found = losses(single), losses(model_dir)
  for step in range(1, until + 1):
    np.testing.assert_allclose(found[step], expected[step], rtol=1e-5)


def test_processes_train_as_one(tmp_path):
  """On either axis across them, stopped and continued, by one process at last."""
  single, model_dir = tmp_path / 'single', tmp_path / 'run'
  wait(start(single, 1, devices=2), single)
  # The model axis across processes.
  mesh = {'data': PROCESSES // 2, 'model': 2}
  wait(start(model_dir, PROCESSES, mesh=mesh, total_steps=3), model_dir)

  # The data axis. SIGTERM to the second process: both save at the same step and
  # exit with 0.
  processes = start(model_dir, 2, total_steps=2000, period=1000)
  when_logged(processes, model_dir, 6)
  processes[1].send_signal(signal.SIGTERM)
  wait(processes, model_dir)
  _, stopped = checkpoints.find_checkpoint(str(model_dir))
  assert stopped < 1000
  for index in range(2):
    assert f'saved at step {stopped} of 2000' in read_log(model_dir, index)
  assert_losses_are_those_of(single, model_dir, until=6)

  # One process can take over.
  wait(start(model_dir, 1, total_steps=stopped + 1), model_dir)
  assert list(losses(model_dir)) == list(range(1, stopped + 2))


def test_a_killed_process_ends_the_others_and_the_run_bit_identical(tmp_path):
  """With each host reading its own part of the data."""
  arguments = dict(dataset={}, total_steps=20)
  wait(start(tmp_path / 'a', 2, **arguments), tmp_path / 'a')
  processes = start(tmp_path / 'b', 2, **arguments)
  when_logged(processes, tmp_path / 'b', 7)
  processes[1].send_signal(signal.SIGKILL)
  # The other stops within a bounded time and says why: gloo tells at once, or
  # JAX's coordination service after its timeout.
  assert processes[0].wait(timeout=90) != 0
  log = read_log(tmp_path / 'b', 0)
  assert 'lost another process' in log or 'another task died' in log
  wait(start(tmp_path / 'b', 2, **arguments), tmp_path / 'b')
  a, b = (tiny_run.saved_arrays(tmp_path / name) for name in ('a', 'b'))
  assert a.keys() == b.keys()
  for name, array in a.items():
    assert array.tobytes() == b[name].tobytes(), name


def test_inference_is_continued_by_all_processes_alike(tmp_path):
  """Only the first process sees how far the output is."""
  run, words = tmp_path / 'run', tmp_path / 'words.txt'
  tiny_run.save_untrained(run)
  words.write_text(''.join(f'pronounce: w{i}\n' for i in range(23)))

  def command(output, source=words):
    command = ['infer', '--model', run, '--input', source, '--output', output]
    command += ['--batch_size', 4, '--resume', '--max_decode_length', 4]
    return [str(c) for c in command]

  def infer(output, source=words):
    return start_module(['t5x_lite.main', *command(output, source)], output, 2)

  assert main.main(command(tmp_path / 'a')) == 0
  expected = (tmp_path / 'a').read_text()
  assert len(expected.splitlines()) == 23
  lines = expected.splitlines(keepends=True)
  (tmp_path / 'b').write_text(''.join(lines[:10]) + lines[10][:7])
  wait(infer(tmp_path / 'b'), tmp_path / 'b')
  found = [json.loads(x) for x in (tmp_path / 'b').read_text().splitlines()]
  for line, entry in zip(lines, found, strict=True):
    wanted = json.loads(line)
    assert entry['input'] == wanted['input']
    assert entry['prediction'] == wanted['prediction']

  # The output of another input: every process ends, none waits.
  (tmp_path / 'other.txt').write_text('other\n' * 23)
  processes = infer(tmp_path / 'b', tmp_path / 'other.txt')
  assert [process.wait(timeout=120) for process in processes] == [2, 2]
  assert 'is not the prediction of line 1' in read_log(tmp_path / 'b', 0)


def test_processes_fine_tune_and_the_first_one_exports(tmp_path):
  """What it does alone, such as opening a checkpoint, waits for nobody."""
  start, output, rows = tmp_path / 'start', tmp_path / 'out', tmp_path / 'rows.csv'
  config = tiny_run.model(scan_layers=False)
  t5x_lite.new(config, tiny_run.VOCABULARY).save(str(start), format='hf')
  lines = [f'word {i % 7} {i},{"even" if i % 2 else "odd"}' for i in range(60)]
  rows.write_text('\n'.join(['text,label', *lines]) + '\n')
  command = ['t5x_lite.main', 'finetune', '--model', start, '--train', rows, '--steps', 4]
  command = [str(c) for c in [*command, '--method', 'lora', '--output', output]]
  wait(start_module(command, output, 2), output)
  results = json.loads((output / 'results.json').read_text())
  assert results['metrics']['examples'] > 0
  model = t5x_lite.load(results['export'])
  adapted = t5x_lite.load(str(start), adapter=results['adapter'])
  texts = ['word 3 3', 'word 5 12']
  assert model.generate(texts, max_new_tokens=4) == adapted.generate(texts, max_new_tokens=4)
