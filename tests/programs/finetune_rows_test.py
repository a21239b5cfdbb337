import json
import pathlib
import re

import pytest

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.programs import finetune as program
from t5x_lite.programs import finetune_plan, finetune_rows
from tests import tiny_run


@pytest.fixture(scope='module')
def model():
  return t5x_lite.new(tiny_run.model(), tiny_run.VOCABULARY)


def test_rows_in_memory_become_files_of_the_run(model, tmp_path, monkeypatch):
  rows = [(f'q{i}', f'a{i % 2}') for i in range(40)]
  output = tmp_path / 'out'
  tuned = model.finetune(
    rows,
    output=str(output),
    validation={'question': ['x', 'y'], 'label': ['a0', 'a1']},
    prefix='say: ',
    steps=2,
    num_shown=0,
  )
  assert tuned.step == 2 and tuned.config.emb_dim == model.config.emb_dim
  lines = (output / 'data' / 'train.jsonl').read_text().splitlines()
  assert len(lines) == 40
  assert json.loads(lines[0]) == {'input': 'say: q0', 'target': 'a0'}
  validation = (output / 'data' / 'validation.jsonl').read_text()
  assert json.loads(validation.splitlines()[1])['input'] == 'say: y'
  assert (output / 'export' / 'model.safetensors').exists()
  # The command line runs it again from there.
  found = {}
  monkeypatch.setattr(program, 'finetune', lambda **given: found.update(given))
  gin = (output / 'finetune.gin').read_text()
  assert 'out/start' in gin and 'train.jsonl' in gin and 'prefix' not in gin


def test_unknown_settings_and_rows(model, tmp_path):
  with pytest.raises(UsageError, match="no setting 'num_epochs'"):
    model.finetune([('a', 'b')], output=str(tmp_path / 'o'), num_epochs=3)
  with pytest.raises(UsageError, match='give a path, a list'):
    model.finetune(5, output=str(tmp_path / 'o'))
  assert not (tmp_path / 'o').exists()
  without = t5x_lite.new(tiny_run.model())
  with pytest.raises(UsageError, match='without a vocabulary'):
    without.finetune([('a', 'b')], output=str(tmp_path / 'o'))


def test_the_example_of_the_readme_has_something_to_learn(tmp_path, monkeypatch):
  """Its rows, as `finetune` gets them, from the words that stand there."""
  text = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()
  (code,) = [one for one in re.findall(r'```python\n(.*?)```', text, re.S) if '.finetune(' in one]
  given = {}

  def finetune(data, validation, **arguments):
    given.update(arguments, data=data)
    return 'best'

  monkeypatch.setattr(finetune_rows, 'finetune', finetune)
  model = t5x_lite.new(tiny_run.model(), tiny_run.VOCABULARY)
  monkeypatch.setattr(t5x_lite, 'load', lambda name: model, raising=False)
  monkeypatch.setattr(type(model), '_like_this', lambda self, path: path)
  names: dict = {}
  exec(code, names)
  assert names['tuned'] == 'best' and given['output'] == 'runs/languages'
  (tmp_path / 'rows.jsonl').write_text(
    '\n'.join(json.dumps({'input': a, 'target': b}) for a, b in given['data'])
  )
  parts = program.read_parts(str(tmp_path / 'rows.jsonl'), (), program.Columns(), 0.1)
  assert finetune_plan.choose_metrics(parts['train'].targets) == ('accuracy', 'f1')


def test_too_few_inputs_to_hold_one_out(model, tmp_path):
  rows = [('Das ist gut.', 'German'), ('That is good.', 'English')] * 50
  with pytest.raises(UsageError, match=r"every target is '(German|English)': equal inputs"):
    model.finetune(rows, output=str(tmp_path / 'out'))
