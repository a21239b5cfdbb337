"""The grow_vocab program: a model with more tokens, or more sentinels.

Every piece keeps its embedding bit for bit, under its name: ordinary ids stay where they are, new
tokens follow them, and the sentinels, which SeqIO counts from the end, move behind those. New rows
begin as the mean of the old ones.
"""

import dataclasses
import functools
import logging
import os
import tempfile
from collections.abc import Sequence

import numpy as np
from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import assignment, export, sentencepiece_model
from t5x_lite.interop.checkpoint_source import FORMATS, open_source
from t5x_lite.interop.tensors import Tensor, Tensors
from t5x_lite.models.config import T5Config

log = logging.getLogger(__name__)

# Rows of the tables, so that they divide over a mesh and fill whole tiles.
MULTIPLE = 128

_EMBEDDING = 'token_embedder/embedding'
_HEAD = 'decoder/logits_dense/kernel'
_META = '▁'

# Vocabularies made here live as long as the process; saving copies them.
_SCRATCH: list[tempfile.TemporaryDirectory] = []


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

  Args:
    source: a folder of t5x_lite, transformers or T5X.
    destination: the directory to write; it must not exist yet.
    tokens: new pieces, found in text wherever they stand.
    tokens_file: more of them, one a line.
    extra_ids: number of sentinels in all; as many as there are by default.
    to: format to write: 't5x_lite', 'hf' or 't5x'.
    dry_run: say what would change, write nothing.

  Raises:
    UsageError: if a token is there already, or the model has no vocabulary.
  """
  if to not in FORMATS:
    raise UsageError(f'to is {to!r}; allowed are {", ".join(FORMATS)}')
  target = epath.Path(destination)
  export.check_destination(target)
  if tokens_file:
    tokens = [*tokens, *_lines(tokens_file)]
  opened = open_source(source)
  if opened.vocabulary is None:
    raise UsageError(f'{source} has no vocabulary that could grow')
  found, _ = assignment.assign(opened, opened.config)
  grown, cfg, vocabulary, changes = grow(
    found, opened.config, opened.vocabulary, tokens=tokens, extra_ids=extra_ids
  )
  export.check_target(cfg, to)
  print(changes)
  if dry_run:
    return destination
  export.write(
    target,
    tensors=grown,
    cfg=cfg,
    to=to,
    vocabulary=vocabulary,
    step=opened.step,
    lengths=opened.lengths,
    origin=source,
  )
  log.info('wrote %s', destination)
  return destination


def _lines(path: str) -> list[str]:
  try:
    text = epath.Path(path).read_text()
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}') from error
  return [line for line in text.splitlines() if line]


@dataclasses.dataclass(frozen=True)
class Changes:
  """What growing does: the new id of each old one, ids of the vocabularies, rows of the tables."""

  new_id: np.ndarray
  size: int
  rows: int
  old_size: int
  old_rows: int

  def __str__(self) -> str:
    moved = np.flatnonzero(self.new_id != np.arange(self.old_size))
    text = f'{self.old_size} ids become {self.size}, {self.old_rows} rows {self.rows}'
    if not len(moved):
      return text
    last = f'<extra_id_0> from {moved[-1]} to {self.new_id[moved[-1]]}'
    return f'{text}; {len(moved)} sentinels move with their rows, {last}'


def grow(
  tensors: Tensors,
  cfg: T5Config,
  vocabulary: VocabularyConfig,
  *,
  tokens: Sequence[str] = (),
  extra_ids: int | None = None,
) -> tuple[dict[str, Tensor], T5Config, VocabularyConfig, Changes]:
  """Returns the grown tensors, config and vocabulary, and what changed; see `grow_vocabulary`.

  Raises:
    UsageError: if nothing would grow, or it cannot.
  """
  extra_ids = vocabulary.extra_ids if extra_ids is None else extra_ids
  if extra_ids < vocabulary.extra_ids:
    raise UsageError(
      f'extra_ids is {extra_ids}, the vocabulary has {vocabulary.extra_ids} '
      'already; sentinels can be added, not taken away'
    )
  if not tokens and extra_ids == vocabulary.extra_ids:
    raise UsageError('name new tokens, or more extra_ids than there are')
  old = vocabularies.make_vocabulary(vocabulary)
  if old.vocab_size > cfg.vocab_size:
    raise UsageError(
      f'the vocabulary has {old.vocab_size} ids, the embedding only '
      f'{cfg.vocab_size} rows: they do not belong together'
    )
  path = _with_tokens(vocabulary, tokens) if tokens else vocabulary.path
  new = dataclasses.replace(vocabulary, path=path, extra_ids=extra_ids)
  size = old.vocab_size + len(tokens) + extra_ids - vocabulary.extra_ids
  new_id = np.arange(old.vocab_size)
  first_sentinel = old.vocab_size - vocabulary.extra_ids
  new_id[first_sentinel:] += size - old.vocab_size
  rows = -(-max(size, cfg.vocab_size) // MULTIPLE) * MULTIPLE
  changes = Changes(new_id, size, rows, old.vocab_size, cfg.vocab_size)
  grown = dict(tensors)
  grown[_EMBEDDING] = _grown(tensors[_EMBEDDING], changes)
  if _HEAD in tensors:
    grown[_HEAD] = _grown(tensors[_HEAD].transposed(), changes).transposed()
  return grown, cfg.replace(vocab_size=rows), new, changes


def _with_tokens(vocabulary: VocabularyConfig, tokens: Sequence[str]) -> str:
  """Writes the model file with new pieces and returns its path."""
  if vocabulary.kind != 'sentencepiece':
    raise UsageError(f'a vocabulary of kind {vocabulary.kind!r} has no pieces to add to')
  data = epath.Path(vocabularies.model_path(vocabulary)).read_bytes()
  known = {piece.piece for piece in sentencepiece_model.parse(data).pieces}
  texts = [token.replace(' ', _META) for token in tokens]
  for token, text in zip(tokens, texts, strict=True):
    if not token:
      raise UsageError('a new token is empty')
    if text in known:
      raise UsageError(f'{token!r} is in the vocabulary already')
    known.add(text)
  scratch = tempfile.TemporaryDirectory(prefix='t5x_lite_')
  _SCRATCH.append(scratch)
  grown = epath.Path(scratch.name) / vocabularies.MODEL_FILE
  grown.write_bytes(sentencepiece_model.insert_pieces(data, texts))
  return os.fspath(grown)


def _grown(table: Tensor, changes: Changes) -> Tensor:
  """Returns a table [rows, D] with the old rows at their new ids."""
  whole = functools.cache(lambda: _fill(table.read(), changes))
  shape = (changes.rows, table.shape[1])
  return Tensor(shape, table.dtype, lambda index: whole()[index], f'{table.origin}, grown')


def _fill(old: np.ndarray, changes: Changes) -> np.ndarray:
  used = old[: changes.old_size]
  mean = used.astype(np.float64).mean(0).astype(old.dtype)
  new = np.broadcast_to(mean, (changes.rows, old.shape[1])).copy()
  new[changes.new_id] = used
  # Rows that no id names, before and after, stay as they are.
  spare = slice(changes.size, changes.old_rows)
  new[spare] = old[spare]
  return new
