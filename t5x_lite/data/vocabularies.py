"""Vocabularies without TensorFlow, with the same ids as SeqIO's.

Inference reads text through this module; the input pipeline has SeqIO's own classes of the same
`VocabularyConfig` (data/tasks/seqio_vocabulary.py). Ids 0, 1, 2 are pad, eos, unk; sentinels are
the last `extra_ids` ids, and <extra_id_0> is the very last one.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import sentencepiece
from etils import epath
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from t5x_lite.errors import UsageError, check_fields, check_one_of, refusing

# Made when imported: a type checker finds no names in it.
proto: Any = sentencepiece_model_pb2

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
SPECIAL_IDS = {'pad_id': PAD_ID, 'eos_id': EOS_ID, 'unk_id': UNK_ID, 'bos_id': -1}

# What each kind has when nothing is said: 100 sentinels as in T5 (Raffel et al. 2020, 3.1.4); 125
# bring the 259 byte ids to the 384 of ByT5's embedding (t5x/examples/t5/byt5/base.gin).
_DEFAULT_EXTRA_IDS = {'sentencepiece': 100, 'byte': 125, 'passthrough': 0}

VOCABULARY_FILE, MODEL_FILE = 'vocabulary.json', 'vocabulary.model'
_PACKAGED = 'package:'


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
  """Names a vocabulary. Two equal configs give the same ids for every text.

  Attributes:
    kind: 'sentencepiece'; 'byte' (UTF-8 bytes plus three, as in ByT5); or 'passthrough' (the data
      already holds ids).
    path: a SentencePiece model file; 'package:NAME' is one that ships with the package (`t5`,
      `quickstart`), and empty means 'package:t5', the official one. Only for 'sentencepiece'.
    extra_ids: number of sentinels after the ordinary ids; -1: 100, of bytes 125, of passthrough 0.
    size: number of ids. Only for 'passthrough'.
  """

  kind: Literal['sentencepiece', 'byte', 'passthrough'] = 'sentencepiece'
  path: str = ''
  extra_ids: int = -1
  size: int = 0

  def __post_init__(self):
    kind, ids = self.kind, self.extra_ids
    check_one_of('VocabularyConfig.kind', kind, _DEFAULT_EXTRA_IDS)
    if ids == -1:
      # Resolved here, so that equal vocabularies compare equal.
      object.__setattr__(self, 'extra_ids', _DEFAULT_EXTRA_IDS[kind])
    reads, passes = kind == 'sentencepiece', kind == 'passthrough'
    right_size = self.size >= 1 if passes else self.size == 0
    counted = "0 with kind='passthrough', where size counts the sentinels; else 0 or more, or -1"
    check_fields(
      self,
      path=(reads or not self.path, "'': only kind='sentencepiece' reads a model file"),
      extra_ids=(ids in (-1, 0) or (ids > 0 and not passes), counted),
      size=(right_size, "the number of ids with kind='passthrough', else 0"),
    )


class Vocabulary:
  """What a program may ask of a vocabulary."""

  pad_id: int = PAD_ID
  eos_id: int = EOS_ID
  unk_id: int | None = UNK_ID  # of what the vocabulary cannot say
  vocab_size: int  # sentinels included
  drops_space: bool = True  # whether decoding drops the space that a text begins with

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    raise NotImplementedError

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to the first EOS."""
    raise NotImplementedError

  def token_texts(self) -> list[bytes]:
    """Returns what each id adds to a text, in UTF-8; b'' for ids that are none of it."""
    raise UsageError('regex and json_schema need a vocabulary of texts')


def _clean(ids: Iterable[int], base_size: int, unk_id: int | None) -> list[int]:
  """Cuts after the first EOS; ids from `base_size` on become unk, as in SeqIO's decode.

  A model whose embedding is padded (32,128 rows for 32,100 ids) can predict such: no error.
  """
  clean = []
  for token in map(int, ids):
    if token < 0:
      raise UsageError(f'Token id {token} cannot be decoded; ids are 0 to {base_size - 1}')
    clean.append(token if unk_id is None or token < base_size else unk_id)
    if token == EOS_ID:
      break
  return clean


