import errno
import gzip
import hashlib
import json
import os
import pathlib
import random

import pytest
from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary
from t5x_lite.errors import UsageError
from t5x_lite.programs.train_vocabulary import train_vocabulary

WORDS = ['house', 'garden', 'tree', 'über', 'naïve', 'walking', 'talked', '42']


@pytest.fixture
def text(tmp_path):
  generator = random.Random(0)
  path = tmp_path / 'text.txt'
  path.write_text('\n'.join(' '.join(generator.choices(WORDS, k=9)) for _ in range(200)))
  return str(path)


def sha256(path):
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize('model_type', ['unigram', 'bpe', 'char'])
def test_trains_what_t5_needs(text, tmp_path, model_type, capsys):
  output = str(tmp_path / 'new' / 'own.model')
  summary = train_vocabulary(
    input=text,
    output=output,
    vocab_size=30 if model_type != 'char' else 25,
    model_type=model_type,
    character_coverage=1.0,
  )
  assert summary['config'] == VocabularyConfig(path=output)
  assert summary['num_sentences'] == 200
  assert summary['unknown_percent'] == 0.0
  assert summary['characters_per_token'] >= (0.9 if model_type == 'char' else 1.1)
  vocabulary = make_vocabulary(summary['config'])
  assert vocabulary.vocab_size == summary['vocab_size'] + 100
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  sentence = 'über house <extra_id_0> walking'
  assert vocabulary.decode(vocabulary.encode(sentence)) == sentence
  assert vocabulary.vocab_size - 1 in vocabulary.encode(sentence)
  assert capsys.readouterr().out.startswith(f'{output}: ')


def test_the_same_text_gives_the_same_bytes(text, tmp_path):
  outputs = [str(tmp_path / f'{i}.model') for i in range(3)]
  for output, seed in zip(outputs, (0, 0, 1), strict=True):
    train_vocabulary(input=text, output=output, vocab_size=30, max_sentences=50, seed=seed)
  assert sha256(outputs[0]) == sha256(outputs[1])
  assert sha256(outputs[0]) != sha256(outputs[2])


