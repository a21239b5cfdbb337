import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath

from t5x_lite.data.rows.dataset_iterator import DatasetIterator
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators
from t5x_lite.interop import checkpoint_source
from t5x_lite.parallel import distributed, pytrees
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import evaluate
from t5x_lite.programs.train import NonFiniteError, train
from t5x_lite.runs import checkpoints, lease, metric_writers
from t5x_lite.runs.checkpoints import CheckpointConfig
from tests import tiny_run
from tests.runs import metric_writers_test


def leaves(state):
  return {name: np.asarray(leaf) for name, leaf in pytrees.flatten_names(state).items()}


def assert_same_bits(a, b):
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of six steps with both kinds of evaluation, and its last state."""
  model_dir = tmp_path_factory.mktemp('finished') / 'run'
  state = train(
    **tiny_run.arguments(
      model_dir,
      total_steps=6,
      eval_period=3,
      train_eval=[tiny_run.dataset(split='validation')],
      infer_eval=[tiny_run.dataset(split='validation')],
      eval_steps=2,
      infer_eval_examples=5,
      checkpoint=CheckpointConfig(period=3, keep=1, keep_best=1, best_metric='eval/pronounce/loss'),
      summarize_config_fn=lambda d: open(f'{d}/config.gin', 'w').close(),
    )
  )
  return model_dir, state


# ---- What a run leaves behind ----


def test_run_directory_is_complete(finished):
  model_dir, state = finished
  names = {path.name for path in model_dir.iterdir()}
  assert names >= {
    'checkpoints',
    'config.gin',
    'config.json',
    'infer_eval',
    'metrics.jsonl',
    'model.json',
    'sharding.txt',
    'tensorboard',
    'vocabulary.json',
  }
  run = checkpoint_source.open_source(str(model_dir))
  assert run.step == 6 == int(state.step)
  assert run.config == tiny_run.model()
  assert run.lengths == tiny_run.LENGTHS
  saved = checkpoints.load_state(str(model_dir), {'params': state.params})
  assert_same_bits(saved['params'], state.params)


def test_metrics(finished):
  entries = metric_writers.read_metrics(str(finished[0]))
  training = [e for e in entries if 'loss' in e]
  assert [e['step'] for e in training] == [1, 2, 3, 4, 5, 6]
  for entry in training:
    assert entry['loss'] > 0
    assert entry['target_tokens_per_second'] > 0
    assert entry['input_tokens_per_second'] > 0
    assert entry['model_tflops_per_second'] > 0
    assert 0 < entry['target_tokens_fill'] <= 1
    for name in ('accuracy', 'z_loss', 'grad_norm', 'param_norm'):
      assert name in entry
  rates = [e['learning_rate'] for e in training]
  np.testing.assert_allclose(rates[2:], 1e-2, rtol=1e-6)
  assert training[-1]['loss'] < training[0]['loss']
  evaluated = [e for e in entries if 'eval/pronounce/loss' in e]
  assert [e['step'] for e in evaluated] == [3, 6]
  assert 'infer_eval/pronounce/phoneme_error_rate' in evaluated[0]


def test_predictions_lie_beside_references(finished):
  path = finished[0] / 'infer_eval' / 'pronounce' / '6.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(lines) == 5
  for line in lines:
    assert line['input'].startswith('pronounce: ')
    assert line['target'] and 'prediction' in line


def test_evaluation_sees_the_state_of_its_step(finished):
  """The last evaluation's loss is that of the last checkpoint's parameters."""
  model_dir, _ = finished
  entries = metric_writers.read_metrics(str(model_dir))
  entry = entries[-1]
  results = evaluate.evaluate(
    model_dir=str(model_dir), datasets=[tiny_run.dataset(split='validation')], num_examples=5
  )
  metrics = results['pronounce']
  decoded = 'infer_eval/pronounce/phoneme_error_rate'
  assert metrics['phoneme_error_rate'] == pytest.approx(entry[decoded])
  assert metrics['examples'] == 5
  saved = json.loads((model_dir / 'eval' / '6' / 'metrics.json').read_text())
  assert saved['tasks'] == results
  assert (model_dir / 'eval' / '6' / 'pronounce.jsonl').exists()


def test_each_evaluation_is_of_its_own_step(tmp_path):
  """Every loss is that of the checkpoint of its step, and of no other."""
  validation = tiny_run.dataset(split='validation', shuffle=False)
  arguments = tiny_run.arguments(
    tmp_path / 'run',
    total_steps=3,
    optimizer=tiny_run.optimizer(0.1),
    eval_period=1,
    eval_steps=1,
    train_eval=[validation],
    checkpoint=CheckpointConfig(period=1, keep=0),
  )
  train(**arguments)
  entries = metric_writers.read_metrics(arguments['model_dir'])
  name = 'eval/pronounce/loss'
  logged = {e['step']: e[name] for e in entries if name in e}
  assert list(logged) == [1, 2, 3]
  # A step moves the loss by more than what the comparison would forgive.
  gaps = np.diff(list(logged.values()))
  for step, loss in logged.items():
    results = evaluate.evaluate(
      model_dir=f'{arguments["model_dir"]}/checkpoints/{step}',
      datasets=[dataclasses.replace(validation, pack=True)],
      output=str(tmp_path / 'out'),
      num_examples=validation.batch_size,
    )
    found = results['pronounce']['eval/loss']
    assert found == pytest.approx(loss, rel=1e-5)
    assert abs(found - loss) < 0.01 * np.abs(gaps).min()


# ---- Continuing ----


def test_resumed_is_uninterrupted_bit_for_bit(finished, tmp_path):
  _, expected = finished
  first = tiny_run.arguments(tmp_path / 'run', total_steps=3, checkpoint=CheckpointConfig(period=2))
  train(**first)
  state = train(**{**first, 'total_steps': 6})
  assert_same_bits(state, expected)
  steps = [e['step'] for e in metric_writers.read_metrics(first['model_dir'])]
  assert steps == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_trained_again(finished):
  model_dir, state = finished
  before = (model_dir / 'metrics.jsonl').read_text()
  again = train(**tiny_run.arguments(model_dir, total_steps=6))
  assert_same_bits(again, state)
  assert (model_dir / 'metrics.jsonl').read_text() == before


def test_sigterm_saves_and_returns(tmp_path, monkeypatch, finished):
  """Stops between two steps; continued, it ends as if nothing had been."""
  arguments = tiny_run.arguments(
    tmp_path / 'run', total_steps=6, checkpoint=CheckpointConfig(period=100)
  )
  write = metric_writers.MetricWriter.write

  def write_and_stop(self, step, metrics):
    write(self, step, metrics)
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(metric_writers.MetricWriter, 'write', write_and_stop)
  state = train(**arguments)
  assert 2 <= int(state.step) < 6
  assert distributed.stopped_by() == 'SIGTERM'
  entries = metric_writers.read_metrics(arguments['model_dir'])
  assert entries[-1]['step'] == int(state.step)
  _, step = checkpoints.find_checkpoint(arguments['model_dir'])
  assert step == int(state.step)
  monkeypatch.undo()
  assert_same_bits(train(**arguments), finished[1])
  assert distributed.stopped_by() == ''


def test_an_unfinished_window_is_written(tmp_path, monkeypatch):
  """What was measured since the last line is not lost with the end of the data."""
  draw = DatasetIterator.__next__

  def end_at_six(self):
    if self.num_batches == 6:
      raise StopIteration
    return draw(self)

  monkeypatch.setattr(DatasetIterator, '__next__', end_at_six)
  arguments = tiny_run.arguments(tmp_path / 'run', total_steps=100, stats_period=4)
  train(**arguments)
  entries = metric_writers.read_metrics(arguments['model_dir'])
  assert [e['step'] for e in entries if 'loss' in e] == [4, 6]


@pytest.mark.parametrize('stop_at', [2, 4])
def test_evaluation_that_a_stop_skipped_is_made_up_for(tmp_path, monkeypatch, stop_at):
  """Its checkpoint gets the metrics too; what was measured before the stop is written then."""
  name = 'eval/pronounce/loss'
  arguments = tiny_run.arguments(
    tmp_path / 'run',
    checkpoint=CheckpointConfig(period=100, keep=2, keep_best=1, best_metric=name),
    total_steps=4,
    stats_period=3,
    eval_period=2,
    eval_steps=1,
    train_eval=[tiny_run.dataset(split='validation')],
  )

  draw = DatasetIterator.__next__

  def draw_and_stop(self):
    if self.num_batches == stop_at - 1:
      signal.raise_signal(signal.SIGTERM)
    return draw(self)

  monkeypatch.setattr(DatasetIterator, '__next__', draw_and_stop)
  assert int(train(**arguments).step) == stop_at
  assert distributed.stopped_by() == 'SIGTERM'
  monkeypatch.undo()
  for _ in range(2):
    train(**arguments)
    assert distributed.stopped_by() == ''
  entries = metric_writers.read_metrics(arguments['model_dir'])
  evaluated = {e['step']: e[name] for e in entries if name in e}
  assert [e['step'] for e in entries if name in e] == [2, 4]
  assert [e['step'] for e in entries if 'loss' in e] == ([2, 3, 4] if stop_at == 2 else [3, 4])
  root = tmp_path / 'run' / 'checkpoints'
  for step in (stop_at, 4):
    assert json.loads((root / f'{step}/metrics/metrics').read_text()) == {name: evaluated[step]}
    assert checkpoints.read_meta(epath.Path(root / str(step)))['evaluated'] == step


def test_fine_tuning_starts_from_the_parameters(finished, tmp_path):
  model_dir, pretrained = finished
  arguments = tiny_run.arguments(
    tmp_path / 'run',
    total_steps=1,  # at a learning rate of 0, where the warm-up begins
    checkpoint=CheckpointConfig(restore_path=str(model_dir)),
  )
  state = train(**arguments)
  assert int(state.step) == 1
  assert_same_bits(state.params, pretrained.params)
  arguments['model_dir'] = str(tmp_path / 'all')
  arguments['total_steps'] = 7
  arguments['checkpoint'] = CheckpointConfig(restore_path=str(model_dir), restore_optimizer=True)
  assert int(train(**arguments).step) == 7


# ---- Going wrong ----


def test_divergence_names_the_step_and_keeps_the_last_good(tmp_path):
  arguments = tiny_run.arguments(
    tmp_path / 'run',
    total_steps=50,
    optimizer=tiny_run.optimizer(1e30),
    checkpoint=CheckpointConfig(period=1, keep=0),
  )
  with pytest.raises(NonFiniteError, match=r'at step \d+: stopped\. The last'):
    train(**arguments)
  shapes = tiny_run.t5.abstract_params(tiny_run.model())[1]
  saved = checkpoints.load_state(arguments['model_dir'], {'params': shapes})
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved))
  last = metric_writers.read_metrics(arguments['model_dir'])[-1]
  assert None in last.values()


def test_some_updates_may_be_left_out(tmp_path, caplog):
  arguments = tiny_run.arguments(
    tmp_path / 'run',
    total_steps=50,
    optimizer=tiny_run.optimizer(1e30),
    checkpoint=CheckpointConfig(period=100),
    max_skipped_updates=2,
  )
  with pytest.raises(NonFiniteError, match=r', first in \w+/\w+: stopped'):
    train(**arguments)
  left_out = [r for r in caplog.messages if 'the update is left out' in r]
  assert len(left_out) == 2


def test_patience_needs_a_metric(tmp_path):
  with pytest.raises(UsageError, match=r'needs CheckpointConfig\.best'):
    train(**tiny_run.arguments(tmp_path / 'run', patience=2))


def test_dry_run_writes_nothing(tmp_path, capsys):
  arguments = tiny_run.arguments(tmp_path / 'run', dry_run=True)
  assert train(**arguments) is None
  assert list(tmp_path.iterdir()) == []
  printed = capsys.readouterr().out
  for text in (
    'parameters (',
    'per device: parameters',
    'temporaries',
    'total_steps',
    'no run was begun',
  ):
    assert text in printed
  assert len(printed.splitlines()) < 30
  file = tmp_path / 'all.txt'
  assert train(**arguments, dry_run_file=str(file)) is None
  assert list(tmp_path.iterdir()) == [file]
  for text in ('"emb_dim": 16', 'params/encoder/layers/attention/query/kernel'):
    assert text in file.read_text()


@pytest.mark.parametrize(
  'overrides, message',
  [
    (dict(total_steps=0), 'total_steps is 0'),
    (dict(eval_steps=0), 'eval_steps is 0'),
    (dict(infer_eval_examples=0), 'infer_eval_examples is 0'),
    (dict(model_dir=''), 'model_dir'),
    (dict(dataset=tiny_run.dataset(batch_size=7), mesh=MeshConfig(data=8)), 'batch size 7'),
    (dict(num_microbatches=2), 'num_microbatches=2'),
    (dict(model=tiny_run.model(vocab_size=256)), '384 ids'),
    (dict(dataset=tiny_run.dataset('pronunce')), 'pronounce'),
    (dict(dataset=tiny_run.dataset(split='dev')), "no split 'dev'"),
    (dict(dataset=tiny_run.dataset('pronounce_t5')), 'vocabulary'),
    (dict(vocabulary=VocabularyConfig(kind='byte', extra_ids=300)), 'ids'),
    (dict(mesh=MeshConfig(data=3)), 'does not multiply'),
    (dict(checkpoint=CheckpointConfig(restore_path='/nowhere')), '/nowhere does not exist'),
    (dict(train_eval=[tiny_run.dataset(split='validation')] * 2), 'twice'),
    (
      dict(dataset=tiny_run.dataset(feature_converter='lm', segment_ids=True)),
      "feature_converter='lm'",
    ),
  ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, overrides, message):
  arguments = tiny_run.arguments(tmp_path / 'run')
  with pytest.raises(UsageError, match=message) as raised:
    train(**{**arguments, **overrides})
  assert '\n' not in str(raised.value)
  assert list(tmp_path.iterdir()) == []


def test_another_models_run_is_left_alone(finished):
  model_dir, _ = finished
  before = {p: p.read_bytes() for p in model_dir.rglob('*') if p.is_file()}
  arguments = tiny_run.arguments(model_dir, total_steps=9)
  with pytest.raises(UsageError, match='mlp_dim=32, the configuration 64'):
    train(**{**arguments, 'model': tiny_run.model(mlp_dim=64)})
  with lease.lock(str(model_dir)):
    with pytest.raises(UsageError, match='another run'):
      train(**arguments)
  after = {p: p.read_bytes() for p in model_dir.rglob('*') if p.is_file()}
  assert after == before


def test_evaluators_are_cached(finished, monkeypatch):
  """Small evaluation sets are read once a run."""
  reads = []
  cached = evaluators._Cached(lambda: iter([reads.append(1) or 1, 2]), 1)
  assert list(cached) == list(cached) == [1, 2]
  assert len(reads) == 1


# ---- Watching ----


@pytest.mark.slow
def test_histograms_a_profile_and_what_the_lengths_cut(tmp_path, caplog):
  state = train(
    **tiny_run.arguments(
      tmp_path / 'run',
      report_to=['tensorboard'],
      histogram_period=2,
      profile_steps=2,
      dataset=tiny_run.dataset(task_feature_lengths={'inputs': 14, 'targets': 16}),
    )
  )
  assert state is not None and int(state.step) == 4
  drawn = {
    (event.step, value.tag)
    for event in metric_writers_test.read_events(tmp_path / 'run')
    for value in event.summary.value
    if value.tag.startswith('grad_log10/')
  }
  assert {step for step, _ in drawn} == {2, 4}
  assert (2, 'grad_log10/encoder/layers') in drawn
  for entry in metric_writers.read_metrics(str(tmp_path / 'run')):
    assert not [name for name in entry if name.startswith('grad_log10/')]
  text = (tmp_path / 'run' / 'profile' / 'summary.txt').read_text()
  assert text.startswith('steps 3 to 4') and 'wait for data' in text and 'matmuls' in text
  # What the lengths cut is said once.
  assert 'examples are longer than' in caplog.text
  first, *others = metric_writers.read_metrics(str(tmp_path / 'run'))
  assert first['data/pronounce/cut_examples_percent'] > 50
  assert 0 < first['data/pronounce/cut_tokens_percent'] < 100
  assert not any(name.startswith('data/') for entry in others for name in entry)


def test_predictions_are_shown(finished):
  events = metric_writers_test.read_events(finished[0])
  tags = {(event.step, value.tag) for event in events for value in event.summary.value}
  assert {(3, 'infer_eval/pronounce/samples'), (6, 'infer_eval/pronounce/samples')} <= tags


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'report_to': 'tensorbord'}, 'report_to is tensorbord'),
    ({'report_to': 'none', 'histogram_period': 2}, 'needs report_to'),
    ({'profile_steps': 0}, 'profile_steps is 0'),
  ],
)
def test_watching_that_makes_no_sense(tmp_path, settings, message):
  with pytest.raises(UsageError, match=message):
    train(**tiny_run.arguments(tmp_path / 'run', **settings))
  assert not (tmp_path / 'run').exists()
