"""The quickstart's vocabulary is what its script makes, and spells words."""

import pathlib

import sentencepiece

from t5x_lite.data import vocabularies
from tests.data import quickstart_vocabulary

CONFIG = vocabularies.VocabularyConfig(path='package:quickstart')


def test_the_script_makes_the_shipped_file(tmp_path):
  output = tmp_path / 'made.model'
  quickstart_vocabulary.make(str(output))
  shipped = pathlib.Path(vocabularies.model_path(CONFIG))
  assert output.read_bytes() == shipped.read_bytes()


def test_words_are_spelt_and_phonemes_are_whole():
  pieces = sentencepiece.SentencePieceProcessor(model_file=vocabularies.model_path(CONFIG))
  assert pieces.encode('pronounce: the', out_type=str)[1:] == list('the')
  assert pieces.encode('DH AH0', out_type=str) == ['▁DH', '▁AH0']
  assert vocabularies.make_vocabulary(CONFIG).vocab_size == 3072
  for phoneme in quickstart_vocabulary.phonemes():
    assert len(pieces.encode(phoneme)) == 1
