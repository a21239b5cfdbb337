import json

import pytest

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.programs import finetune as program
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