def test_reads_all_formats(tmp_path):
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'aaa bbb\n' * 9))
  (tmp_path / 'b.tsv').write_text('ccc\tddd\n' * 9)
  rows = [{'text': 'eee', 'skip': 'fff', 'id': 3}] * 9
  (tmp_path / 'c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  settings = {'vocab_size': 12, 'model_type': 'char', 'character_coverage': 1.0}
  files = [str(tmp_path / name) for name in ('a.txt.gz', 'b.tsv', 'c.jsonl')]
  summary = train_vocabulary(
    input=files, output=str(tmp_path / 'x.model'), vocab_size=10,
    model_type='char', character_coverage=1.0,
  )  # fmt: skip
  assert summary['num_sentences'] == 9 + 18 + 18
  assert summary['unknown_percent'] == 0.0
  summary = train_vocabulary(
    input=files[2],
    fields=('text',),
    output=str(tmp_path / 'y.model'),
    **settings | {'vocab_size': 5},
  )
  assert summary['num_sentences'] == 9
  assert make_vocabulary(summary['config']).encode('f')[-1] == 2


def test_long_lines_and_tabs_are_learnt_from(tmp_path):
  # SentencePiece alone would skip both lines.
  (tmp_path / 'x.txt').write_text('日本' * 4000 + '\n' + 'tab\there zzz\n' * 3)
  summary = train_vocabulary(
    input=str(tmp_path / 'x.txt'),
    output=str(tmp_path / 'x.model'),
    vocab_size=13,
    model_type='char',
    character_coverage=1.0,
  )
  assert summary['num_sentences'] == 6 + 3
  assert 2 not in make_vocabulary(summary['config']).encode('日本 tab zzz')


def test_options(text, tmp_path):
  summary = train_vocabulary(
    input=text,
    output=str(tmp_path / 'x.model'),
    vocab_size=288,
    byte_fallback=True,
    character_coverage=1.0,
    user_defined_symbols=('[SEP]',),
  )
  vocabulary = make_vocabulary(summary['config'])
  assert vocabulary.decode(vocabulary.encode('日 [SEP]')) == '日 [SEP]'
  assert 2 not in vocabulary.encode('日本')
  symbol = vocabulary.encode('[SEP]')[-1]
  assert vocabulary.encode('a[SEP]b').count(symbol) == 1


def test_text_of_a_registered_task(tmp_path):
  summary = train_vocabulary(
    task='translate_en_fr', split='test', output=str(tmp_path / 'x.model'), vocab_size=200
  )
  assert summary['num_sentences'] == 2 * 205
  vocabulary = make_vocabulary(summary['config'])
  # The prefix is in every example, so it has pieces of its own.
  assert len(vocabulary.encode('translate English to French: ')) < 12


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'output': ''}, 'output is empty'),
    ({'input': ()}, 'either input or task'),
    ({'task': 'pronounce'}, 'either input or task'),
    ({'input': 'none.txt'}, 'There is no file'),
    ({'vocab_size': 3}, 'vocab_size is 3'),
    ({'vocab_size': 99_999_999_999}, '4 to 10,000,000'),
    ({'output': '.', 'overwrite': True}, 'is a directory'),
    ({'vocab_size': 20_000}, r'gives no more than \d+ pieces; set it to'),
    ({'vocab_size': 9}, r'characters of this text alone need \d+'),
    ({'model_type': 'word'}, "is 'word'; allowed: bpe, char, unigram"),
    ({'character_coverage': 0.5}, 'character_coverage is 0.5'),
    ({'normalization': 'nfd'}, "normalization is 'nfd'"),
    ({'max_sentences': 0}, 'max_sentences is 0'),
    ({'user_defined_symbols': ('<extra_id_0>',)}, 'T5 defines itself'),
    ({'user_defined_symbols': ('</s>',)}, 'T5 defines itself'),
    ({'user_defined_symbols': ('',)}, "holds '', which is empty"),
    ({'file_format': 'xml'}, "file format is 'xml'"),
  ],
)
def test_errors_write_nothing(text, tmp_path, settings, message):
  output = tmp_path / 'x.model'
  defaults = {'input': text, 'output': str(output), 'vocab_size': 30}
  with pytest.raises(UsageError, match=message):
    train_vocabulary(**defaults | settings)
  assert not output.exists()


def test_a_full_disk_leaves_the_vocabulary_that_was_there(text, tmp_path, monkeypatch):
  output = tmp_path / 'x.model'
  output.write_text('precious')
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def write_half(path, data):
    with open(path, 'wb') as file:
      file.write(data[:9])
    raise full

  monkeypatch.setattr(type(epath.Path(output)), 'write_bytes', write_half)
  with pytest.raises(OSError, match='No space left'):
    train_vocabulary(input=text, output=str(output), vocab_size=30, overwrite=True)
  assert output.read_text() == 'precious'


def test_empty_text_and_existing_output(text, tmp_path):
  (tmp_path / 'empty.txt').write_text('\n  \n')
  output = tmp_path / 'x.model'
  with pytest.raises(UsageError, match=r'There is no text'):
    train_vocabulary(input=str(tmp_path / 'empty.txt'), output=str(output))
  output.write_text('precious')
  settings = {'input': text, 'output': str(output), 'vocab_size': 30}
  with pytest.raises(UsageError, match=r'exists, and models'):
    train_vocabulary(**settings)
  assert output.read_text() == 'precious'
  with pytest.raises(UsageError, match='same file'):
    train_vocabulary(**settings | {'input': str(output)}, overwrite=True)
  assert output.read_text() == 'precious'
  train_vocabulary(**settings, overwrite=True)
  before = vocabularies.fingerprint(VocabularyConfig(path=str(output)))
  train_vocabulary(**settings | {'vocab_size': 28}, overwrite=True)
  after = vocabularies.fingerprint(VocabularyConfig(path=str(output)))
  assert before != after
