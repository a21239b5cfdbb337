"""SeqIO preprocessors of tokens: sequence shaping and the objectives.

Every random choice comes from a stateless seed that SeqIO hands out (`seqio.map_over_dataset`), so
a seeded pipeline repeats itself exactly and an iterator checkpoint continues it exactly.

An objective is given tokenized documents under `targets`, without EOS, the lengths of its features,
EOS included, and the features, whose vocabulary has the sentinels.

Source: t5/data/preprocessors.py at fce4b1a (`span_corruption` 1931,
`select_random_chunk` 2183, `reduce_concat_tokens` 2216, `split_tokens` 2433,
`denoise` 2846); the differences are said where they are.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import seqio
import tensorflow as tf

from t5x_lite.data.objectives import denoising
from t5x_lite.errors import UsageError, check_one_of

Features = Mapping[str, seqio.Feature]
Lengths = Mapping[str, int] | None

# t5 takes at most this many tokens of a document, so that one long document
# does not fill a shuffle buffer.
MAX_CHUNK_TOKENS = 65536
# Documents whose tokens are joined before they are cut into examples.
CONCAT_DOCUMENTS = 128
# What is corrupted in one go: enough to hide TensorFlow's costs per call, and few
# enough that documents of MAX_CHUNK_TOKENS each stay below 100 MB.
_EXAMPLES_AT_ONCE = 64
_DOCUMENTS_AT_ONCE = 16


# ---- Sequence shaping --------------------------------------------------------


def select_random_chunk(
  dataset: tf.data.Dataset, *, max_length: int = MAX_CHUNK_TOKENS
) -> tf.data.Dataset:
  """Keeps one of the consecutive chunks of `max_length` tokens of an example.

  Shorter examples stay whole and empty ones are dropped; every token is kept
  with the same probability within an example.
  """

  @seqio.map_over_dataset(num_seeds=1)
  def select(example, seed):
    tokens = example['targets']
    num_chunks = tf.cast(tf.math.ceil(tf.size(tokens) / max_length), tf.int32)
    # t5 splits the seed to draw an optional length first; so do we, to make the same choice from
    # the same seed.
    seed = tf.random.experimental.stateless_split(seed, 2)[1]
    chunk = tf.random.stateless_uniform([], maxval=num_chunks, dtype=tf.int32, seed=seed)
    return {'targets': tokens[max_length * chunk : max_length * (chunk + 1)]}

  return select(_drop_empty(dataset))


def reduce_concat_tokens(
  dataset: tf.data.Dataset, *, batch_size: int = CONCAT_DOCUMENTS
) -> tf.data.Dataset:
  """Joins the tokens of `batch_size` examples into one; unlike t5's, it keeps their ids 0."""
  dataset = dataset.map(lambda example: example['targets'])
  return dataset.ragged_batch(batch_size).map(
    lambda tokens: {'targets': tokens.flat_values}, num_parallel_calls=tf.data.AUTOTUNE
  )


def split_tokens(
  dataset: tf.data.Dataset,
  *,
  max_tokens_per_segment: int,
  min_tokens_per_segment: int | None = None,
) -> tf.data.Dataset:
  """Cuts every example into segments, in order, each token in exactly one.

  The last segment may have fewer than `max_tokens_per_segment`. With a minimum, the length of an
  example's segments is drawn log-uniformly from there to the maximum.
  """
  _check_segment(max_tokens_per_segment)

  @seqio.map_over_dataset(num_seeds=1)
  def split(example, seed):
    length = tf.constant(max_tokens_per_segment, tf.int64)
    if min_tokens_per_segment is not None:
      low, high = math.log(min_tokens_per_segment), math.log(max_tokens_per_segment)
      log_length = tf.random.stateless_uniform([], minval=low, maxval=high, seed=seed)
      length = tf.cast(tf.exp(log_length), tf.int64)
    tokens = denoising.segments(_one_row(example['targets']), length)
    return tf.data.Dataset.from_tensor_slices({'targets': tokens})

  return split(_drop_empty(dataset)).flat_map(lambda x: x)


def _check_segment(tokens: int) -> None:
  if tokens < 1:
    raise UsageError(f'Segments of {tokens} tokens hold nothing; raise task_feature_lengths')


def _one_row(tokens: tf.Tensor) -> tf.RaggedTensor:
  return denoising.ragged.from_row_lengths(tokens, [tf.size(tokens)])


def _drop_empty(dataset: tf.data.Dataset) -> tf.data.Dataset:
  return dataset.filter(lambda example: tf.size(example['targets']) > 0)


def _length(sequence_length: Lengths, feature: str) -> int:
  if sequence_length is None or feature not in sequence_length:
    fix = 'set it in task_feature_lengths'
    raise UsageError(f'This objective needs the length of {feature!r}; {fix}')
  return sequence_length[feature]


# ---- Objectives --------------------------------------------------------------


