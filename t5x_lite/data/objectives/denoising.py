"""The T5 paper's denoising objectives as functions of many token sequences at once.

A noise mask says which tokens to corrupt; an inputs function and a targets function turn tokens
and mask into the two features. All are pure TensorFlow graph code driven by stateless seeds.
preprocessors.py maps them over data sets. Shapes: S sequences of up to L tokens, padded; `valid_SL`
says where the tokens are, and no mask is True outside it. t5 has the same functions of one sequence
at a time, where TensorFlow's dispatch of sixty small ops takes most of the time.

Source: Raffel et al. 2020, section 3.3; t5/data/preprocessors.py at fce4b1a
(`random_spans_helper` 2646, masks 2874-3043, token functions 3078-3342).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from t5x_lite.data.vocabularies import UNK_ID
from t5x_lite.errors import UsageError

# ByT5 (Xue et al. 2022) keeps no ids for sentinels: its own, 259 ids, come
# without extra ids and the last 100 byte ids are reused.
BYT5_SENTINELS = 100

NoiseMaskFn = Callable[..., tf.Tensor]  # (valid_SL, noise_density, seeds) -> mask_SL
Seeds = Sequence[tf.Tensor] | tf.Tensor

ragged: Any = tf.RaggedTensor  # TensorFlow's stubs lack its constructors


class Rows(NamedTuple):
  """Sequences, which of their tokens are noise, and what there is to replace it."""

  tokens_SL: tf.Tensor
  noise_SL: tf.Tensor
  valid_SL: tf.Tensor
  vocabulary: seqio.Vocabulary  # gives the sentinels
  seeds: Seeds  # two, stateless


TokensFn = Callable[[Rows], tf.RaggedTensor]


# ---- Lengths -----------------------------------------------------------------


def num_noise_tokens_and_spans(
  length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
  """Returns how many tokens, in how many spans, are noise among `length`.

  At least one span is noise, one token not, as in `random_spans_noise_mask`; ties round to even.
  """
  length = max(length, 2)
  tokens = min(max(round(length * noise_density), 1), length - 1)
  spans = max(round(tokens / mean_noise_span_length), 1)
  # Spans of noise alternate with as many spans of text, none of them empty.
  return tokens, min(spans, length - tokens)


def random_spans_helper(
  inputs_length: int, *, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
  """Solves for the segment length that fills the inputs after corruption.

  Returns `(tokens_length, targets_length)`: the tokens of raw text per example, and the length of
  its targets. Lengths of inputs and targets include a sentinel for each noise span, and EOS; the
  paper's 512 inputs take 568 tokens and 114 targets. UsageError if a setting is out of range or the
  inputs too short to hold a token, a sentinel and EOS.

  Source: t5 random_spans_helper. There the count of spans may round to 0, so
  very short inputs get lengths that no mask has; here the count is the mask's.
  """
  check_noise(noise_density, mean_noise_span_length)

  def lengths(tokens_length: int) -> tuple[int, int]:
    noise, spans = num_noise_tokens_and_spans(tokens_length, noise_density, mean_noise_span_length)
    return tokens_length - noise + spans + 1, noise + spans + 1

  if (least := lengths(2)[0]) > inputs_length:
    needed = f'at least {least}; got {inputs_length}'
    raise UsageError(f'Span corruption needs an inputs length of {needed}')
  # The inputs lose at most the noise and gain at least one token a span.
  tokens_length = 2
  while lengths(tokens_length + 1)[0] <= inputs_length:
    tokens_length += 1
  # t5: at a density of one half make the targets no longer than the inputs,
  # whose length is the one that was set to a round number.
  if noise_density == 0.5 and lengths(tokens_length)[1] > inputs_length:
    tokens_length -= 1
  return tokens_length, lengths(tokens_length)[1]


def check_noise(noise_density: float, mean_noise_span_length: float = 1.0):
  """Raises UsageError for a density or a span length that has no meaning."""
  if not 0.0 < noise_density < 1.0:
    raise UsageError(f'noise_density is {noise_density}; it must lie between 0 and 1')
  if mean_noise_span_length < 1.0:
    raise UsageError(f'mean_noise_span_length is {mean_noise_span_length}; it must be 1 or more')


def sentinel_capacity(vocabulary: seqio.Vocabulary, num_sentinels: int | None = None) -> int:
  """Returns how many spans of one sequence can have a sentinel of their own.

  The sentinels are the extra ids, or `num_sentinels` ids from the end of the vocabulary: more than
  the extra ids means reusing ordinary ones, as t5 does silently and ByT5 by design.
  """
  if num_sentinels is not None:
    most = vocabulary.vocab_size - 3
    if not 0 < num_sentinels <= most:
      raise UsageError(f'num_sentinels is {num_sentinels}; this vocabulary allows 1 to {most}')
    return num_sentinels
  if isinstance(vocabulary, seqio.ByteVocabulary) and not vocabulary.extra_ids:
    return BYT5_SENTINELS
  return vocabulary.extra_ids


# ---- Noise masks -------------------------------------------------------------


def iid_noise_mask(valid_SL: tf.Tensor, noise_density: float, seeds: Seeds) -> tf.Tensor:
  """Returns a mask of tokens drawn independently."""
  return valid_SL & (tf.random.stateless_uniform(tf.shape(valid_SL), seed=seeds[0]) < noise_density)


def random_spans_noise_mask(
  valid_SL: tf.Tensor, noise_density: float, seeds: Seeds, mean_noise_span_length: float = 3.0
) -> tf.Tensor:
  """Returns a mask of an exact number of noise tokens in exact spans.

  Spans alternate, text first; all masks of `num_noise_tokens_and_spans` are equally likely.
  """
  length_S = tf.maximum(_lengths(valid_SL), 2)
  # float64, so that ties round as they do in `num_noise_tokens_and_spans`.
  noise_S = _round(tf.cast(length_S, tf.float64) * noise_density)
  noise_S = tf.clip_by_value(noise_S, 1, length_S - 1)
  spans_S = _round(tf.cast(noise_S, tf.float64) / mean_noise_span_length)
  spans_S = tf.clip_by_value(spans_S, 1, length_S - noise_S)
  text_SK = _random_segmentation(length_S - noise_S, spans_S, seeds[1])
  noise_SK = _random_segmentation(noise_S, spans_S, seeds[0])
  # A noise span begins where its text ends, behind the noise before it.
  starts_SK = text_SK + tf.pad(noise_SK[:, :-1], [[0, 0], [1, 0]])
  bounds = tf.stack([starts_SK, text_SK + noise_SK], axis=2)
  bounds = tf.reshape(bounds, [tf.shape(bounds)[0], -1])
  positions_SL = tf.zeros_like(valid_SL, tf.int32) + tf.range(tf.shape(valid_SL)[1])
  passed_SL = tf.searchsorted(bounds, positions_SL, side='right')
  return valid_SL & (passed_SL % 2 == 1)


def random_prefix_noise_mask(valid_SL: tf.Tensor, noise_density: float, seeds: Seeds) -> tf.Tensor:
  """Returns a mask of the first tokens: the prefix of a prefix language model.

  The prefix length is uniform between (1 - 2 noise_density) (length - 1), at
  least 1, and length - 1, so with 0.5 every split is equally likely.
  """
  most_S = _lengths(valid_SL) - 1
  least_S = _round(tf.cast(most_S, tf.float64) * (1 - 2 * noise_density))
  least_S = tf.minimum(most_S, tf.maximum(1, least_S))
  share_S = tf.random.stateless_uniform(tf.shape(most_S), seed=seeds[0], dtype=tf.float64)
  prefix_S = least_S + tf.cast(share_S * tf.cast(most_S + 1 - least_S, tf.float64), tf.int32)
  return valid_SL & (tf.range(tf.shape(valid_SL)[1]) < prefix_S[:, tf.newaxis])


def limit_spans(noise_mask_SL: tf.Tensor, max_spans: int) -> tf.Tensor:
  """Clears the noise spans past the first `max_spans - 1`.

  Then neither the noise spans nor the text spans between and around them
  outnumber `max_spans` sentinels. t5 would go on into the ordinary ids.
  """
  span_SL = tf.cumsum(tf.cast(_span_starts(noise_mask_SL), tf.int32), axis=1)
  return noise_mask_SL & (span_SL < max_spans)


# ---- Tokens and mask to inputs or targets ------------------------------------


def noise_span_to_unique_sentinel(rows: Rows) -> tf.RaggedTensor:
  """Returns the tokens with the i-th noise span as the sentinel of index i."""
  starts_SL = _span_starts(rows.noise_SL)
  index_SL = tf.cumsum(tf.cast(starts_SL, rows.tokens_SL.dtype), axis=1)
  tokens_SL = tf.where(starts_SL, rows.vocabulary.vocab_size - index_SL, rows.tokens_SL)
  return _kept(tokens_SL, rows.valid_SL & (starts_SL | ~rows.noise_SL))


def nonnoise_span_to_unique_sentinel(rows: Rows) -> tf.RaggedTensor:
  """Returns the noise, each span of text between it as the next sentinel."""
  return noise_span_to_unique_sentinel(rows._replace(noise_SL=rows.valid_SL & ~rows.noise_SL))


def noise_token_to_sentinel(rows: Rows) -> tf.RaggedTensor:
  """Returns the tokens with every noise token as <extra_id_0> (MASS-style)."""
  sentinel = tf.cast(rows.vocabulary.vocab_size - 1, rows.tokens_SL.dtype)
  return _kept(tf.where(rows.noise_SL, sentinel, rows.tokens_SL), rows.valid_SL)


def noise_token_to_random_token_or_sentinel(rows: Rows) -> tf.RaggedTensor:
  """Returns BERT-style inputs: a random id one time in ten, else a sentinel."""
  shape = tf.shape(rows.tokens_SL)
  use_random_SL = tf.random.stateless_uniform(shape, seed=rows.seeds[0]) < 0.1
  random_SL = tf.random.stateless_uniform(
    shape,
    minval=UNK_ID + 1,  # pad, eos and unk are no text
    maxval=rows.vocabulary.vocab_size,
    dtype=rows.tokens_SL.dtype,
    seed=rows.seeds[1],
  )
  noise_SL = tf.where(use_random_SL, random_SL, rows.vocabulary.vocab_size - 1)
  return _kept(tf.where(rows.noise_SL, noise_SL, rows.tokens_SL), rows.valid_SL)


def drop_noise_tokens(rows: Rows) -> tf.RaggedTensor:
  """Returns the text without the noise."""
  return _kept(rows.tokens_SL, rows.valid_SL & ~rows.noise_SL)


def drop_nonnoise_tokens(rows: Rows) -> tf.RaggedTensor:
  """Returns the noise alone."""
  return _kept(rows.tokens_SL, rows.valid_SL & rows.noise_SL)


def permute_noise_tokens(rows: Rows) -> tf.RaggedTensor:
  """Returns the tokens with the noise shuffled among its own positions."""
  keys_SL = tf.random.stateless_uniform(tf.shape(rows.tokens_SL), seed=rows.seeds[0])
  # The noise in random order, then the rest; and for each position which noise it is.
  order_SL = tf.argsort(tf.where(rows.noise_SL, keys_SL, 2.0), axis=1)
  index_SL = tf.cumsum(tf.cast(rows.noise_SL, tf.int32), axis=1, exclusive=True)
  index_SL = tf.gather(
    order_SL, tf.minimum(index_SL, tf.shape(rows.tokens_SL)[1] - 1), batch_dims=1
  )
  shuffled_SL = tf.gather(rows.tokens_SL, index_SL, batch_dims=1)
  return _kept(tf.where(rows.noise_SL, shuffled_SL, rows.tokens_SL), rows.valid_SL)


# ---- Sequences ---------------------------------------------------------------


def segments(tokens: tf.RaggedTensor, length: tf.Tensor | int) -> tf.RaggedTensor:
  """Cuts every row into segments of `length` tokens, the last of a row perhaps shorter."""
  starts, limits = tokens.row_starts(), tokens.row_limits()
  cuts = tf.ragged.range(starts + length, limits + length, length)
  cuts = tf.minimum(cuts, limits[:, tf.newaxis])
  return ragged.from_row_limits(tokens.values, cuts.values)


def denoise_tokens(
  tokens: tf.RaggedTensor,
  seed: tf.Tensor,
  *,
  vocabulary: seqio.Vocabulary,
  noise_density: float,
  noise_mask_fn: NoiseMaskFn,
  inputs_fn: TokensFn,
  targets_fn: TokensFn | None = None,
  max_spans: int | None = None,
) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
  """Returns the inputs and targets of denoising examples, without EOS.

  The tokens are ids of the original texts, a row an example, and of chance the examples depend on
  nothing but the seed, a stateless one. The targets are the original text if there is no function
  that makes them, and `max_spans` is how many sentinels the two functions may use.
  """
  seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 6))
  tokens_SL = tokens.to_tensor()
  valid_SL = tf.sequence_mask(tokens.row_lengths(), tf.shape(tokens_SL)[1])
  noise_mask_SL = noise_mask_fn(valid_SL, noise_density, seeds=seeds[:2])
  if max_spans is not None:
    noise_mask_SL = limit_spans(noise_mask_SL, max_spans)
  rows = Rows(tokens_SL, noise_mask_SL, valid_SL, vocabulary, seeds[2:4])
  return inputs_fn(rows), tokens if targets_fn is None else targets_fn(
    rows._replace(seeds=seeds[4:])
  )


def _round(x: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.round(x), tf.int32)


def _lengths(valid_SL: tf.Tensor) -> tf.Tensor:
  return tf.reduce_sum(tf.cast(valid_SL, tf.int32), axis=1)


def _kept(tokens_SL: tf.Tensor, keep_SL: tf.Tensor) -> tf.RaggedTensor:
  return ragged.from_row_lengths(tf.boolean_mask(tokens_SL, keep_SL), _lengths(keep_SL))


def _span_starts(mask_SL: tf.Tensor) -> tf.Tensor:
  """Returns the mask of the first element of every run of True."""
  return mask_SL & ~tf.pad(mask_SL[:, :-1], [[0, 0], [1, 0]])


def _random_segmentation(items_S: tf.Tensor, segments_S: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """Returns where the segments of random partitions end, none of them empty.

  Shape [S, K] of the most segments; behind its last segment a row repeats its number of items.
  """
  places, cuts = tf.reduce_max(items_S) - 1, tf.reduce_max(segments_S) - 1
  keys = tf.random.stateless_uniform([tf.size(items_S), places], seed=seed)
  keys = tf.where(tf.range(places) < items_S[:, tf.newaxis] - 1, keys, -1.0)
  # The places with the largest keys are a random choice; only then does order matter.
  ends = tf.math.top_k(keys, k=cuts).indices + 1
  ends = tf.where(tf.range(cuts) < segments_S[:, tf.newaxis] - 1, ends, items_S[:, tf.newaxis])
  return tf.concat([tf.sort(ends, axis=1), items_S[:, tf.newaxis]], axis=1)
