import importlib
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.util import tensor_util

from t5x_lite.errors import UsageError
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
  odd = b'[' * 99_999 + b'\n{"step": ' + b'1' * 5000 + b'}\n'
  lines = b'{"step": 1}\n\xff\xfe\n' + odd + b'{"step": 2}\n{"st'
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


# ---- Samples and histograms ----

LINES = [{'input': 'a|b *c*', 'prediction': '<extra_id_0> x', 'target': ['x', 'y'], 'more': 1}]


def histogram():
  counts = np.zeros(32, np.float32)
  counts[3:5] = 2, 5
  return counts


def test_tensorboard_gets_samples_and_histograms(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0) as writer:
    writer.write_samples(7, 'infer_eval/task', LINES * 20)
    writer.write_histograms(7, {'grad_log10/encoder': histogram()})
    writer.write_histograms(8, {})
  values = [value for event in read_events(tmp_path) for value in event.summary.value]
  assert [value.metadata.plugin_data.plugin_name for value in values] == ['text', 'histograms']
  samples, drawn = (tensor_util.make_ndarray(value.tensor) for value in values)
  assert samples.shape == (11, 3)
  # As Markdown these are the texts themselves.
  assert samples[1].tolist() == [b'a\\|b \\*c\\*', b'&lt;extra\\_id\\_0&gt; x', rb"\['x', 'y'\]"]
  assert drawn[3].tolist() == [-11.0, -10.5, 2.0]
  assert drawn.shape == (32, 3) and drawn[:, 2].sum() == 7
  assert metric_writers.read_metrics(str(tmp_path)) == []


# ---- Reporters ----


def test_reporters_are_a_list_or_a_text():
  assert metric_writers.reporters('tensorboard') == ('tensorboard',)
  assert metric_writers.reporters('none') == ()
  assert metric_writers.reporters(['tensorboard,', 'tensorboard']) == ('tensorboard',)
  for wrong in ('mlflow', 'none,tensorboard', ['tensorboard', 'x']):
    with pytest.raises(UsageError, match=r'report_to is .*allowed are tensorboard, wandb'):
      metric_writers.reporters(wrong)


def test_wandb_that_is_missing_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UsageError, match=r"pip install '.\[wandb\]'"):
    metric_writers.reporters('tensorboard,wandb')


def test_none_writes_metrics_alone(tmp_path):
  with MetricWriter(str(tmp_path), first_step=0, report_to=()) as writer:
    writer.write(1, {'loss': 1.0})
    writer.write_samples(1, 'infer_eval/task', LINES)
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


def wandb_records(folder):
  """Reads what wandb wrote offline: LevelDB's log format, records inside."""
  pb = importlib.import_module('wandb.proto.wandb_internal_pb2')
  (path,) = folder.glob('*.wandb')
  data, position, record = path.read_bytes(), 7, b''
  while position + 7 <= len(data):
    left = 32768 - position % 32768
    if left < 7:
      position += left
      continue
    length, kind = struct.unpack('<HB', data[position + 4 : position + 7])
    record += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):  # full, or the last part
      yield pb.Record.FromString(record)
      record = b''


@pytest.mark.slow
def test_wandb_offline_and_the_same_run_after_a_restart(tmp_path):
  """In processes of their own, since wandb starts another."""
  pytest.importorskip('wandb')
  code = (
    'import sys\n'
    'import numpy as np\n'
    'from t5x_lite.runs import metric_writers\n'
    'names = metric_writers.reporters("wandb")\n'
    'with metric_writers.MetricWriter(sys.argv[1], first_step=int(sys.argv[2]),\n'
    '                                 report_to=names, config={"seed": 5}) as writer:\n'
    '  for step in map(int, sys.argv[3:]):\n'
    '    writer.write(step, {"loss": step / 2, "eval/task/loss": float("nan")})\n'
    f'  writer.write_samples(step, "infer_eval/task", {LINES!r})\n'
    '  writer.write_histograms(step, {"grad_log10/encoder": np.ones(32)})\n'
  )
  environment = {**os.environ, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
  for steps in (['0', '1', '2', '3'], ['2', '3', '4']):
    subprocess.run([sys.executable, '-c', code, str(tmp_path), *steps], env=environment, check=True)
  folders = sorted(tmp_path.glob('wandb/offline-run-*'))
  run_id = (tmp_path / 'wandb_run_id').read_text()
  assert len(folders) == 2 and all(one.name.endswith(run_id) for one in folders)
  losses = []
  for folder in folders:
    records = list(wandb_records(folder))
    (run,) = [one.run for one in records if one.HasField('run')]
    assert (run.run_id, run.project) == (run_id, 't5x_lite')
    assert {'seed': '5'}.items() <= {x.key: x.value_json for x in run.config.update}.items()
    for record in records:
      items = {x.key or '/'.join(x.nested_key): x.value_json for x in record.history.item}
      if 'loss' in items:
        losses.append((int(items['step']), float(items['loss'])))
      elif 'infer_eval/task/samples' in items:
        assert json.loads(items['infer_eval/task/samples'])['nrows'] == 1
      elif 'grad_log10/encoder' in items:
        assert json.loads(items['grad_log10/encoder'])['values'] == [1.0] * 32
  assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 1.5), (4, 2.0)]
  assert not list(tmp_path.glob('tensorboard'))
