"""Vocabularies as Hugging Face keeps them: spiece.model and tokenizer files.

Folders written by transformers 5 hold only tokenizer.json; its Unigram model says all that a
SentencePiece file does, so one is made from it.
"""

import base64
import json
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, refusing
from t5x_lite.interop import hf
from t5x_lite.runs.files import scratch, write_json

log = logging.getLogger(__name__)

Piece = vocabularies.proto.ModelProto.SentencePiece
SPIECE = 'spiece.model'
TOKENIZER, TOKENIZER_CONFIG = 'tokenizer.json', 'tokenizer_config.json'
SPECIAL = ('<pad>', '</s>', '<unk>')
_META = '▁'
# What JSON of another form raises where it is read.
_MISSHAPEN = (AttributeError, IndexError, KeyError, TypeError)


def read_vocabulary(directory: epath.Path) -> VocabularyConfig | None:
  """Returns the vocabulary of a folder, or None if it has none that we read.

  A model file is made elsewhere if there is only tokenizer.json. UsageError if one is damaged.
  """
  config = _read_json(directory / TOKENIZER_CONFIG)
  if str(config.get('tokenizer_class', '')).startswith('ByT5'):
    return VocabularyConfig(kind='byte', extra_ids=_byte_extra_ids(config))
  tokenizer = directory / TOKENIZER
  entry = _read_json(tokenizer)
  if (directory / SPIECE).is_file():
    extra_ids = config.get('extra_ids')
    if extra_ids is None:
      extra_ids = _sentinels(entry) if tokenizer.is_file() else 100
    _warn_of_added(directory, entry)
    return VocabularyConfig(path=str(directory / SPIECE), extra_ids=_count(extra_ids))
  inner = entry.get('model')
  if not isinstance(inner, dict) or inner.get('type') != 'Unigram':
    return None
  with refusing(f'{tokenizer} is no tokenizer of a Unigram model', *_MISSHAPEN, ValueError):
    model, extra_ids = _model_of_tokenizer(entry)
  _warn_of_added(directory, entry)
  path = scratch() / SPIECE
  path.write_bytes(model)
  return VocabularyConfig(path=str(path), extra_ids=extra_ids)


def _warn_of_added(directory: epath.Path, entry: Mapping[str, Any]) -> None:
  """Tells of tokens that somebody added to the tokenizer, which SentencePiece does not know."""
  with refusing(f'{directory / TOKENIZER} has added_tokens that are none', *_MISSHAPEN):
    known = {pair[0] for pair in (entry.get('model') or {}).get('vocab', ())}
    added = [token['content'] for token in entry.get('added_tokens', ())]
    added += _read_json(directory / 'added_tokens.json')
    lost = [x for x in dict.fromkeys(added) if x not in known and not x.startswith('<extra_id_')]
  if lost:
    some = ', '.join(map(repr, lost[:3]))
    log.warning('%s adds %d tokens (%s): they are read as plain text', directory, len(lost), some)


def _read_json(path: epath.Path) -> dict[str, Any]:
  return hf.read_json(path) if path.is_file() else {}


def _count(value: Any) -> int:
  if isinstance(value, bool) or not isinstance(value, int) or value < 0:
    raise UsageError(f'{TOKENIZER_CONFIG} has extra_ids={value!r:.60}: no number of sentinels')
  return value


def _byte_extra_ids(config: Mapping[str, Any]) -> int:
  # The class writes extra_ids=0 and lists the sentinels themselves.
  listed = config.get('extra_special_tokens') or config.get('additional_special_tokens')
  if isinstance(listed, list) and listed:
    return sum('<extra_id_' in str(token) for token in listed)
  return _count(config.get('extra_ids', 125))


def _sentinels(entry: Mapping[str, Any]) -> int:
  """Returns how many <extra_id_...> end a tokenizer.json's vocabulary."""
  model = entry.get('model')
  vocab = model.get('vocab') if isinstance(model, dict) else None
  if not isinstance(vocab, list):
    return 0
  count = 0
  for pair in reversed(vocab):
    if not isinstance(pair, list) or pair[:1] != [f'<extra_id_{count}>']:
      break
    count += 1
  return count


def _model_of_tokenizer(entry: Mapping[str, Any]) -> tuple[bytes, int]:
  """Returns (the model file of a tokenizer.json, its sentinels)."""
  extra_ids, vocab = _sentinels(entry), entry['model']['vocab']
  byte_fallback = bool(entry['model'].get('byte_fallback'))
  added = {t['content'] for t in entry.get('added_tokens', ())}
  pieces = []
  for token, (text, score) in enumerate(vocab[: len(vocab) - extra_ids]):
    kind = Piece.NORMAL
    if token < len(SPECIAL):
      kind = Piece.UNKNOWN if token == vocabularies.UNK_ID else Piece.CONTROL
    elif byte_fallback and len(text) == 6 and text.startswith('<0x'):
      kind = Piece.BYTE
    elif text in added or text.startswith(f'{_META}<extra_id_'):
      kind = Piece.USER_DEFINED
    pieces.append(Piece(piece=text, score=score, type=kind))
  normalizer, charsmap = entry.get('normalizer') or {}, b''
  for part in normalizer.get('normalizers', [normalizer]):
    if part.get('type') == 'Precompiled':
      charsmap = base64.b64decode(part['precompiled_charsmap'] or '')
  return vocabularies.make_model(pieces, charsmap, byte_fallback=byte_fallback), extra_ids