class SentencePieceVocabulary(Vocabulary):
  """A SentencePiece model, with sentinels as user-defined pieces at its end."""

  def __init__(self, path: str, *, extra_ids: int):
    """Reads the model, from any file system epath knows; UsageError if it is none of T5's."""
    # The last one first, as seqio/vocabularies.py _load_model_internal has them.
    sentinels = (f'▁<extra_id_{index}>' for index in reversed(range(extra_ids)))
    model = _read_model(path) + user_defined(sentinels)
    self._processor = sentencepiece.SentencePieceProcessor()
    fix = 'train one with `t5x-lite vocab --input FILE --output X.model`'
    with refusing(f'{path} is not a SentencePiece model; {fix}', RuntimeError):
      self._processor.LoadFromSerializedProto(model)
    ids = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
    if ids != (PAD_ID, EOS_ID, UNK_ID):
      fix = 'train with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1, or with `t5x-lite vocab`'
      raise UsageError(f'{path} has pad, eos, unk = {ids}; T5 needs (0, 1, 2): {fix}')
    self.vocab_size = self._processor.GetPieceSize()

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    return self._processor.EncodeAsIds(text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to the first EOS; unk shows as ' ⁇ '."""
    return self._processor.DecodeIds(_clean(ids, self.vocab_size, UNK_ID))

  def token_texts(self) -> list[bytes]:
    """Returns what each id adds to a text, in UTF-8; b'' for ids that are none of it."""
    model, texts = self._processor, []
    for token in range(self.vocab_size):
      piece = model.IdToPiece(token)
      text = bytes.fromhex(piece[3:5]) if model.IsByte(token) else piece.replace('▁', ' ').encode()
      texts.append(b'' if model.IsControl(token) or model.IsUnknown(token) else text)
    return texts

  def piece(self, token: int) -> str:
    """Returns the piece of one id, for display."""
    return self._processor.IdToPiece(token)


class ByteVocabulary(Vocabulary):
  """UTF-8 bytes plus three (Xue et al. 2022, ByT5); decoding drops the rest."""

  base_size = 3 + 256
  drops_space = False

  def __init__(self, *, extra_ids: int):
    self.vocab_size = self.base_size + extra_ids

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    return [byte + 3 for byte in text.encode('utf-8')]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids up to the first EOS, less invalid UTF-8."""
    clean = _clean(ids, self.base_size, UNK_ID)
    return bytes(i - 3 for i in clean if i >= 3).decode('utf-8', 'ignore')

  def token_texts(self) -> list[bytes]:
    """Returns what each id adds to a text; b'' for ids that are no byte."""
    return [bytes([i - 3]) if 3 <= i < 259 else b'' for i in range(self.vocab_size)]


class PassThroughVocabulary(Vocabulary):
  """Ids in, ids out. As text they are decimal numbers between spaces."""

  unk_id = None

  def __init__(self, size: int):
    self.vocab_size = size

  def encode(self, text: str | Sequence[int]) -> list[int]:
    """Returns the ids named by a text such as '17 4 256', without EOS."""
    numbers = "kind='passthrough' reads numbers between spaces"
    with refusing(f'{text!r} is not a list of token ids; {numbers}', ValueError):
      ids = [int(i) for i in (text.split() if isinstance(text, str) else text)]
    if wrong := [token for token in ids if not 0 <= token < self.vocab_size]:
      fix = 'raise VocabularyConfig.size or mend the data'
      raise UsageError(f'Token id {wrong[0]} is outside 0 to {self.vocab_size - 1}; {fix}')
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the ids up to and with the first EOS, between spaces."""
    return ' '.join(str(i) for i in _clean(ids, self.vocab_size, None))


@functools.lru_cache(maxsize=16)
def make_vocabulary(config: VocabularyConfig) -> Vocabulary:
  """Returns the vocabulary of a config, one object for equal ones; UsageError for a bad file."""
  if config.kind == 'byte':
    return ByteVocabulary(extra_ids=config.extra_ids)
  if config.kind == 'passthrough':
    return PassThroughVocabulary(config.size)
  return SentencePieceVocabulary(model_path(config), extra_ids=config.extra_ids)


def model_path(config: VocabularyConfig) -> str:
  """Returns the SentencePiece file of a config; '' is the official T5 one."""
  path = config.path or f'{_PACKAGED}t5'
  if not path.startswith(_PACKAGED):
    return path
  name = f'{path.removeprefix(_PACKAGED)}.sentencepiece.model'
  return str(importlib.resources.files('t5x_lite.data.corpora') / name)


@functools.lru_cache(maxsize=64)
def fingerprint(config: VocabularyConfig) -> str:
  """Returns a short name of the ids: equal for equal ids, wherever the file."""
  if config.kind == 'byte':
    return f'byte{config.extra_ids}'
  if config.kind == 'passthrough':
    return f'ids{config.size}'
  sha256 = hashlib.sha256(_read_model(model_path(config))).hexdigest()
  return f'spm_{sha256[:8]}_{config.extra_ids}'


def save_vocabulary(config: VocabularyConfig, directory: str | os.PathLike) -> None:
  """Writes vocabulary.json and the model file, so the directory stands alone; on one process."""
  entry, directory = dataclasses.asdict(config), epath.Path(directory)
  model = _read_model(model_path(config)) if config.kind == 'sentencepiece' else None
  directory.mkdir(parents=True, exist_ok=True)
  if model is not None:
    (directory / MODEL_FILE).write_bytes(model)
    entry |= {'path': MODEL_FILE, 'sha256': hashlib.sha256(model).hexdigest()}
  # Written last: a directory with a vocabulary.json is complete.
  (directory / VOCABULARY_FILE).write_text(json.dumps(entry, indent=2) + '\n')


def load_vocabulary(directory: str | os.PathLike) -> VocabularyConfig:
  """Reads the config that `save_vocabulary` wrote; its path is in `directory`.

  UsageError if there is none, or the model file is another: a changed one would shift every id.
  """
  directory = epath.Path(directory)
  file = directory / VOCABULARY_FILE
  if not file.exists():
    fix = 'name a run directory that `t5x-lite train` wrote'
    raise UsageError(f'{directory} holds no {VOCABULARY_FILE}; {fix}')
  with refusing(f'{file} is not a saved vocabulary', ValueError, AttributeError, TypeError):
    entry = json.loads(file.read_text())
    sha256 = entry.pop('sha256', None)
    config = VocabularyConfig(**entry)
  if config.kind != 'sentencepiece':
    return config
  if os.path.basename(config.path) != config.path:
    raise UsageError(f'{file} names the file {config.path!r}, which is not beside it')
  path = os.fspath(directory / config.path)
  if hashlib.sha256(_read_model(path)).hexdigest() != sha256:
    why = f'its sha256 is not {sha256}; copy the original back'
    raise UsageError(f'{path} is not the model that was saved with the run: {why}')
  return dataclasses.replace(config, path=path)


def _read_model(path: str) -> bytes:
  fix = "set VocabularyConfig.path to a SentencePiece model, or to '' for the official T5 one"
  kinds = FileNotFoundError, IsADirectoryError, PermissionError
  with refusing(f'Cannot read the vocabulary {path!r}; {fix}', *kinds):
    return epath.Path(path).read_bytes()


def user_defined(texts: Iterable[str]) -> bytes:
  """Returns pieces as bytes to append to a serialized model: protobuf joins the lists of both."""
  kind = proto.ModelProto.SentencePiece.USER_DEFINED
  pieces = [{'piece': text, 'score': 0.0, 'type': kind} for text in texts]
  return proto.ModelProto(pieces=pieces).SerializeToString()


def check_pieces(name: str, pieces: Iterable[str]) -> None:
  """Refuses new pieces that are empty, or those of T5."""
  for piece in pieces:
    if not piece or re.fullmatch(r'<pad>|</s>|<unk>|▁?<extra_id_\d+>', piece):
      why = 'which T5 defines itself' if piece else 'which is empty'
      raise UsageError(f'{name} holds {piece!r}, {why}; leave it out')


def parse_model(data: bytes) -> Any:
  """Returns the ModelProto of a model file; UsageError if it is none."""
  with refusing('not a SentencePiece model', DecodeError):
    model = proto.ModelProto.FromString(data)
  if not model.pieces:
    raise UsageError('not a SentencePiece model: it has no pieces')
  return model


def make_model(
  pieces: Iterable[Any], charsmap: bytes = b'', *, byte_fallback: bool = False
) -> bytes:
  """Returns a unigram model file with T5's special ids and no bos.

  Pieces come in the order of their ids; charsmap is the normalisation as SentencePiece compiles it,
  and may be empty; with byte_fallback unknown characters become pieces of bytes, as in mT5.
  """
  pieces = list(pieces)
  trainer = {'model_type': proto.TrainerSpec.UNIGRAM, 'byte_fallback': byte_fallback}
  trainer |= {'vocab_size': len(pieces), **SPECIAL_IDS}
  name = 'nmt_nfkc' if charsmap else 'identity'
  normalizer = {'name': name, 'precompiled_charsmap': charsmap}
  model = proto.ModelProto(pieces=pieces, trainer_spec=trainer, normalizer_spec=normalizer)
  return model.SerializeToString()
