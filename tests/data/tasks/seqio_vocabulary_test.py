"""Our vocabularies against SeqIO's: the same ids and texts, always."""

import random

import pytest
import sentencepiece
import seqio

from t5x_lite.data.tasks.seqio_vocabulary import to_seqio
from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary
from t5x_lite.errors import UsageError

TEXTS = [
  '',
  ' ',
  'pronounce: abandoned',
  'translate English to German: The house is wonderful.',
  'I like <extra_id_0> and jel<extra_id_1>ly <extra_id_99>',
  '<extra_id_100> </s> <pad> <unk>',
  'Zażółć gęślą jaźń, 東京タワー, नमस्ते, 😀 e\u0301 \u2028 \t tab\n line \0 nul',
  '  many   spaces  ',
  '\uff26\uff35\uff2c\uff2c width, \ufb01 ligature, \u00bd',
]


@pytest.fixture(scope='module')
def own_model(tmp_path_factory):
  """A model of a few pieces, trained by SentencePiece itself."""
  prefix = str(tmp_path_factory.mktemp('spm') / 'own')
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS * 3 + ['the cat sat on the mat'] * 9),
    model_prefix=prefix,
    vocab_size=120,
    hard_vocab_limit=False,
    byte_fallback=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return f'{prefix}.model'


@pytest.fixture(
  params=[
    {'extra_ids': 100},
    {'extra_ids': 0},
    {'extra_ids': 300},
    {'own': True, 'extra_ids': 10},
    {'kind': 'byte', 'extra_ids': 0},
    {'kind': 'byte', 'extra_ids': 125},
  ],
  ids=str,
)
def config(request):
  settings = dict(request.param)
  if settings.pop('own', False):
    settings['path'] = request.getfixturevalue('own_model')
  return VocabularyConfig(**settings)


def test_the_same_ids_and_texts(config):
  ours, seqios = make_vocabulary(config), to_seqio(config)
  assert ours.vocab_size == seqios.vocab_size
  assert (ours.pad_id, ours.eos_id, ours.unk_id) == (
    seqios.pad_id, seqios.eos_id, seqios.unk_id,
  )  # fmt: skip
  for text in TEXTS:
    ids = ours.encode(text)
    assert ids == list(seqios.encode(text))
    assert ids == seqios.encode_tf(text).numpy().tolist()
    for tail in ([], [1], [1, 5, 6], [0, 0], [2, 1], [10**6]):
      assert ours.decode(ids + tail) == seqios.decode(ids + tail)
  sentinel = ours.vocab_size - 1
  assert ours.decode([sentinel, 9]) == seqios.decode([sentinel, 9])


def test_the_same_text_for_any_ids(config):
  ours, seqios = make_vocabulary(config), to_seqio(config)
  generator = random.Random(0)
  for _ in range(100):
    ids = generator.choices(range(ours.vocab_size + 30), k=20)
    assert ours.decode(ids) == seqios.decode(ids)


def test_passthrough():
  vocabulary = to_seqio(VocabularyConfig(kind='passthrough', size=77))
  assert vocabulary == seqio.PassThroughVocabulary(77, eos_id=1)


def test_equal_configs_give_one_object():
  assert to_seqio(VocabularyConfig()) is to_seqio(VocabularyConfig())


def test_a_missing_model_is_a_usage_error():
  with pytest.raises(UsageError, match=r'Cannot read the vocabulary'):
    to_seqio(VocabularyConfig(path='none.model'))
