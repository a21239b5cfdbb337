"""The grow_vocab program: a model with more tokens, or more sentinels.

Every piece keeps its embedding bit for bit: ordinary ids stay, new tokens follow them, and the
sentinels, which SeqIO counts from the end, move behind. New rows begin as the mean of the old ones.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from t5x_lite.data import text_files, vocabularies
from t5x_lite.errors import UsageError, check_one_of
from t5x_lite.interop import assignment, export, trained_model
from t5x_lite.interop.checkpoint_source import FORMATS, Source, open_source
from t5x_lite.interop.tensors import Tensor
from t5x_lite.runs import files

log = logging.getLogger(__name__)

# Rows of the tables, so that they divide over a mesh and fill whole tiles.
MULTIPLE = 128

_EMBEDDING = 'token_embedder/embedding'
_HEAD = 'decoder/logits_dense/kernel'
_META = '▁'


def grow_vocabulary(
  *,
  source: str,
  destination: str,
  tokens: Sequence[str] = (),
  tokens_file: str = '',
  extra_ids: int | None = None,
  to: str = 't5x_lite',
  dry_run: bool = False,
) -> str:
  """Adds tokens or sentinels to a model and returns the directory written.

  UsageError if a token is there already, or the model has no vocabulary.

  Args:
    source: a folder of t5x_lite, transformers or T5X.
    destination: the directory to write; it must not exist yet.
    tokens: new pieces, found in text wherever they stand.
    tokens_file: more of them, one a line.
    extra_ids: number of sentinels in all; as many as there are by default.
    to: format to write: 't5x_lite', 'hf' or 't5x'.
    dry_run: say what would change, write nothing.
  """
  check_one_of('grow_vocabulary.to', to, FORMATS)
  target = export.check_destination(destination)
  if tokens_file:
    tokens = [*tokens, *(line for _, line in text_files.lines(tokens_file) if line)]
  opened = open_source(source)
  found, _ = assignment.assign(opened, opened.config)
  opened = dataclasses.replace(opened, tensors=found)
  grown, changes = grow(opened, tokens=tokens, extra_ids=extra_ids)
  export.check_target(grown.config, to)
  print(changes)
  if not dry_run:
    export.write(target, grown, to=to, origin=source)
    log.info('wrote %s', destination)
  return destination


def grow(
  source: Source, *, tokens: Sequence[str] = (), extra_ids: int | None = None
) -> tuple[Source, str]:
  """Returns the grown model, and what changed; UsageError if nothing can."""
  tensors, cfg, vocabulary = source.tensors, source.config, source.vocabulary
  if vocabulary is None:
    raise UsageError(f'{source.path} has no vocabulary that could grow')
  extra_ids = vocabulary.extra_ids if extra_ids is None else extra_ids
  if not vocabulary.extra_ids <= extra_ids <= 1_000_000:
    there = f'extra_ids is {extra_ids}, the vocabulary has {vocabulary.extra_ids} already'
    raise UsageError(f'{there}; sentinels can be added, up to 1,000,000, not taken away')
  if not tokens and extra_ids == vocabulary.extra_ids:
    raise UsageError('name new tokens, or more extra_ids than there are')
  old = trained_model.check_vocabulary(cfg, vocabulary, 'they do not belong together')
  path = _with_tokens(vocabulary, tokens) if tokens else vocabulary.path
  new = dataclasses.replace(vocabulary, path=path, extra_ids=extra_ids)
  size = old.vocab_size + len(tokens) + extra_ids - vocabulary.extra_ids
  new_id = np.arange(old.vocab_size)
  new_id[old.vocab_size - vocabulary.extra_ids :] += size - old.vocab_size  # of sentinels
  rows = -(-max(size, cfg.vocab_size) // MULTIPLE) * MULTIPLE
  changes = f'{old.vocab_size} ids become {size}, {cfg.vocab_size} rows {rows}'
  if size > old.vocab_size and vocabulary.extra_ids:
    last = f'<extra_id_0> from {old.vocab_size - 1} to {size - 1}'
    changes += f'; {vocabulary.extra_ids} sentinels move with their rows, {last}'
  grown = dict(tensors)
  grown[_EMBEDDING] = _grown(tensors[_EMBEDDING], new_id, size, rows)
  if _HEAD in tensors:
    grown[_HEAD] = _grown(tensors[_HEAD].transposed(), new_id, size, rows).transposed()
  cfg = cfg.replace(vocab_size=rows)
  return dataclasses.replace(source, tensors=grown, config=cfg, vocabulary=new), changes


def _with_tokens(vocabulary: vocabularies.VocabularyConfig, tokens: Sequence[str]) -> str:
  """Writes the model file with new pieces and returns its path."""
  if vocabulary.kind != 'sentencepiece':
    raise UsageError(f'a vocabulary of kind {vocabulary.kind!r} has no pieces to add to')
  data = epath.Path(vocabularies.model_path(vocabulary)).read_bytes()
  known = {piece.piece for piece in vocabularies.parse_model(data).pieces}
  texts = [token.replace(' ', _META) for token in tokens]
  vocabularies.check_pieces('tokens', texts)
  for token, text in zip(tokens, texts, strict=True):
    if text in known:
      raise UsageError(f'{token!r} is in the vocabulary already')
    known.add(text)
  grown = files.scratch() / vocabularies.MODEL_FILE  # saving copies it
  # Messages that are joined are merged and their lists joined, so the file's own bytes stay.
  grown.write_bytes(data + vocabularies.user_defined(texts))
  return os.fspath(grown)


def _grown(table: Tensor, new_id: np.ndarray, size: int, rows: int) -> Tensor:
  """Returns a table [rows, D] with the old rows at their new ids; `size` ids are used."""
  shape = (rows, table.shape[1])

  @functools.cache
  def whole() -> np.ndarray:
    old = table.read()
    used = old[: len(new_id)]
    mean = used.astype(np.float64).mean(0).astype(old.dtype)
    new = np.broadcast_to(mean, shape).copy()
    new[new_id] = used
    # Rows that no id names, before and after, stay as they are.
    spare = slice(size, len(old))
    new[spare] = old[spare]
    return new

  return Tensor(shape, table.dtype, lambda index: whole()[index], f'{table.origin}, grown')
