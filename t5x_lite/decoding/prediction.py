"""Predictor: batches of token ids in, output ids out, padded to few sizes.

All decoding but continuous batching goes through `Predictor`. Lengths are padded to one of few
sizes, so that the number of compilations does not depend on the data.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_lite.decoding import steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.loop import Decoded
from t5x_lite.decoding.processors import Processor
from t5x_lite.errors import UsageError
from t5x_lite.models import model_sharding
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.placement import Placement

SHORTEST = 16


def padded_length(length: int, longest: int | None = None, shortest: int = SHORTEST) -> int:
  """Returns the size that `length` tokens or rows are padded to: a power of two within bounds.

  A program is compiled for every size, and so there are few of them.
  """
  size = shortest
  while size < length:
    size *= 2
  return size if longest is None else min(size, longest)


def pad_rows(
  rows: Sequence[Sequence[int]], *, batch_size: int, length: int, pad_id: int
) -> np.ndarray:
  """Returns rows as one [batch_size, length] array; rows past the last are copies of the first.

  A row of nothing but padding would send NaN through an attention without a single key.
  """
  array = np.full((batch_size, length), pad_id, np.int32)
  for i, row in enumerate([*rows, *[rows[0]] * (batch_size - len(rows))]):
    array[i, : len(row)] = row
  return array


def to_host(array: jax.Array) -> np.ndarray:
  """Returns a batch-sharded array whole, on every process."""
  if jax.process_count() == 1:
    return np.asarray(jax.device_get(array))
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@dataclasses.dataclass(frozen=True)
class Output:
  """One output of an input."""

  tokens: list[int]  # its ids, without EOS and padding
  score: float | None  # as `DecodingConfig.normalization` says; None if not asked for
  log_probs: list[float] | None  # of each token, EOS included; None likewise
  ended: str = ''  # of a row of a `ContinuousBatch`: 'eos', 'length', or '' while it goes on


class Predictor:
  """A decoding model: parameters are an argument, compilations are kept."""

  def __init__(
    self,
    model: T5Config,
    *,
    placement: Placement,
    decoding: DecodingConfig,
    batch_size: int,
    max_input_length: int,
    seed: int = 0,
    scored: bool = True,
    extra: tuple[Processor, ...] = (),
    draft: T5Config | None = None,
  ):
    """Compiles nothing yet; UsageError if `decoding`, which holds no texts, or the draft cannot be.

    The model must have a decoder, which continues the inputs where there is no encoder. batch_size
    inputs are decoded at a time, or the next multiple of the mesh's data axes; none has more than
    max_input_length tokens: the caller truncates. Without scores there is some work less. The extra
    processors come after those of `decoding`; a draft is a smaller model, see `speculative`.
    """
    if not model.has_decoder:
      what = f'architecture={model.architecture!r} cannot predict outputs from inputs'
      raise UsageError(f"{what}; it takes 'encoder_decoder' or 'decoder'")
    assert not (decoding.labels or decoding.forbidden_words), 'not resolved'
    _check(model, decoding, draft)
    self.model, self.placement, self.decoding = model, placement, decoding
    self.batch_size, self.max_input_length = placement.whole_batch(batch_size), max_input_length
    self.seed, self._key = seed, jax.random.key(seed % 2**32)
    self.plain = not extra and draft is None
    self._step = model_sharding.jit_step(
      steps.make_predict_step, model, placement, decoding, scored, extra, draft
    )

  def predict_all(
    self,
    params: Any,
    rows: Sequence[Sequence[int]],
    *,
    index: int = 0,
    prefixes: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    limit: int | None = None,
  ) -> list[list[Output]]:
    """Decodes at most `batch_size` inputs; returns the outputs of each.

    The params are as `model_sharding.inference_params` says, of any float dtype, and a pair with a
    draft's; rows are token ids, EOS included if the model expects it. Sampling differs from one
    index of a batch to the next, unless seeds of each row are given. Prefixes are what outputs are
    to begin with: ids that are read in one pass, are no part of the output, and do not count.
    Temperatures of each row, 0 for greedy, are instead of the config's, and the limit of new tokens
    of all rows, if it is no higher.
    """
    assert 0 < len(rows) <= self.batch_size, len(rows)
    longest = max(map(len, rows))
    assert longest <= self.max_input_length, (longest, self.max_input_length)
    size, missing = self.batch_size, self.batch_size - len(rows)
    padded = functools.partial(pad_rows, batch_size=size, pad_id=self.model.pad_id)
    batch: dict[str, np.ndarray] = {}
    if self.model.has_encoder:
      length = padded_length(longest, self.max_input_length)
      batch['encoder_input_tokens'] = padded(rows, length=length)
    else:
      prefixes = rows
    if prefixes is not None:
      read = [[self.model.decoder_start_id, *prefix] for prefix in prefixes]
      read += read[:1] * missing
      length = padded_length(max(map(len, read)), shortest=8)
      batch['decoder_prompt_tokens'] = padded(read, length=length)
      batch['decoder_prompt_lengths'] = np.asarray([len(row) for row in read], np.int32)
    if seeds is None:
      seeds = range(index * size, index * size + len(rows))
    batch['seeds'] = np.asarray([*(x % 2**32 for x in seeds), *[0] * missing], np.uint32)
    if temperatures is not None:
      batch['temperature'] = np.asarray([*temperatures, *[0] * missing], np.float32)
    if limit is not None:
      batch['limit'] = np.full(size, limit, np.int32)
    sharding = partitioning.batch_sharding(self.placement.mesh)
    # Every process holds all rows.
    put = jax.make_array_from_callback
    on_mesh = {name: put(x.shape, sharding, x.__getitem__) for name, x in batch.items()}
    decoded = self._step(params, on_mesh, self._key)
    return _outputs(self.model, self.decoding, decoded, len(rows), limit)


def _check(model: T5Config, decoding: DecodingConfig, draft: T5Config | None) -> None:
  """Refuses ids that the model has no logit for, and a draft that is of no use to it."""
  ids = {name: getattr(decoding, name) for name in ('forbidden_tokens', 'allowed_outputs')}
  ids |= {name: [[getattr(decoding, name) or 0]] for name in ('forced_bos_id', 'forced_eos_id')}
  for name, rows in ids.items():
    for token in itertools.chain(*rows):
      if not 0 <= token < model.vocab_size:
        raise UsageError(f'{name} has the id {token}; the model has 0 to {model.vocab_size - 1}')
  for name in ('architecture', 'vocab_size', 'decoder_start_id', 'eos_id', 'pad_id'):
    ours, theirs = getattr(model, name), getattr(draft or model, name)
    if ours != theirs:
      raise UsageError(f'the draft has {name}={theirs!r}, the model {ours!r}: take one of its kind')
  if draft and decoding.num_beams > 1:
    raise UsageError(f'num_beams is {decoding.num_beams}: a draft is for greedy search and samples')


def _outputs(
  model: T5Config, decoding: DecodingConfig, decoded: Decoded, num_rows: int, limit: int | None
) -> list[list[Output]]:
  tokens, scores, log_probs = (None if x is None else to_host(x).tolist() for x in decoded)
  assert tokens is not None

  def output(i: int, j: int) -> Output:
    row = tokens[i][j][:limit]
    if model.eos_id in row:
      end = row.index(model.eos_id)
      length = end + 1
    else:
      end = length = len(row)
      while end and row[end - 1] == model.pad_id:  # it never ended
        end -= 1
      length = length if decoding.stopper is None else end
    score = None if scores is None else scores[i][j]
    return Output(row[:end], score, None if log_probs is None else log_probs[i][j][:length])

  return [[output(i, j) for j in range(len(tokens[i]))] for i in range(num_rows)]