def denoise(
  dataset: tf.data.Dataset,
  output_features: Features,
  *,
  tokens_length: int,
  merge: bool = False,
  **settings: Any,
) -> tf.data.Dataset:
  """Cuts documents into examples and corrupts them, many at a time.

  An example is of `tokens_length` tokens of text; the last of a document has what is left, and with
  `merge` documents are joined before cutting. Settings are those of `denoising.denoise_tokens`.
  """
  vocabulary = output_features['targets'].vocabulary
  if output_features['inputs'].vocabulary != vocabulary:
    found = f'it has {output_features["inputs"].vocabulary} and {vocabulary}'
    raise UsageError(f'A denoising task needs one vocabulary for inputs and targets; {found}')
  _check_segment(tokens_length)

  # One seed for all examples that come of one element.
  @seqio.map_over_dataset(num_seeds=1)
  def corrupt(tokens, seed):
    examples = denoising.segments(tokens, tokens_length)
    inputs, targets = denoising.denoise_tokens(examples, seed, vocabulary=vocabulary, **settings)
    return tf.data.Dataset.from_tensor_slices({'inputs': inputs, 'targets': targets})

  dataset = select_random_chunk(dataset)
  if merge:
    dataset = split_tokens(
      reduce_concat_tokens(dataset), max_tokens_per_segment=tokens_length * _EXAMPLES_AT_ONCE
    ).map(lambda example: _one_row(example['targets']))
  else:
    dataset = dataset.map(lambda example: example['targets']).ragged_batch(_DOCUMENTS_AT_ONCE)
  return corrupt(dataset).flat_map(lambda x: x)


def span_corruption(
  dataset: tf.data.Dataset,
  sequence_length: Lengths,
  output_features: Features,
  *,
  noise_density: float = 0.15,
  mean_noise_span_length: float = 3.0,
  merge_examples_to_reduce_padding: bool = True,
  reserved_for_packing: int = 0,
  num_sentinels: int | None = None,
) -> tf.data.Dataset:
  """The pre-training objective of T5 1.0 and 1.1: spans become sentinels.

  Args:
    dataset: this and the next two are every objective's, as the module says.
    sequence_length: the inputs are filled exactly; the targets must have room for what
      `denoising.random_spans_helper` solves (512 take 114).
    output_features: of one vocabulary.
    noise_density: share of the tokens that is noise.
    mean_noise_span_length: tokens per noise span.
    merge_examples_to_reduce_padding: join documents before cutting.
    reserved_for_packing: tokens by which inputs are shorter, so that several can be packed.
    num_sentinels: see `denoising.sentinel_capacity`.

  UsageError if the targets are too short or the sentinels too few.
  """
  tokens_length, targets_length = denoising.random_spans_helper(
    _length(sequence_length, 'inputs') - reserved_for_packing,
    noise_density=noise_density,
    mean_noise_span_length=mean_noise_span_length,
  )
  _check_targets(sequence_length, targets_length)
  _, spans = denoising.num_noise_tokens_and_spans(
    tokens_length, noise_density, mean_noise_span_length
  )
  _check_sentinels(output_features, num_sentinels, spans)
  return denoise(
    dataset,
    output_features,
    tokens_length=tokens_length,
    merge=merge_examples_to_reduce_padding,
    noise_density=noise_density,
    noise_mask_fn=functools.partial(
      denoising.random_spans_noise_mask, mean_noise_span_length=mean_noise_span_length
    ),
    inputs_fn=denoising.noise_span_to_unique_sentinel,
    targets_fn=denoising.nonnoise_span_to_unique_sentinel,
  )


def iid_denoising(
  dataset: tf.data.Dataset,
  sequence_length: Lengths,
  output_features: Features,
  *,
  noise_density: float = 0.15,
  style: str = 'replace_spans',
  num_sentinels: int | None = None,
) -> tf.data.Dataset:
  """Tokens drawn independently, with a probability, are noise: the variants of the paper's table 5.

  The style is 'replace_spans' (the paper's baseline: each span becomes a sentinel, the targets hold
  the noise), 'drop' (no sentinels; the targets hold the noise), 'mass' (each noise token becomes
  <extra_id_0>, the targets are the whole text) or 'bert' (as 'mass', but one noise token in ten
  becomes a random one). For num_sentinels see `denoising.sentinel_capacity`; the rare sequence with
  more spans keeps its later tokens uncorrupted. UsageError if the style is unknown, the targets are
  too short or the expected number of spans exceeds the sentinels.
  """
  denoising.check_noise(noise_density)
  check_one_of('style', style, _IID_STYLES)
  inputs_fn, targets_fn = _IID_STYLES[style]
  length = _length(sequence_length, 'inputs')
  needed = length
  if targets_fn is not None:  # noise and, where each span has one, sentinels: as many as on average
    marks = 1 - noise_density if style == 'replace_spans' else 0.0
    needed = math.ceil(length * noise_density * (1 + marks))
  _check_targets(sequence_length, min(needed, length))
  max_spans = None
  if style == 'replace_spans':
    # A span starts at a noise token after a token of text.
    expected = math.ceil(length * noise_density * (1 - noise_density))
    max_spans = _check_sentinels(output_features, num_sentinels, expected)
  elif style != 'drop':
    _check_sentinels(output_features, num_sentinels, 1)
  return denoise(
    dataset,
    output_features,
    tokens_length=length - output_features['inputs'].add_eos,
    merge=True,
    noise_density=noise_density,
    noise_mask_fn=denoising.iid_noise_mask,
    inputs_fn=inputs_fn,
    targets_fn=targets_fn,
    max_spans=max_spans,
  )