def check_vocabulary(vocabulary: VocabularyConfig) -> None:
  """Raises UsageError if transformers has no tokenizer for a vocabulary."""
  if vocabulary.kind != 'sentencepiece':
    return
  path = vocabularies.model_path(vocabulary)
  model = vocabularies.parse_model(epath.Path(path).read_bytes())
  if model.trainer_spec.model_type != vocabularies.proto.TrainerSpec.UNIGRAM:
    raise UsageError(f"{path} is not a unigram model; transformers' T5 tokenizer reads only those")


def write_vocabulary(vocabulary: VocabularyConfig, directory: epath.Path):
  """Writes what AutoTokenizer.from_pretrained reads and the model file; of passed ids nothing."""
  if vocabulary.kind == 'passthrough':
    return
  pad, eos, unk = SPECIAL
  config: dict[str, Any] = {'pad_token': pad, 'eos_token': eos, 'unk_token': unk}
  config['extra_ids'] = vocabulary.extra_ids
  if vocabulary.kind == 'byte':
    config['tokenizer_class'] = 'ByT5Tokenizer'
    config['additional_special_tokens'] = _sentinel_names(vocabulary)
  else:
    check_vocabulary(vocabulary)
    data = epath.Path(vocabularies.model_path(vocabulary)).read_bytes()
    model = vocabularies.parse_model(data)
    (directory / SPIECE).write_bytes(data)
    tokenizer = _tokenizer(model, vocabulary)
    (directory / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False))
    # T5Tokenizer has no byte fallback, and cuts at every space; the plain class takes
    # tokenizer.json as it is, and is what mT5's folders need.
    plain = model.trainer_spec.byte_fallback or _spans_words(model)
    config['tokenizer_class'] = 'PreTrainedTokenizerFast' if plain else 'T5Tokenizer'
    if plain:
      del config['extra_ids']
    elif vocabulary.extra_ids:
      config['additional_special_tokens'] = _sentinel_names(vocabulary)
  write_json(directory / TOKENIZER_CONFIG, config)


def _spans_words(model: Any) -> bool:
  return any(_META in piece.piece[1:] for piece in model.pieces)


def _sentinel_names(vocabulary: VocabularyConfig) -> list[str]:
  return [f'<extra_id_{i}>' for i in range(vocabulary.extra_ids)]


def _tokenizer(model: Any, vocabulary: VocabularyConfig) -> dict[str, Any]:
  """Returns a tokenizer.json, by hand: the tokenizers library comes with transformers."""
  pieces, eos = model.pieces, SPECIAL[1]
  texts = [*SPECIAL, *(piece.piece for piece in pieces[len(SPECIAL) :])]
  texts += reversed(_sentinel_names(vocabulary))
  scores = [*(piece.score for piece in pieces), *[0.0] * vocabulary.extra_ids]
  # The rest of the user's own pieces begin a word, and are found by the model itself.
  own = [p.type == Piece.USER_DEFINED and not p.piece.startswith(_META) for p in pieces]
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  tokens = []
  for i, text in enumerate(texts):
    special = i < len(SPECIAL) or i >= len(pieces)
    if special or own[i]:
      tokens.append({'id': i, 'content': text, **flags, 'special': special})
  metaspace = {'type': 'Metaspace', 'replacement': _META, 'prepend_scheme': 'always', 'split': True}
  pre_tokenizers = [{'type': 'WhitespaceSplit'}, metaspace]
  normalizers: list[dict[str, Any]] = []
  if charsmap := model.normalizer_spec.precompiled_charsmap:
    text = base64.b64encode(charsmap).decode()
    normalizers.append({'type': 'Precompiled', 'precompiled_charsmap': text})
  if _spans_words(model):
    # Not cut into words, so that pieces of several are found; SentencePiece takes neighbouring
    # spaces for one.
    metaspace = {**metaspace, 'split': False}
    pre_tokenizers = [metaspace]
    normalizers.append({'type': 'Strip', 'strip_left': True, 'strip_right': True})
    normalizers.append({'type': 'Replace', 'pattern': {'Regex': ' {2,}'}, 'content': ' '})
  normalizer = normalizers[0] if normalizers else None
  if len(normalizers) > 1:
    normalizer = {'type': 'Sequence', 'normalizers': normalizers}
  decoder: dict[str, Any] = metaspace
  if model.trainer_spec.byte_fallback:
    decoder = {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, metaspace]}
  end = {'SpecialToken': {'id': eos, 'type_id': 0}}
  first, second = ({'Sequence': {'id': name, 'type_id': 0}} for name in ('A', 'B'))
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': tokens,
    'normalizer': normalizer,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': pre_tokenizers},
    'post_processor': {
      'type': 'TemplateProcessing',
      'single': [first, end],
      'pair': [first, end, second, end],
      'special_tokens': {eos: {'id': eos, 'ids': [vocabularies.EOS_ID], 'tokens': [eos]}},
    },
    'decoder': decoder,
    'model': {
      'type': 'Unigram',
      'unk_id': vocabularies.UNK_ID,
      'vocab': list(zip(texts, scores, strict=True)),
      'byte_fallback': model.trainer_spec.byte_fallback,
    },
  }
