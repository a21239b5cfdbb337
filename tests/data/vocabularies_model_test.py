import pytest
import sentencepiece

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

TEXTS = (
  'translate English to German: That is good.',
  'Hi  {a}\n b é ﬁ ½',
  'Zürich - „Grüße“ 2021, 日本語',
)


@pytest.fixture(scope='module')
def official():
  path = vocabularies.model_path(VocabularyConfig())
  with open(path, 'rb') as file:
    return file.read()


def processor(data):
  result = sentencepiece.SentencePieceProcessor()
  result.LoadFromSerializedProto(data)
  return result


def test_reads_what_sentencepiece_reads(official):
  model = vocabularies.parse_model(official)
  theirs = processor(official)
  assert len(model.pieces) == theirs.GetPieceSize()
  for i in (0, 1, 2, 3, 4711, len(model.pieces) - 1):
    assert model.pieces[i].piece == theirs.IdToPiece(i)
    assert model.pieces[i].score == pytest.approx(theirs.GetScore(i))
  assert model.trainer_spec.model_type == vocabularies.proto.TrainerSpec.UNIGRAM
  assert model.normalizer_spec.precompiled_charsmap


def test_what_is_made_of_the_pieces_gives_the_same_ids(official):
  model = vocabularies.parse_model(official)
  charsmap = model.normalizer_spec.precompiled_charsmap
  again = vocabularies.make_model(model.pieces, charsmap)
  assert list(vocabularies.parse_model(again).pieces) == list(model.pieces)
  ours, theirs = processor(again), processor(official)
  for text in TEXTS:
    assert ours.EncodeAsIds(text) == theirs.EncodeAsIds(text)
  assert (ours.pad_id(), ours.eos_id(), ours.unk_id()) == (0, 1, 2)
  assert ours.bos_id() == -1


def test_added_pieces_follow_and_change_nothing_else(official):
  grown = official + vocabularies.user_defined(['{', '<html>'])
  ours, theirs = processor(grown), processor(official)
  size = theirs.GetPieceSize()
  assert ours.GetPieceSize() == size + 2
  assert [ours.IdToPiece(size), ours.IdToPiece(size + 1)] == ['{', '<html>']
  assert ours.EncodeAsIds('a { b <html>').count(size) == 1
  assert size + 1 in ours.EncodeAsIds('a { b <html>')
  assert ours.EncodeAsIds(TEXTS[0]) == theirs.EncodeAsIds(TEXTS[0])


@pytest.mark.parametrize('data', [b'', b'\x00\x01', b'not a model', b'\x0a\xff'])
def test_other_files_are_refused(data):
  with pytest.raises(UsageError, match='not a SentencePiece model'):
    vocabularies.parse_model(data)
