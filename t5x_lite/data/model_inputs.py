"""What a user gives a model, texts or ids of any form, as lists of ids; without TensorFlow."""

import logging
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UsageError, check_positive, refusing

log = logging.getLogger(__name__)


def is_text(inputs: Any) -> bool:
  """True for a text or a list of texts; UsageError if it mixes them with something else."""
  if isinstance(inputs, str):
    return True
  if not isinstance(inputs, Sequence) or not inputs:
    return False
  others = [one for one in inputs if not isinstance(one, str)]
  if others and len(others) < len(inputs):
    raise UsageError(f'texts and {type(others[0]).__name__} are mixed in one list')
  return not others


def is_unicode(text: str) -> bool:
  """False for a text with half a surrogate pair, which no vocabulary can encode."""
  return not any('\ud800' <= character <= '\udfff' for character in text)


def token_rows(
  inputs: Any,
  vocabulary: Vocabulary | None,
  *,
  num_ids: int,
  pad_id: int,
  eos: bool = True,
  limit: int | None = None,
) -> list[list[int]]:
  """Returns token ids, one list an input.

  Inputs are a text, a list of texts, or ids below `num_ids`: a list of integers, a list of such
  lists or an array [B, L], whose padding at the end is dropped. Without a vocabulary only ids will
  do. What is longer than `limit` is cut, EOS kept, and a warning counts it. UsageError for others.
  """
  end: list[int] = []
  if is_text(inputs):
    if vocabulary is None:
      fix = 'give ids, or load it with vocabulary=...'
      raise UsageError(f'this model came without a vocabulary: {fix}')
    texts = [inputs] if isinstance(inputs, str) else inputs
    for i, text in enumerate(texts):
      if not is_unicode(text):
        raise UsageError(f'text {i} has half a surrogate pair, which is no Unicode: {text!r:.60}')
    end = [vocabulary.eos_id] if eos else []
    rows = [[*vocabulary.encode(text), *end] for text in texts]
  else:
    rows = _id_rows(inputs, num_ids, pad_id)
  if limit is None:
    return rows
  check_positive('max_input_tokens', limit)
  long = [row for row in rows if len(row) > limit]
  if long:
    log.warning(
      f'{len(long)} of {len(rows)} inputs are longer than max_input_tokens={limit} and were cut; '
      f'the longest has {max(map(len, long))} tokens'
    )
  for row in long:
    del row[limit - len(end) : len(row) - len(end)]
  return rows


def _id_rows(inputs: Any, num_ids: int, pad_id: int) -> list[list[int]]:
  ids = 'token ids (a list of integers, a list of such lists, an array [B, L])'
  wrong = f'{type(inputs).__name__} is no input: give a text, a list of texts, or {ids}'
  with refusing(wrong, TypeError, KeyError, IndexError, ValueError):
    rows = []
    if len(inputs):
      many = [inputs] if np.ndim(inputs[0]) == 0 else inputs
      rows = [[operator.index(i) for i in row] for row in many]
  if not rows:
    raise UsageError('there is no input')
  for row in rows:
    while row and row[-1] == pad_id:
      row.pop()
    for i in row:
      if not 0 <= i < num_ids:
        raise UsageError(f'the id {i} is outside 0 to {num_ids - 1}')
  return rows
