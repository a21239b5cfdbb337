"""SentencePiece model files: parsed and made with the sentencepiece package's protobufs."""

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import proto
from t5x_lite.errors import UsageError

Piece: Any = proto.ModelProto.SentencePiece
UNIGRAM = proto.TrainerSpec.UNIGRAM


def parse(data: bytes) -> Any:
  """Returns the ModelProto of a model file; UsageError if it is none."""
  try:
    model = proto.ModelProto.FromString(data)
  except DecodeError as error:
    raise UsageError(f'not a SentencePiece model: {error}') from error
  if not model.pieces:
    raise UsageError('not a SentencePiece model: it has no pieces')
  return model


def make(pieces: Iterable[Any], charsmap: bytes = b'', *, byte_fallback: bool = False) -> bytes:
  """Returns a unigram model file with T5's special ids and no bos.

  Pieces come in the order of their ids; charsmap is the normalisation as SentencePiece compiles it,
  and may be empty; with byte_fallback unknown characters become pieces of bytes, as in mT5.
  """
  pieces = list(pieces)
  trainer = {'model_type': UNIGRAM, 'vocab_size': len(pieces), 'byte_fallback': byte_fallback}
  trainer |= {'pad_id': vocabularies.PAD_ID, 'eos_id': vocabularies.EOS_ID, 'bos_id': -1}
  trainer |= {'unk_id': vocabularies.UNK_ID}
  name = 'nmt_nfkc' if charsmap else 'identity'
  normalizer = {'name': name, 'precompiled_charsmap': charsmap}
  model = proto.ModelProto(pieces=pieces, trainer_spec=trainer, normalizer_spec=normalizer)
  return model.SerializeToString()
