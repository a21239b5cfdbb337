"""Tokenizers against transformers' AutoTokenizer, both ways."""

import json

import pytest
import sentencepiece
from etils import epath

from t5x_lite import errors
from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import hf_tokenizer

transformers = pytest.importorskip('transformers')

TEXTS = (
  'translate English to German: That is good.',
  'Hi  {a}\n b é ﬁ ½',
  'Zürich - „Grüße“ 2021, 日本語 😀',
  '',
)
SENTINELS = '<extra_id_0> walks in <extra_id_1> park'


@pytest.fixture(scope='module')
def byte_fallback(tmp_path_factory):
  """A model as mT5's: byte pieces, and its sentinels are pieces of its own."""
  folder = tmp_path_factory.mktemp('spm')
  text = folder / 'text'
  words = 'the cat sat on a mat and the dog ran to the red house'.split()
  text.write_text('\n'.join(' '.join(words[i:] + words[:i]) for i in range(len(words))))
  sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(folder / 'm'), vocab_size=320,
    byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    user_defined_symbols=['▁<extra_id_1>', '▁<extra_id_0>'],
    hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  return VocabularyConfig(path=str(folder / 'm.model'), extra_ids=0)


def written(vocabulary, folder, model_type='t5'):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({'model_type': model_type}))
  hf_tokenizer.write_vocabulary(vocabulary, epath.Path(folder))
  return transformers.AutoTokenizer.from_pretrained(folder)


def same_ids(tokenizer, vocabulary, texts):
  ours = vocabularies.make_vocabulary(vocabulary)
  for text in texts:
    assert tokenizer(text).input_ids == [*ours.encode(text), ours.eos_id]


@pytest.mark.parametrize('model_type', ['t5', 'mt5', 'umt5'])
def test_the_official_vocabulary(model_type, tmp_path):
  vocabulary = VocabularyConfig()
  tokenizer = written(vocabulary, tmp_path / 'a', model_type)
  assert len(tokenizer) == 32100
  same_ids(tokenizer, vocabulary, TEXTS)
  ids = tokenizer(SENTINELS).input_ids
  assert ids[0] == 32099 and 32098 in ids
  assert tokenizer.decode(ids[1:3], skip_special_tokens=True) == 'walks in'
  assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1


def test_bytes(tmp_path):
  vocabulary = VocabularyConfig(kind='byte')
  tokenizer = written(vocabulary, tmp_path / 'a')
  assert type(tokenizer).__name__ == 'ByT5Tokenizer'
  assert len(tokenizer) == 384
  same_ids(tokenizer, vocabulary, TEXTS)
  assert tokenizer.convert_tokens_to_ids('<extra_id_0>') == 259
  found = hf_tokenizer.read_vocabulary(epath.Path(tmp_path / 'a'))
  assert found == vocabulary


@pytest.mark.parametrize('model_type', ['t5', 'umt5'])
def test_byte_fallback_as_in_mt5(byte_fallback, model_type, tmp_path):
  tokenizer = written(byte_fallback, tmp_path / 'a', model_type)
  same_ids(
    tokenizer,
    byte_fallback,
    ('the cat sat', 'a zebra', '日本語 the', '<extra_id_0> cat <extra_id_1>'),
  )


def test_what_was_written_is_read_again(tmp_path):
  written(VocabularyConfig(extra_ids=7), tmp_path / 'a')
  found = hf_tokenizer.read_vocabulary(epath.Path(tmp_path / 'a'))
  assert found == VocabularyConfig(path=str(tmp_path / 'a' / hf_tokenizer.SPIECE), extra_ids=7)
  # Without its config, the sentinels are counted in tokenizer.json.
  (tmp_path / 'a' / hf_tokenizer.TOKENIZER_CONFIG).unlink()
  found = hf_tokenizer.read_vocabulary(epath.Path(tmp_path / 'a'))
  assert found.extra_ids == 7


def test_added_tokens_are_told_of(tmp_path, caplog):
  written(VocabularyConfig(extra_ids=7), tmp_path / 'a')
  file = tmp_path / 'a' / hf_tokenizer.TOKENIZER
  hf_tokenizer.read_vocabulary(epath.Path(tmp_path / 'a'))
  assert not caplog.records
  entry = json.loads(file.read_text())
  entry['added_tokens'].append({'id': 32007, 'content': '<sep>', 'special': False})
  file.write_text(json.dumps(entry))
  hf_tokenizer.read_vocabulary(epath.Path(tmp_path / 'a'))
  assert "adds 1 tokens ('<sep>')" in caplog.text


@pytest.mark.parametrize('kind', ['official', 'mt5'])
def test_a_tokenizer_json_alone_gives_the_same_ids(kind, byte_fallback, tmp_path):
  vocabulary = VocabularyConfig() if kind == 'official' else byte_fallback
  tokenizer = written(vocabulary, tmp_path / 'a')
  tokenizer.save_pretrained(tmp_path / 'again')  # as transformers 5 saves it
  assert not (tmp_path / 'again' / hf_tokenizer.SPIECE).exists()
  found = hf_tokenizer.read_vocabulary(epath.Path(tmp_path / 'again'))
  assert found.extra_ids == vocabulary.extra_ids
  ours = vocabularies.make_vocabulary(found)
  before = vocabularies.make_vocabulary(vocabulary)
  assert ours.vocab_size == before.vocab_size
  for text in (*TEXTS, 'the cat sat on a zebra'):
    assert ours.encode(text) == before.encode(text)
    assert ours.decode(ours.encode(text)) == before.decode(before.encode(text))


def test_folders_without_a_vocabulary(tmp_path):
  folder, scratch = epath.Path(tmp_path), epath.Path(tmp_path / 'scratch')
  assert hf_tokenizer.read_vocabulary(folder) is None
  (tmp_path / hf_tokenizer.TOKENIZER).write_text('{"model": {"type": "BPE"}}')
  assert hf_tokenizer.read_vocabulary(folder) is None
  (tmp_path / hf_tokenizer.TOKENIZER).write_text('{')
  with pytest.raises(errors.UsageError, match='is not JSON'):
    hf_tokenizer.read_vocabulary(folder)
  hf_tokenizer.write_vocabulary(VocabularyConfig(kind='passthrough', size=9), scratch)
  assert not scratch.exists()


def test_files_named_in_its_configuration_are_not_opened(tmp_path):
  folder = tmp_path / 'model'
  written(VocabularyConfig(), folder)
  before = hf_tokenizer.read_vocabulary(epath.Path(folder))
  file = folder / 'tokenizer_config.json'
  named = {name: '../../etc/passwd' for name in ('vocab_file', 'tokenizer_file', 'name_or_path')}
  file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
  again = hf_tokenizer.read_vocabulary(epath.Path(folder))
  assert again == before and again.path == str(folder / 'spiece.model')
