"""The few fields of a SentencePiece model file that other formats carry too.

A model file is a protobuf message. Its fields are public and few, so they are
read and written here rather than through the protobuf package.

Source: sentencepiece/src/sentencepiece_model.proto.
"""

import dataclasses
import struct
from collections.abc import Iterator, Sequence

from t5x_lite.errors import UsageError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM = 1

# Field numbers: of ModelProto, of a piece, of the trainer's and normalizer's.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 40, 41, 42, 43
_NAME, _CHARSMAP = 1, 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class Piece:
  """One piece: its text, log-probability, and what kind it is."""

  text: str
  score: float = 0.0
  kind: int = NORMAL


@dataclasses.dataclass(frozen=True)
class Model:
  """What is read of a model file.

  Attributes:
    pieces: in the order of their ids.
    charsmap: the normalisation, compiled by SentencePiece; may be empty.
    model_type: UNIGRAM, or another.
    byte_fallback: unknown characters become pieces of bytes, as in mT5.
  """

  pieces: Sequence[Piece]
  charsmap: bytes = b''
  model_type: int = UNIGRAM
  byte_fallback: bool = False


def parse(data: bytes) -> Model:
  """Reads a model file.

  Raises:
    UsageError: if it is not one.
  """
  pieces: list[Piece] = []
  charsmap, trainer = b'', {}
  try:
    for field, _, value in _fields(data):
      if field == _PIECES:
        pieces.append(_piece(value))
      elif field == _NORMALIZER:
        charsmap = _bytes_of(value).get(_CHARSMAP, b'')
      elif field == _TRAINER:
        trainer = _numbers_of(value)
  except (IndexError, KeyError, struct.error, ValueError) as error:
    raise UsageError(f'not a SentencePiece model: {error}') from error
  if not pieces:
    raise UsageError('not a SentencePiece model: it has no pieces')
  return Model(
    pieces,
    charsmap,
    trainer.get(_MODEL_TYPE, UNIGRAM),
    bool(trainer.get(_BYTE_FALLBACK, 0)),
  )


def _piece(data: bytes) -> Piece:
  parts = _bytes_of(data)
  score = struct.unpack('<f', parts.get(_SCORE, bytes(4)))[0]
  kind = _numbers_of(data).get(_TYPE, NORMAL)
  return Piece(parts[_PIECE].decode(), score, kind)


def _numbers_of(data: bytes) -> dict[int, int]:
  return {field: number for field, number, value in _fields(data) if not value}


def _bytes_of(data: bytes) -> dict[int, bytes]:
  return {field: value for field, _, value in _fields(data) if value}


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
  """Yields (field, number, b'') or (field, 0, bytes) of a message."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    kind, number, value = key & 7, 0, b''
    if kind == _VARINT:
      number, at = _varint(data, at)
    else:
      if kind == _BYTES:
        length, at = _varint(data, at)
      elif kind in (_FIXED32, _FIXED64):
        length = 4 if kind == _FIXED32 else 8
      else:
        raise ValueError(f'unknown wire type {kind}')
      if at + length > len(data):
        raise ValueError('cut short')
      value, at = data[at : at + length], at + length
    yield key >> 3, number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    at += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, at
    shift += 7


def serialize(model: Model) -> bytes:
  """Returns a model file with T5's special ids: pad 0, eos 1, unk 2, no bos."""
  trainer = _int_field(_MODEL_TYPE, model.model_type)
  trainer += _int_field(_VOCAB_SIZE, len(model.pieces))
  trainer += _int_field(_BYTE_FALLBACK, int(model.byte_fallback))
  for field, value in ((_UNK_ID, 2), (_BOS_ID, -1), (_EOS_ID, 1), (_PAD_ID, 0)):
    trainer += _int_field(field, value)
  normalizer = _bytes_field(
    _NAME, b'nmt_nfkc' if model.charsmap else b'identity'
  )
  normalizer += _bytes_field(_CHARSMAP, model.charsmap)
  return (
    b''.join(map(_piece_field, model.pieces))
    + _bytes_field(_TRAINER, trainer)
    + _bytes_field(_NORMALIZER, normalizer)
  )


def insert_pieces(data: bytes, texts: Sequence[str]) -> bytes:
  """Returns a model file with user-defined pieces after the last one.

  Messages that are joined are merged and their lists joined, so the file's own
  bytes are kept as they are.
  """
  return data + b''.join(
    _piece_field(Piece(text, kind=USER_DEFINED)) for text in texts
  )


def _piece_field(piece: Piece) -> bytes:
  entry = _bytes_field(_PIECE, piece.text.encode())
  entry += _key(_SCORE, _FIXED32) + struct.pack('<f', piece.score)
  if piece.kind != NORMAL:
    entry += _int_field(_TYPE, piece.kind)
  return _bytes_field(_PIECES, entry)


def _key(field: int, kind: int) -> bytes:
  return _encode(field << 3 | kind)


def _int_field(field: int, value: int) -> bytes:
  # Negative numbers are written as 64 bits in two's complement.
  return _key(field, _VARINT) + _encode(value % (1 << 64))


def _bytes_field(field: int, value: bytes) -> bytes:
  return _key(field, _BYTES) + _encode(len(value)) + value


def _encode(value: int) -> bytes:
  out = bytearray()
  while value > 0x7F:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  out.append(value)
  return bytes(out)
