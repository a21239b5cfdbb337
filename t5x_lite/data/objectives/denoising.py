"""The T5 paper's denoising objectives as functions of one token sequence.

A noise mask says which tokens to corrupt; an inputs function and a targets
function turn tokens and mask into the two features. All are pure TensorFlow
graph code driven by stateless seeds, with the signatures of t5, so that a mask
or function written for t5 drops in. preprocessors.py maps them over data sets.

Source: Raffel et al. 2020, section 3.3; t5/data/preprocessors.py at fce4b1a
(`random_spans_helper` 2646, masks 2874-3043, token functions 3078-3342).
"""

from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from t5x_lite.data.vocabularies import UNK_ID
from t5x_lite.errors import UsageError

# ByT5 (Xue et al. 2022) keeps no ids for sentinels: its own, 259 ids, come
# without extra ids and the last 100 byte ids are reused.
BYT5_SENTINELS = 100

NoiseMaskFn = Callable[..., tf.Tensor]
TokensFn = Callable[..., tf.Tensor]
Seeds = Sequence[tf.Tensor] | tf.Tensor


# ---- Lengths -----------------------------------------------------------------


def num_noise_tokens_and_spans(
  length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
  """Returns how many tokens, in how many spans, are noise among `length`.

  Both are at least one, and at least one token is not noise, as in
  `random_spans_noise_mask`; ties round to even.
  """
  length = max(length, 2)
  tokens = min(max(round(length * noise_density), 1), length - 1)
  spans = max(round(tokens / mean_noise_span_length), 1)
  # Spans of noise alternate with as many spans of text, none of them empty.
  return tokens, min(spans, length - tokens)


def random_spans_helper(
  inputs_length: int,
  *,
  noise_density: float,
  mean_noise_span_length: float,
  extra_tokens_per_span_inputs: int = 1,
  extra_tokens_per_span_targets: int = 1,
) -> tuple[int, int]:
  """Solves for the segment length that fills the inputs after corruption.

  Args:
    inputs_length: tokens of the corrupted inputs, sentinels and EOS included.
    noise_density: share of the tokens that is noise, in (0, 1).
    mean_noise_span_length: tokens per noise span, at least 1.
    extra_tokens_per_span_inputs: sentinels per noise span of the inputs.
    extra_tokens_per_span_targets: sentinels per noise span of the targets.

  Returns:
    `(tokens_length, targets_length)`: the tokens of raw text per example, and
    the length of its targets, sentinels and EOS included. The paper's 512
    inputs take 568 tokens and 114 targets.

  Raises:
    UsageError: if a setting is out of range or the inputs too short to hold a
      token, a sentinel and EOS.

  Source: t5 random_spans_helper. There the count of spans may round to 0, so
  very short inputs get lengths that no mask has; here the count is the mask's.
  """
  check_noise(noise_density, mean_noise_span_length)

  def lengths(tokens_length: int) -> tuple[int, int]:
    noise, spans = num_noise_tokens_and_spans(tokens_length, noise_density, mean_noise_span_length)
    text = tokens_length - noise
    return (
      text + spans * extra_tokens_per_span_inputs + 1,
      noise + spans * extra_tokens_per_span_targets + 1,
    )

  if lengths(2)[0] > inputs_length:
    raise UsageError(
      f'Span corruption needs an inputs length of at least {lengths(2)[0]}; got {inputs_length}'
    )
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

  Args:
    vocabulary: its extra ids are the sentinels.
    num_sentinels: ids to take instead, counted from the end of the vocabulary;
      more than the extra ids means reusing ordinary ids, as t5 does silently
      and ByT5 by design.
  """
  if num_sentinels is not None:
    if not 0 < num_sentinels <= vocabulary.vocab_size - 3:
      raise UsageError(
        f'num_sentinels is {num_sentinels}; this vocabulary allows 1 to {vocabulary.vocab_size - 3}'
      )
    return num_sentinels
  if isinstance(vocabulary, seqio.ByteVocabulary) and not vocabulary.extra_ids:
    return BYT5_SENTINELS
  return vocabulary.extra_ids


# ---- Noise masks -------------------------------------------------------------


def iid_noise_mask(length: tf.Tensor, noise_density: float, seeds: Seeds) -> tf.Tensor:
  """Returns a mask of tokens drawn independently."""
  return tf.random.stateless_uniform([length], seed=seeds[0]) < noise_density


def random_spans_noise_mask(
  length: tf.Tensor, noise_density: float, seeds: Seeds, mean_noise_span_length: float = 3.0
) -> tf.Tensor:
  """Returns a mask of an exact number of noise tokens in exact spans.

  Spans alternate, text first; every mask with the counts of
  `num_noise_tokens_and_spans` is equally likely.

  Args:
    length: number of tokens.
    noise_density: share of noise.
    seeds: two stateless seeds.
    mean_noise_span_length: tokens per noise span.
  """
  padded_length = tf.maximum(length, 2)
  # float64, so that ties round as they do in `num_noise_tokens_and_spans`.
  noise = _round(tf.cast(padded_length, tf.float64) * noise_density)
  noise = tf.clip_by_value(noise, 1, padded_length - 1)
  spans = _round(tf.cast(noise, tf.float64) / mean_noise_span_length)
  spans = tf.clip_by_value(spans, 1, padded_length - noise)
  span_lengths = tf.stack(
    [
      _random_segmentation(padded_length - noise, spans, seeds[1]),
      _random_segmentation(noise, spans, seeds[0]),
    ],
    axis=1,
  )
  mask = tf.repeat(tf.tile([False, True], tf.reshape(spans, [1])), tf.reshape(span_lengths, [-1]))
  return mask[:length]


def random_prefix_noise_mask(length: tf.Tensor, noise_density: float, seeds: Seeds) -> tf.Tensor:
  """Returns a mask of the first tokens: the prefix of a prefix language model.

  The prefix length is uniform between (1 - 2 noise_density) (length - 1), at
  least 1, and length - 1, so with 0.5 every split is equally likely.
  """
  most = length - 1
  least = _round(tf.cast(most, tf.float64) * (1 - 2 * noise_density))
  least = tf.minimum(most, tf.maximum(1, least))
  prefix = tf.random.stateless_uniform(
    [], minval=least, maxval=most + 1, dtype=tf.int32, seed=seeds[0]
  )
  return tf.range(length) < prefix


def limit_spans(noise_mask: tf.Tensor, max_spans: int) -> tf.Tensor:
  """Clears the noise spans past the first `max_spans - 1`.

  Then neither the noise spans nor the text spans between and around them
  outnumber `max_spans` sentinels. t5 would go on into the ordinary ids.
  """
  span = tf.cumsum(tf.cast(_span_starts(noise_mask), tf.int32))
  return noise_mask & (span < max_spans)


# ---- Tokens and mask to inputs or targets ------------------------------------


def noise_span_to_unique_sentinel(
  tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: Seeds = ()
) -> tf.Tensor:
  """Returns the tokens with the i-th noise span as the sentinel of index i."""
  del seeds
  starts = _span_starts(noise_mask)
  sentinels = vocabulary.vocab_size - tf.cumsum(tf.cast(starts, tokens.dtype))
  return tf.boolean_mask(tf.where(starts, sentinels, tokens), starts | ~noise_mask)


def nonnoise_span_to_unique_sentinel(
  tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: Seeds = ()
) -> tf.Tensor:
  """Returns the noise, each span of text between it as the next sentinel."""
  return noise_span_to_unique_sentinel(tokens, ~noise_mask, vocabulary, seeds)


def noise_token_to_sentinel(
  tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: Seeds = ()
) -> tf.Tensor:
  """Returns the tokens with every noise token as <extra_id_0> (MASS-style)."""
  del seeds
  sentinel = tf.cast(vocabulary.vocab_size - 1, tokens.dtype)
  return tf.where(noise_mask, sentinel, tokens)


def noise_token_to_random_token(
  tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary, seeds: Seeds
) -> tf.Tensor:
  """Returns the tokens with every noise token replaced by any ordinary id."""
  random = tf.random.stateless_uniform(
    tf.shape(tokens),
    minval=UNK_ID + 1,  # pad, eos and unk are no text
    maxval=vocabulary.vocab_size,
    dtype=tokens.dtype,
    seed=seeds[0],
  )
  return tf.where(noise_mask, random, tokens)


def noise_token_to_random_token_or_sentinel(
  tokens: tf.Tensor,
  noise_mask: tf.Tensor,
  vocabulary: seqio.Vocabulary,
  seeds: Seeds,
  random_prob: float = 0.1,
) -> tf.Tensor:
  """Returns BERT-style inputs: a random id one time in ten, else a sentinel."""
  use_random = tf.random.stateless_uniform(tf.shape(tokens), seed=seeds[0]) < random_prob
  return tf.where(
    use_random,
    noise_token_to_random_token(tokens, noise_mask, vocabulary, seeds[1:]),
    noise_token_to_sentinel(tokens, noise_mask, vocabulary),
  )


def drop_noise_tokens(
  tokens: tf.Tensor,
  noise_mask: tf.Tensor,
  vocabulary: seqio.Vocabulary | None = None,
  seeds: Seeds = (),
) -> tf.Tensor:
  """Returns the text without the noise."""
  del vocabulary, seeds
  return tf.boolean_mask(tokens, ~noise_mask)


def drop_nonnoise_tokens(
  tokens: tf.Tensor,
  noise_mask: tf.Tensor,
  vocabulary: seqio.Vocabulary | None = None,
  seeds: Seeds = (),
) -> tf.Tensor:
  """Returns the noise alone."""
  del vocabulary, seeds
  return tf.boolean_mask(tokens, noise_mask)


def permute_noise_tokens(
  tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary | None, seeds: Seeds
) -> tf.Tensor:
  """Returns the tokens with the noise shuffled among its own positions."""
  del vocabulary
  positions = tf.where(noise_mask)
  noise = seqio.stateless_shuffle(tf.boolean_mask(tokens, noise_mask), seeds[0])
  return tf.tensor_scatter_nd_update(tokens, positions, noise)


# ---- One example -------------------------------------------------------------


def denoise_tokens(
  tokens: tf.Tensor,
  seed: tf.Tensor,
  *,
  vocabulary: seqio.Vocabulary,
  noise_density: float,
  noise_mask_fn: NoiseMaskFn,
  inputs_fn: TokensFn,
  targets_fn: TokensFn | None = None,
  max_spans: int | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns the inputs and targets of one denoising example, without EOS.

  Args:
    tokens: ids of the original text.
    seed: a stateless seed; the example depends on nothing else.
    vocabulary: gives the sentinels.
    noise_density: passed to `noise_mask_fn`.
    noise_mask_fn: makes the mask from (length, noise_density, seeds).
    inputs_fn: makes the inputs from (tokens, mask, vocabulary, seeds).
    targets_fn: makes the targets likewise; None takes the original text.
    max_spans: sentinels that the two functions may use.
  """
  seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 6))
  noise_mask = noise_mask_fn(tf.size(tokens), noise_density, seeds=seeds[:2])
  if max_spans is not None:
    noise_mask = limit_spans(noise_mask, max_spans)
  inputs = inputs_fn(tokens, noise_mask, vocabulary, seeds=seeds[2:4])
  if targets_fn is None:
    return inputs, tokens
  return inputs, targets_fn(tokens, noise_mask, vocabulary, seeds=seeds[4:])


def _round(x: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.round(x), tf.int32)


def _span_starts(mask: tf.Tensor) -> tf.Tensor:
  """Returns the mask of the first element of every run of True."""
  return mask & ~tf.pad(mask[:-1], [[1, 0]])


def _random_segmentation(
  num_items: tf.Tensor, num_segments: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
  """Returns the lengths of a random partition into non-empty segments."""
  cuts = seqio.stateless_shuffle(
    tf.cast(tf.range(num_items - 1) < num_segments - 1, tf.int32), seed
  )
  segment = tf.cumsum(tf.pad(cuts, [[1, 0]]))
  return tf.math.bincount(segment, minlength=num_segments)
