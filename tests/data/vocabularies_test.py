import dataclasses
import json
import pathlib

import pytest

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary
from t5x_lite.errors import UsageError

# Against SeqIO itself: tests/data/vocabularies_test.py, which needs TensorFlow.


def test_official_vocabulary_has_its_published_ids():
  vocabulary = make_vocabulary(VocabularyConfig())
  assert vocabulary.vocab_size == 32_100
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  # The example of the Hugging Face T5 documentation.
  assert vocabulary.encode('The house is wonderful.') == [
    37, 629, 19, 1627, 5,
  ]  # fmt: skip
  assert vocabulary.decode([37, 629, 19, 1627, 5, 1, 37]) == ('The house is wonderful.')


@pytest.mark.parametrize('extra_ids', [1, 100, 300])
def test_the_first_sentinel_is_the_last_id(extra_ids):
  vocabulary = make_vocabulary(VocabularyConfig(extra_ids=extra_ids))
  assert vocabulary.vocab_size == 32_000 + extra_ids
  for index in (0, extra_ids // 2, extra_ids - 1):
    sentinel = vocabulary.vocab_size - 1 - index
    assert vocabulary.encode(f'<extra_id_{index}>') == [sentinel]
    assert vocabulary.decode([sentinel]) == f'<extra_id_{index}>'


def test_no_extra_ids_leaves_the_model_as_it_is():
  assert make_vocabulary(VocabularyConfig(extra_ids=0)).vocab_size == 32_000


def test_ids_of_a_padded_embedding_decode_to_unknown():
  vocabulary = make_vocabulary(VocabularyConfig())
  assert vocabulary.decode([37, 32_127]) == vocabulary.decode([37, 2])


def test_bytes():
  vocabulary = make_vocabulary(VocabularyConfig(kind='byte'))
  assert vocabulary.vocab_size == 384
  assert vocabulary.encode('hé\0') == [107, 198, 172, 3]
  assert vocabulary.decode([0, 107, 2, 198, 172, 300, 383, 1, 107]) == 'hé'
  # Half a character is left out.
  assert vocabulary.decode([107, 198]) == 'h'


def test_passthrough_reads_and_writes_numbers():
  vocabulary = make_vocabulary(VocabularyConfig(kind='passthrough', size=50))
  assert vocabulary.encode('7 0 49') == [7, 0, 49]
  assert vocabulary.decode([7, 0, 49, 1, 3]) == '7 0 49 1'
  with pytest.raises(UsageError, match=r'50 is outside 0 to 49'):
    vocabulary.encode('7 50')
  with pytest.raises(UsageError, match=r'not a list of token ids'):
    vocabulary.encode('seven')


@pytest.mark.parametrize(
  'config',
  [VocabularyConfig(), VocabularyConfig(kind='byte'), VocabularyConfig(kind='passthrough', size=9)],
  ids=lambda config: config.kind,
)
def test_negative_ids_are_an_error(config):
  with pytest.raises(UsageError, match=r'Token id -1'):
    make_vocabulary(config).decode([-1])


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'kind': 'spm'}, "kind is 'spm'.*byte"),
    ({'extra_ids': -2}, 'extra_ids is -2'),
    ({'kind': 'byte', 'path': 'x'}, 'only kind=.sentencepiece. reads'),
    ({'kind': 'passthrough'}, 'the number of ids with kind'),
    ({'kind': 'passthrough', 'size': 9, 'extra_ids': 3}, 'counts the sentinels'),
    ({'size': 9}, 'else 0'),
  ],
)
def test_config_errors(settings, message):
  with pytest.raises(UsageError, match=message):
    VocabularyConfig(**settings)


def test_missing_model_and_wrong_file(tmp_path):
  with pytest.raises(UsageError, match=r'Cannot read the vocabulary'):
    make_vocabulary(VocabularyConfig(path=str(tmp_path / 'none.model')))
  wrong = tmp_path / 'wrong.model'
  wrong.write_text('no model')
  with pytest.raises(UsageError, match=r'not a SentencePiece model'):
    make_vocabulary(VocabularyConfig(path=str(wrong)))


def test_equal_configs_share_one_object_and_replace_works():
  config = VocabularyConfig()
  assert make_vocabulary(config) is make_vocabulary(VocabularyConfig())
  assert dataclasses.replace(config, extra_ids=7).extra_ids == 7
  assert config.extra_ids == 100


@pytest.mark.parametrize(
  'config',
  [
    VocabularyConfig(extra_ids=28),
    VocabularyConfig(kind='byte'),
    VocabularyConfig(kind='passthrough', size=9),
  ],
  ids=lambda config: config.kind,
)
def test_a_saved_vocabulary_stands_alone(tmp_path, config):
  directory = tmp_path / 'run'
  vocabularies.save_vocabulary(config, directory)
  moved = directory.rename(tmp_path / 'moved')
  loaded = vocabularies.load_vocabulary(moved)
  assert (loaded.kind, loaded.extra_ids) == (config.kind, config.extra_ids)
  assert vocabularies.fingerprint(loaded) == vocabularies.fingerprint(config)
  text = '3 4' if config.kind == 'passthrough' else 'Übung <extra_id_2>'
  ids = make_vocabulary(config).encode(text)
  assert make_vocabulary(loaded).encode(text) == ids
  if config.kind == 'sentencepiece':
    assert pathlib.Path(loaded.path).parent == moved


def test_load_errors(tmp_path):
  with pytest.raises(UsageError, match=r'holds no vocabulary.json'):
    vocabularies.load_vocabulary(tmp_path)
  vocabularies.save_vocabulary(VocabularyConfig(), tmp_path)
  model = tmp_path / vocabularies.MODEL_FILE
  model.write_bytes(model.read_bytes() + b'\0')
  with pytest.raises(UsageError, match=r'not the model that was saved'):
    vocabularies.load_vocabulary(tmp_path)
  file = tmp_path / vocabularies.VOCABULARY_FILE
  file.write_text(json.dumps({'kind': 'byte', 'colour': 'red'}))
  with pytest.raises(UsageError, match=r'not a saved vocabulary.*colour'):
    vocabularies.load_vocabulary(tmp_path)
  file.write_bytes(b'{"kind": "b\xffte"}')
  with pytest.raises(UsageError, match=r'not a saved vocabulary'):
    vocabularies.load_vocabulary(tmp_path)


def test_saving_a_missing_model_writes_nothing(tmp_path):
  config = VocabularyConfig(path=str(tmp_path / 'none.model'))
  with pytest.raises(UsageError, match=r'Cannot read'):
    vocabularies.save_vocabulary(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_fingerprints_tell_ids_apart():
  configs = [
    VocabularyConfig(),
    VocabularyConfig(extra_ids=0),
    VocabularyConfig(kind='byte'),
    VocabularyConfig(kind='byte', extra_ids=0),
    VocabularyConfig(kind='passthrough', size=9),
  ]
  assert len({vocabularies.fingerprint(config) for config in configs}) == 5


@pytest.mark.parametrize('name', ['../other.model', '/etc/passwd', 'a/b.model'])
def test_a_saved_vocabulary_names_no_file_elsewhere(tmp_path, name):
  vocabularies.save_vocabulary(VocabularyConfig(), tmp_path)
  file = tmp_path / vocabularies.VOCABULARY_FILE
  file.write_text(json.dumps({**json.loads(file.read_text()), 'path': name}))
  with pytest.raises(UsageError, match='not beside it'):
    vocabularies.load_vocabulary(tmp_path)
