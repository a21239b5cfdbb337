import dataclasses
import json
import shutil
import threading

import pytest

from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import trained_model
from t5x_lite.programs import evaluate as evaluate_lib
from t5x_lite.programs.evaluate import evaluate
from t5x_lite.runs import metric_writers
from tests import tiny_run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  model_dir = tmp_path_factory.mktemp('run')
  tiny_run.save_untrained(model_dir)
  return model_dir


def dataset(name='language_id', **overrides):
  return tiny_run.dataset(name, **{'split': 'test', **overrides})


def test_metrics_by_task_and_predictions_beside_references(run, tmp_path):
  results = evaluate(
    model_dir=str(run / 'checkpoints' / '1'),
    datasets=[dataset(), dataset('pronounce')],
    output=str(tmp_path / 'out'),
    num_examples=9,
  )
  assert set(results) == {'language_id', 'pronounce'}
  assert 0 <= results['language_id']['accuracy'] <= 100
  assert results['pronounce']['phoneme_error_rate'] > 0
  for metrics in results.values():
    assert metrics['examples'] == 9
    assert metrics['eval/loss'] > 0
  saved = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
  assert saved.pop('settings')['num_examples'] == 9
  assert saved == {'checkpoint': str(run / 'checkpoints' / '1'), 'step': 1, 'tasks': results}
  for task in results:
    lines = (tmp_path / 'out' / f'{task}.jsonl').read_text().splitlines()
    assert len(lines) == 9
    assert set(json.loads(lines[0])) == {'input', 'prediction', 'target', 'score'}


def test_by_default_results_lie_in_the_run(run, capsys):
  n_best = DecodingConfig(num_beams=2, num_return_sequences=2)
  settings = {'datasets': [dataset()], 'num_examples': 1, 'decoding': n_best}
  found = evaluate(model_dir=str(run), **settings, teacher_forced=False)
  assert (run / 'eval' / '1' / 'metrics.json').exists()
  line = json.loads((run / 'eval' / '1' / 'language_id.jsonl').read_text())
  best, second = line['n_best']
  assert best == {'prediction': line['prediction'], 'score': line['score']}
  assert second['score'] <= best['score']
  # A table of all evaluations, metrics.jsonl and TensorBoard's beside them.
  assert capsys.readouterr().out == (run / 'eval' / 'metrics.md').read_text()
  [entry] = metric_writers.read_metrics(str(run / 'eval'))
  assert entry['step'] == 1
  accuracy = found['language_id']['accuracy']
  assert entry['infer_eval/language_id/accuracy'] == pytest.approx(accuracy)
  [events] = (run / 'eval' / 'tensorboard').iterdir()
  assert b'infer_eval/language_id/samples' in events.read_bytes()


def longest(targets, predictions, inputs):
  assert len(targets) == len(predictions)
  return {'longest': float(max(map(len, inputs)))}


def test_steps_are_evaluated_once(tmp_path, caplog):
  """Those that are there, those that come while it follows, and none twice."""
  run = tmp_path / 'run'
  tiny_run.save_untrained(run)
  shutil.copytree(run / 'checkpoints' / '1', run / 'checkpoints' / '2')
  arguments = dict(model_dir=str(run), datasets=[dataset()], num_examples=2, teacher_forced=False)
  with pytest.raises(UsageError, match=r'steps \[1, 2\], not \[2, 3\]'):
    evaluate(**arguments, steps=['2', '3'])
  with pytest.raises(UsageError, match="has '1x'; give numbers, or 'all' alone"):
    evaluate(**arguments, steps=['1x'])
  with pytest.raises(UsageError, match="has '²'; give numbers"):
    evaluate(**arguments, steps=['²'])
  with pytest.raises(UsageError, match='of no mean'):
    evaluate(**arguments, steps=['all'], last=2)
  evaluate(**arguments, steps=[2])
  first = (run / 'eval' / '2' / 'metrics.json').read_bytes()

  def train(path=run / 'checkpoints'):
    shutil.copytree(path / '1', path / 'new')
    (path / 'new').rename(path / '3')

  caplog.set_level('INFO', 't5x_lite')
  trainer = threading.Timer(0.5, train)
  trainer.start()
  evaluate(**arguments, steps=['2', '3'], follow=True)
  trainer.join()
  assert sorted(path.name for path in (run / 'eval').iterdir() if path.is_dir()) == [
    '2',
    '3',
    'tensorboard',
  ]
  assert (run / 'eval' / '2' / 'metrics.json').read_bytes() == first
  assert 'checkpoints/2 is evaluated already' in caplog.text
  more = dict(bootstrap=20, metrics=['tests.programs.evaluate_test:longest', 'rouge'])
  found = evaluate(**arguments, steps=['all'], **more)['language_id']
  assert sorted(path.name for path in (run / 'eval').iterdir() if path.is_dir())[:3] == [
    '1',
    '2',
    '3',
  ]
  head, _, *lines = (run / 'eval' / 'metrics.md').read_text().splitlines()
  assert head == '| task | metric | 1 | 2 | 3 |'
  assert any(line.startswith('| language_id | rouge1 | ') and '[' in line for line in lines)
  steps = [entry['step'] for entry in metric_writers.read_metrics(str(run / 'eval'))]
  assert steps == [2, 3, 1, 2, 3]
  assert found['longest_low'] <= found['longest_high'] == found['longest']
  assert found['rouge1_low'] <= found['rouge1'] <= found['rouge1_high']
  assert found == evaluate(**arguments, steps=['all'], **more)['language_id']


