import json

import pytest
from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary
from t5x_lite.errors import UsageError
from t5x_lite.runs import run_directory
from tests.models import tiny

BYTES = VocabularyConfig(kind='byte')


def write(path, **overrides):
  arguments = dict(model=tiny.config(), vocabulary=BYTES)
  run_directory.write_run(str(path), **{**arguments, **overrides})


def test_a_run_can_be_opened_again(tmp_path):
  cfg = tiny.config(mlp_activations=('relu',), logits_via_embedding=True)
  write(tmp_path, model=cfg, lengths={'inputs': 8, 'targets': 4})
  assert run_directory.read_model(epath.Path(tmp_path)) == (cfg, {'inputs': 8, 'targets': 4})
  assert vocabularies.load_vocabulary(tmp_path) == BYTES


def test_a_run_carries_its_vocabulary(tmp_path):
  official = VocabularyConfig()
  write(tmp_path / 'a', vocabulary=official)
  moved = (tmp_path / 'a').rename(tmp_path / 'b')
  kept = vocabularies.load_vocabulary(moved)
  ids = make_vocabulary(kept).encode('That is good.')
  assert ids == make_vocabulary(official).encode('That is good.')
  # Written over itself: the copy in the directory is the same vocabulary.
  write(moved, vocabulary=kept)
  assert vocabularies.load_vocabulary(moved) == kept


def test_config_is_recorded(tmp_path):
  write(
    tmp_path,
    config={'model': tiny.config(), 'steps': 3, 'fn': make_vocabulary},
    texts={'sharding.txt': 'table\n'},
  )
  entry = json.loads((tmp_path / 'config.json').read_text())
  assert entry['model']['class'] == 'T5Config'
  assert entry['model']['mlp_activations'] == ['gelu', 'linear']
  assert entry['steps'] == 3
  assert entry['fn'] == 'make_vocabulary'
  assert (tmp_path / 'sharding.txt').read_text() == 'table\n'


def test_what_may_change_when_a_run_continues(tmp_path):
  write(tmp_path)
  free = tiny.config(dropout_rate=0.3, remat_policy='full', dtype='bfloat16')
  check = run_directory.check_resumable
  check(str(tmp_path), model=free, vocabulary=BYTES)
  check(str(tmp_path / 'new'), model=free, vocabulary=BYTES)
  with pytest.raises(UsageError, match='emb_dim=16, the configuration 32'):
    check(str(tmp_path), model=tiny.config(emb_dim=32), vocabulary=BYTES)
  with pytest.raises(UsageError, match='another vocabulary'):
    check(str(tmp_path), model=tiny.config(), vocabulary=VocabularyConfig())


def test_same_vocabulary_goes_by_content(tmp_path):
  official = VocabularyConfig()
  copy = tmp_path / 'copy.model'
  copy.write_bytes(open(vocabularies.model_path(official), 'rb').read())
  same = run_directory.same_vocabulary
  assert same(official, VocabularyConfig(path=str(copy)))
  assert not same(official, VocabularyConfig(path=str(copy), extra_ids=7))
  assert not same(official, BYTES)
  assert same(BYTES, VocabularyConfig(kind='byte'))


def test_what_is_no_run_says_so(tmp_path):
  with pytest.raises(UsageError, match=r'holds no model\.json'):
    run_directory.read_model(epath.Path(tmp_path))
  # Another version's, and with a damaged byte.
  deep, unknown = b'{"a":' * 99_999, b'{"model": {}, "hengths": {}}'
  for damaged in (b'{"model": {"emb_dims": 3}}', b'{"model": {"dtype": "\xff"}}', deep, unknown):
    (tmp_path / 'model.json').write_bytes(damaged)
    with pytest.raises(UsageError, match='not a saved model'):
      run_directory.read_model(epath.Path(tmp_path))
