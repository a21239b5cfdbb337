import importlib
import json
import struct
import subprocess
import sys

from t5x_lite.runs import metric_writers
from t5x_lite.runs.metric_writers import MetricWriter


def read_events(model_dir):
  """Parses TensorBoard's files by their format, without TensorFlow."""
  event_pb2 = importlib.import_module('tensorboard.compat.proto.event_pb2')
  events = []
  for path in sorted((model_dir / 'tensorboard').iterdir()):
    assert 'tfevents' in path.name
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[12 + length + 4 :]
  return events


# ---- Files ----


def test_writes_jsonl_and_tensorboard(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0) as writer:
    writer.write(10, {'loss': 2.5, 'eval/task/loss': 3.0})
    writer.write(20, {'loss': float('nan')})
    writer.write(30, {})
  first, second = metric_writers.read_metrics(str(tmp_path))
  assert (first['step'], first['loss']) == (10, 2.5)
  assert first['eval/task/loss'] == 3.0
  assert (second['step'], second['loss']) == (20, None)
  version, start, *scalars = read_events(tmp_path)
  assert version.file_version == 'brain.Event:2'
  assert (start.step, start.session_log.status) == (0, 1)
  found = {
    (event.step, value.tag): value.simple_value
    for event in scalars
    for value in event.summary.value
  }
  assert found[10, 'loss'] == 2.5
  assert found[20, 'loss'] != found[20, 'loss']


def test_a_damaged_line_is_left_out(tmp_path):
  lines = b'{"step": 1}\n\xff\xfe\n{"step": 2}\n{"st'
  (tmp_path / 'metrics.jsonl').write_bytes(lines)
  steps = [e['step'] for e in metric_writers.read_metrics(str(tmp_path))]
  assert steps == [1, 2]


def test_every_line_can_be_read_at_once(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0) as writer:
    writer.write(1, {'loss': 1.0})
    assert len(metric_writers.read_metrics(str(tmp_path))) == 1
    assert len(read_events(tmp_path)) == 3


def test_a_restart_drops_what_came_after_its_checkpoint(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': float(step)})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "lo')  # killed here
  with MetricWriter(str(tmp_path), first_step=2) as writer:
    writer.write(3, {'loss': 30.0})
  entries = metric_writers.read_metrics(str(tmp_path))
  assert [e['loss'] for e in entries] == [1.0, 2.0, 30.0]
  assert [e.step for e in read_events(tmp_path) if e.HasField('session_log')]
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    json.loads(line)


def test_only_one_process_writes(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0, active=False) as writer:
    writer.write(1, {'loss': 1.0})
  assert list(tmp_path.iterdir()) == []


def test_no_metrics_yet(tmp_path):
  assert metric_writers.read_metrics(str(tmp_path)) == []


def test_needs_no_tensorflow(tmp_path):
  code = (
    'import sys\n'
    'from t5x_lite.runs.metric_writers import MetricWriter\n'
    f'MetricWriter({str(tmp_path)!r}, first_step=0).write(1, {{"a": 1.0}})\n'
    'assert "tensorflow" not in sys.modules\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


# ---- Averages and rates ----


# ---- Terminal ----