def test_a_followed_checkpoint_may_be_deleted_before_it_is_read(tmp_path, caplog, monkeypatch):
  tiny_run.save_untrained(tmp_path)
  shutil.copytree(tmp_path / 'checkpoints' / '1', tmp_path / 'checkpoints' / '2')
  opened = trained_model.open_together

  def open_together(path, *args, **kwargs):
    models = opened(path, *args, **kwargs)
    if path.endswith('/1'):
      shutil.rmtree(path)
    return models

  monkeypatch.setattr(trained_model, 'open_together', open_together)
  monkeypatch.setattr(evaluate_lib, 'FOLLOW_SECONDS', 0.1)
  arguments = dict(model_dir=str(tmp_path), datasets=[dataset()], num_examples=2)
  assert evaluate(**arguments, steps=['1', '2'], follow=True)['language_id']['examples'] == 2
  assert 'checkpoints/1 was deleted before it was evaluated' in caplog.text
  assert sorted(path.name for path in (tmp_path / 'eval').iterdir())[0] == '2'


def broken(targets, predictions):
  return {'broken': 1 / 0}


def test_a_metric_that_raises_loses_nothing_else(run, tmp_path):
  arguments = dict(model_dir=str(run), datasets=[dataset()], num_examples=2, steps=['1'])
  metrics = ['tests.programs.evaluate_test:broken', 'rouge']
  for _ in range(2):  # its results are not taken for whole
    with pytest.raises(UsageError, match='language_id: the metric broken raised ZeroDivisionError'):
      evaluate(**arguments, output=str(tmp_path), metrics=metrics)
  assert len((tmp_path / '1' / 'language_id.jsonl').read_text().splitlines()) == 2
  saved = json.loads((tmp_path / '1' / 'metrics.json').read_text())['tasks']['language_id']
  assert {'accuracy', 'rouge1'} <= set(saved)


def test_decoders_continue_the_input(tmp_path):
  runs = [str(tmp_path / name) for name in 'ab']
  for seed, run in enumerate(runs):
    tiny_run.save_untrained(run, seed=seed, architecture='decoder', bidirectional_prefix=True)
  read = dataset(feature_converter='prefix_lm')
  one = evaluate(model_dir=runs[0], datasets=[read], num_examples=3)['language_id']
  assert one['eval/loss'] > 0 and 0 <= one['accuracy'] <= 100
  both = evaluate(
    model_dir=runs, datasets=[read], num_examples=3, output=str(tmp_path / 'together')
  )
  assert both['language_id']['examples'] == 3
  text = dataset(
    'shakespeare_full_lm',
    split='validation',
    task_feature_lengths={'targets': 16},
    feature_converter='lm',
  )
  [loss] = evaluate(model_dir=runs[0], datasets=[text], num_examples=3).values()
  with pytest.raises(UsageError, match='evaluated twice'):
    evaluate(model_dir=runs[0], datasets=[text, dataclasses.replace(text, split='train')])
  assert loss.keys() == {'eval/loss', 'eval/perplexity', 'eval/accuracy', 'eval/target_tokens'}


@pytest.mark.parametrize(
  'overrides, message',
  [
    (dict(datasets=[]), 'datasets is empty'),
    (dict(num_examples=0), 'num_examples is 0'),
    (dict(model_dir='/nowhere'), 'does not exist'),
    (dict(datasets=[dataset('langage_id')]), 'language_id'),
    (dict(datasets=[dataset(split='dev')]), "no split 'dev'"),
    (dict(datasets=[dataset('language_id_t5')]), 'vocabulary'),
    (dict(datasets=[dataset(), dataset()]), 'evaluated twice'),
    (dict(metrics=['rogue']), "no metric 'rogue'.* or your own as module:function"),
    (dict(metrics=['json:nothing']), "no metric 'json:nothing'"),
    (dict(bootstrap=-1), 'bootstrap is -1'),
  ],
)
def test_mistakes_are_one_clear_line(run, tmp_path, overrides, message):
  arguments = dict(model_dir=str(run), datasets=[dataset()], output=str(tmp_path / 'out'))
  with pytest.raises(UsageError, match=message):
    evaluate(**{**arguments, **overrides})
  assert not (tmp_path / 'out').exists()