_IID_STYLES = {
  'replace_spans': (
    denoising.noise_span_to_unique_sentinel,
    denoising.nonnoise_span_to_unique_sentinel,
  ),
  'drop': (denoising.drop_noise_tokens, denoising.drop_nonnoise_tokens),
  'mass': (denoising.noise_token_to_sentinel, None),
  'bert': (denoising.noise_token_to_random_token_or_sentinel, None),
}


def deshuffling(
  dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
  """All tokens shuffled in the inputs, the text as it was in the targets."""
  length = _length(sequence_length, 'inputs')
  _check_targets(sequence_length, length)
  return denoise(
    dataset,
    output_features,
    tokens_length=length - output_features['inputs'].add_eos,
    noise_density=1.0,
    noise_mask_fn=denoising.iid_noise_mask,
    inputs_fn=denoising.permute_noise_tokens,
  )


def prefix_lm(
  dataset: tf.data.Dataset,
  sequence_length: Lengths,
  output_features: Features,
  *,
  noise_density: float = 0.5,
) -> tf.data.Dataset:
  """A random prefix in the inputs, what follows it in the targets.

  The noise density is the mean share of the tokens that are targets; a half makes every split
  equally likely, see `denoising.random_prefix_noise_mask`.
  """
  denoising.check_noise(noise_density)
  tokens = _length(sequence_length, 'inputs') - output_features['inputs'].add_eos
  # What is left by the shortest prefix of `random_prefix_noise_mask`.
  most = tokens - max(1, round((tokens - 1) * (1 - 2 * noise_density)))
  _check_targets(sequence_length, most + output_features['targets'].add_eos)
  return denoise(
    dataset,
    output_features,
    tokens_length=tokens,
    noise_density=noise_density,
    noise_mask_fn=denoising.random_prefix_noise_mask,
    inputs_fn=denoising.drop_nonnoise_tokens,
    targets_fn=denoising.drop_noise_tokens,
  )


def with_mode(
  dataset: tf.data.Dataset,
  sequence_length: Lengths,
  output_features: Features,
  *,
  mode: str,
  objective: Callable[..., tf.data.Dataset],
) -> tf.data.Dataset:
  """Another objective, whose inputs begin with the tokens of a text, UL2's '[R]', in their length.

  Source: Tay et al. 2022, section 3.1.2: the mode as tokens of the vocabulary.
  """
  ids = output_features['inputs'].vocabulary.encode(mode)
  shorter = {**(sequence_length or {}), 'inputs': _length(sequence_length, 'inputs') - len(ids)}
  dataset = objective(dataset, shorter, output_features)

  def prepend(example):
    return {**example, 'inputs': tf.concat([tf.cast(ids, tf.int32), example['inputs']], 0)}

  return dataset.map(prepend, num_parallel_calls=tf.data.AUTOTUNE)


def full_lm(
  dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
  """Targets alone: text cut to length, EOS only where a document ends."""
  dataset = select_random_chunk(dataset)
  dataset = seqio.preprocessors.append_eos(dataset, output_features)
  dataset = reduce_concat_tokens(dataset)
  return split_tokens(dataset, max_tokens_per_segment=_length(sequence_length, 'targets'))


def _check_targets(sequence_length: Lengths, needed: int) -> None:
  length = _length(sequence_length, 'targets')
  if length < needed:
    inputs = _length(sequence_length, 'inputs')
    given = f'inputs, and task_feature_lengths has {length} for targets; set it to {needed}'
    raise UsageError(f'This objective makes targets of {needed} tokens from {inputs} {given}')


def _check_sentinels(output_features: Features, num_sentinels: int | None, spans: int) -> int:
  """Returns the sentinels there are, if they are enough for the spans."""
  capacity = denoising.sentinel_capacity(output_features['targets'].vocabulary, num_sentinels)
  if spans > capacity:
    need = f'The objective needs {spans} sentinels per sequence and the vocabulary has {capacity}'
    fix = 'make the sequences shorter, or set num_sentinels to reuse ordinary ids'
    raise UsageError(f'{need}; raise VocabularyConfig.extra_ids, {fix}')
  return capacity
