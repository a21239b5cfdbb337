import html.parser
import json
import pathlib
import shutil

import pytest

from t5x_lite import main
from t5x_lite.errors import UsageError
from t5x_lite.programs.report import report
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
  for part in ('Curves', 'gradient norm by group', 'Evaluations', '4 (kept)',
               'infer_eval/pronounce/phoneme_error_rate', 'Predictions',
               'Attention bias by distance', 'Cost and data', 'emb_dim',
               'config.json'):  # fmt: skip
    assert part in text, part


def test_several_runs_share_their_charts(run, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  text = read(
    report(runs=[str(run), str(other)], output=str(tmp_path / 'both.html'))
  )
  assert text.count('Evaluations') == 2 and text.count('Curves') == 1


def test_what_models_write_is_text(run, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  line = {'input': '<script>', 'prediction': '</table>', 'target': '&'}
  (other / 'test').mkdir()
  lines = [json.dumps(line), 'not json', '[]', '{"input": 1}']
  (other / 'test' / 'x.jsonl').write_text('\n'.join(lines))
  with open(other / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 5, "loss": null}\n{"step": "x"}\n[1]\n{"cut')
  path = report(runs=[str(other)])
  assert '<script>' in read(path) and '<script' not in open(path).read()


def test_an_untrained_run_and_a_damaged_one(run, tmp_path):
  tiny_run.save_untrained(tmp_path / 'new')
  assert 'No metrics yet' in read(report(runs=[str(tmp_path / 'new')]))
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  shutil.rmtree(other / 'checkpoints' / '4' / 'meta')
  assert 'is missing' in read(report(runs=[str(other)]))


def test_no_run_and_no_place(run, tmp_path, capsys):
  assert main.main(['report', str(tmp_path)]) == 2
  assert 'is no run directory' in capsys.readouterr().err
  with pytest.raises(UsageError, match='cannot be written'):
    report(runs=[str(run)], output=str(tmp_path / 'no' / 'x.html'))
  assert main.main(['report', str(run), '--output', str(tmp_path / 'r')]) == 0
