import json
import math

import pytest

from t5x_lite.data import metrics
from t5x_lite.errors import UsageError
from t5x_lite.programs import report_runs
from t5x_lite.programs.report_runs import best, names_of, read


def write(root, *entries):
  root.mkdir(exist_ok=True)
  lines = [one if isinstance(one, str) else json.dumps(one) for one in entries]
  (root / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  return read(str(root))


def test_nulls_are_gaps_and_broken_lines_are_not_there(tmp_path):
  run = write(
    tmp_path / 'run',
    {'step': 1, 'time': 10.0, 'loss': 3.0, 'note': 'text', 'flag': True},
    '{"step": 2, "lo',
    '12',
    {'step': True, 'loss': 9.0},
    {'loss': 9.0},
    {'step': 3, 'time': 12.0, 'loss': None},
    '{"step": 4, "loss": Infinity}',
    '{"a":' * 99_999,
    {'step': 5, 'loss': 2},
  )
  assert list(run.series) == ['loss']
  steps, values = zip(*run.series['loss'], strict=True)
  assert steps == (1, 3, 5)
  assert math.isnan(values[1]) and values[::2] == (3.0, 2.0)
  assert run.last('loss') == 2.0
  assert run.times == [10.0, 12.0]


def test_means_and_sums_are_over_steps(tmp_path):
  """Each line averages over the steps since the line before it."""
  run = write(
    tmp_path / 'run',
    {'step': 10, 'seconds_per_step': 2.0},
    {'step': 20, 'seconds_per_step': 1.0},
    {'step': 20, 'eval/x/loss': 1.0},
    {'step': 25, 'seconds_per_step': 4.0},
  )
  assert run.total('seconds_per_step') == 20 + 10 + 20
  assert run.mean('seconds_per_step') == 2.0
  assert run.mean('loss') is None and run.total('loss') is None
  late = write(
    tmp_path / 'late',
    {'step': 110, 'seconds_per_step': 1.0},
    {'step': 120, 'seconds_per_step': 1.0},
  )
  assert late.total('seconds_per_step') == 20  # it started from another run


def test_the_best_depends_on_the_metric(tmp_path):
  run = write(
    tmp_path / 'run',
    {'step': 1, 'eval/x/loss': 1.0, 'infer_eval/x/bleu': 5.0,
     'infer_eval/x/phoneme_error_rate_no_stress': 9.0,
     'eval/x/target_tokens': 7},
    {'step': 2, 'eval/x/loss': 2.0, 'infer_eval/x/bleu': 6.0,
     'infer_eval/x/phoneme_error_rate_no_stress': None},
  )  # fmt: skip
  found = {name: best(name, xy) for name, xy in run.evaluations().items()}
  assert found == {
    'eval/x/loss': (1, 1.0),
    'infer_eval/x/bleu': (2, 6.0),
    'infer_eval/x/phoneme_error_rate_no_stress': (1, 9.0),
  }


def test_the_newest_predictions_of_each_kind(tmp_path):
  root = tmp_path / 'run'
  line = json.dumps({'input': 'a', 'prediction': 'b', 'target': 'c'})
  for name in ('infer_eval/t/90.jsonl', 'infer_eval/t/100.jsonl',
               'eval/90/t.jsonl', 'eval/100/t.jsonl', 'test/u.jsonl',
               'evaluation/v.jsonl', 'infer_eval/t/².jsonl', 'eval/²/t.jsonl'):  # fmt: skip
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(line + '\n')
  (root / 'test' / 'none.jsonl').write_text('{}\n')
  run = write(root, {'step': 1})
  assert [(one.name, one.file) for one in run.predictions] == [
    ('infer_eval/t', 'infer_eval/t/100.jsonl'),
    ('test/u', 'test/u.jsonl'),
    ('evaluation/v', 'evaluation/v.jsonl'),
    ('eval/t', 'eval/100/t.jsonl'),
  ]


def test_a_line_ends_where_json_lines_end(tmp_path):
  path = report_runs.epath.Path(tmp_path / 'x.jsonl')
  entry = {'input': 'a\u2028b\x85c', 'prediction': '', 'target': ''}
  path.write_text(json.dumps(entry, ensure_ascii=False) + '\nnot json\n')
  assert report_runs.read_lines(path) == [entry]


def test_names_are_short_where_they_differ():
  assert names_of(['runs/a/', 'runs/b']) == ['a', 'b']
  assert names_of(['a/pretrain', 'b/pretrain']) == ['a/pretrain', 'b/pretrain']


def test_no_run(tmp_path):
  for path in (tmp_path, tmp_path / 'missing'):
    with pytest.raises(UsageError, match='is no run directory'):
      read(str(path))


def test_every_metric_has_a_direction():
  texts, other = ['one two three', 'four five'], ['one three', 'five six']
  for metric in metrics.METRICS.values():
    perfect, worse = metric(texts, texts), metric(texts, other)
    for name, value in perfect.items():
      assert report_runs.lower_is_better(f'infer_eval/x/{name}') == (worse[name] > value), name
