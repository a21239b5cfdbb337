import html.parser
import json
import pathlib
import re
import shutil

import pytest

from t5x_lite import main
from t5x_lite.errors import UsageError
from t5x_lite.interop import checkpoint_source
from t5x_lite.programs.report import is_right, report
from t5x_lite.programs.train import train
from tests import tiny_run


class Checker(html.parser.HTMLParser):
  """Every tag that is opened is closed, in order; nothing is fetched."""

  VOID = ('meta', 'line', 'circle', 'br')

  def __init__(self):
    super().__init__()
    self.open, self.fetched, self.texts = [], [], []

  def handle_starttag(self, tag, attrs):
    if tag not in self.VOID:
      self.open.append(tag)
    self.fetched += [v for k, v in attrs if k in ('src', 'href')]

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


def read(path):
  checker = Checker()
  checker.feed(pathlib.Path(path).read_text())
  assert checker.open == [] and checker.fetched == []
  return ' '.join(checker.texts)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  model_dir = tmp_path_factory.mktemp('report') / 'run'
  train(
    **tiny_run.arguments(
      model_dir,
      total_steps=4,
      eval_period=2,
      train_eval=[tiny_run.dataset(split='validation')],
      infer_eval=[tiny_run.dataset(split='validation')],
      eval_steps=1,
      infer_eval_examples=3,
    )
  )
  return model_dir


def test_one_run(run):
  text = read(report(runs=[str(run)]))
  for part in ('Curves', 'grad_norm by group', 'Metrics by step', 'kept',
               'infer_eval/pronounce/phoneme_error_rate', 'Predictions',
               'infer_eval/pronounce/4.jsonl, 0 of 3 equal to a reference',
               'infer_eval: word_error_rate', 'Best evaluation',
               'Attention bias by distance', 'Cost', 'emb_dim', 'Data',
               'target tokens in all', 'config.json'):  # fmt: skip
    assert part in text, part


def test_counts_and_biases_are_the_checkpoints_own(run):
  text = read(report(runs=[str(run)]))
  source = checkpoint_source.open_source(str(run))
  size = sum(tensor.size for tensor in source.tensors.values())
  assert f'{size:,}' in text
  bias = source.tensors['encoder/relpos_bias/rel_embedding'].read()
  cells = [
    # Bucket 0 is distance 0, bucket 17 the next key on the right.
    (f'1, {distance}', f'{float(bias[1, bucket]):,.4g}')
    for distance, bucket in ((0, 0), (1, 17), (-1, 1))
  ]
  for label, value in cells:
    assert f'{label}: {value}' in text


def test_several_runs_share_their_charts(run, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  path = report(runs=[str(run), str(other)], output=str(tmp_path / 'b.html'))
  text = read(path)
  assert text.count('Metrics by step') == 2 and text.count('Curves') == 1
  assert 'run, other' in text
  assert 'run: infer_eval/pronounce/4.jsonl' in text
  # Predictions stand beside each other.
  [table] = re.findall(r'<table class="samples">.*?</table>', open(path).read())
  assert re.findall('<th>(.*?)</th>', table) == [
    'input', 'run', 'other', 'reference',
  ]  # fmt: skip
  assert table.count('<td') == 4 * 3


def test_what_models_write_is_text(run, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  line = {'input': '<script>', 'prediction': '</table>', 'target': '&'}
  (other / 'test').mkdir()
  same = {'input': 1, 'prediction': 2, 'target': 2}
  lines = [json.dumps(line), 'not json', '[]', '{"input": 1}']
  lines += [json.dumps(same), json.dumps({**line, 'target': None})]
  (other / 'test' / 'x.jsonl').write_text('\n'.join(lines))
  with open(other / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 5, "loss": null}\n{"step": "x"}\n[1]\n{"cut')
    file.write('\n{"step": 6, "loss": 1%s}\n' % ('0' * 400))
  with open(other / 'metrics.jsonl', 'ab') as file:
    file.write(b'\xff\xfe\n{"step": 8, "loss": 0.125, "eval/a&b/loss": 7}\n')
  path = report(runs=[str(other)])
  text = read(path)
  assert '<script>' in text and '<script' not in open(path).read()
  assert '0.125' in text and 'a&b' in text
  assert '1 of 3 equal to a reference' in text


def test_results_of_eval_and_odd_texts(tmp_path):
  """A run without a model file; half a surrogate pair; Unicode's line ends."""
  folder = tmp_path / 'eval' / '10'
  folder.mkdir(parents=True)
  (tmp_path / 'eval' / '9').mkdir()
  (tmp_path / 'metrics.jsonl').write_text('{"step": 10, "loss": 1.0}\n')
  (tmp_path / 'model.json').write_text('{"model": {"emb_dim": "x"}}')
  line = {'input': 'a\u2028b', 'prediction': '\ud800', 'target': ['c', 'd']}
  (folder / 'task.jsonl').write_text(
    json.dumps(line) + '\n{"input": "e\u2028f", "prediction": 1, "target": 1}'
  )
  (folder / 'metrics.json').write_text('{"tasks": {"task": {"bleu": 12.5}}}')
  text = read(report(runs=[str(tmp_path)]))
  assert '12.5' in text and 'eval/10/task.jsonl, 1 of 2' in text


@pytest.mark.parametrize(
  ('prediction', 'target', 'right'),
  [
    ('a ', 'a', True),
    ('a', 'b | a', True),
    ('a | b', 'a | b', True),
    ('a', ['b', 'a'], True),
    ('a', 'ab', False),
    (None, 'a', False),
  ],
)
def test_wrong_predictions_are_marked(prediction, target, right):
  assert is_right(prediction, target) == right


def test_an_untrained_run_and_a_damaged_one(run, tmp_path):
  tiny_run.save_untrained(tmp_path / 'new')
  assert 'No metrics yet' in read(report(runs=[str(tmp_path / 'new')]))
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  shutil.rmtree(other / 'checkpoints' / '4' / 'meta')
  assert 'is missing' in read(report(runs=[str(other)]))
  (other / 'model.json').write_text('{"model": [')
  assert 'is not a saved model' in read(report(runs=[str(other)]))


def test_no_run_and_no_place(run, tmp_path, capsys):
  assert main.main(['report', str(tmp_path)]) == 2
  assert 'is no run directory' in capsys.readouterr().err
  with pytest.raises(UsageError, match='cannot be written'):
    report(runs=[str(run)], output='/proc/version/x.html')
  taken = str(run / 'metrics.jsonl')
  assert main.main(['report', str(run), '--output', taken]) == 2
  assert 'a page is named .html' in capsys.readouterr().err
  output = tmp_path / 'new' / 'r.html'
  runs = [str(run), str(run)]
  assert main.main(['report', *runs, '--output', str(output)]) == 0
  assert output.is_file()
