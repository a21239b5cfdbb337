"""Objectives as token functions: every token once, every count exact."""

import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data.objectives import denoising
from t5x_lite.errors import UsageError

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
SIZE = VOCABULARY.vocab_size


def seed(i):
  return tf.constant([i, i + 1], tf.int64)


def seeds(i):
  return [seed(2 * i), seed(2 * i + 1000)]


def tokens(n, i=0):
  return np.random.default_rng(i).integers(3, 259, size=n).astype(np.int32)


def one(n):
  """Where the tokens of one sequence are."""
  return tf.ones([1, n], tf.bool)


def corrupt(fn, text, mask, random=()):
  """Applies a function of many sequences to one."""
  mask = np.asarray(mask)
  rows = denoising.Rows(text[np.newaxis], mask[np.newaxis], one(len(text)), VOCABULARY, random)
  return fn(rows)[0].numpy()


def runs(mask):
  """Lengths of the runs of True."""
  return [len(list(g)) for value, g in itertools.groupby(mask) if value]


def join(inputs, targets):
  """Puts the text together again from span-corrupted inputs and targets."""
  spans = {}
  for token in targets:
    if token >= SIZE - 100:
      span = spans.setdefault(int(token), [])
    else:
      span.append(int(token))
  text = []
  for token in inputs:
    text.extend(spans.pop(int(token), [int(token)]))
  # A last sentinel of the targets may mark the text after the last span.
  assert not any(spans.values())
  return text


@pytest.mark.parametrize(
  ('inputs', 'density', 'span', 'tokens_length', 'targets'),
  [
    (512, 0.15, 3.0, 568, 114),  # T5 (t5 gin objectives/span.gin)
    (1024, 0.15, 3.0, 1137, 229),  # mT5 (Xue et al. 2021)
    (1024, 0.15, 20.0, 1193, 189),  # ByT5 (Xue et al. 2022)
    (512, 0.5, 3.0, 766, 512),  # one half: targets as long as the inputs
    (3, 0.15, 3.0, 2, 3),  # the least there is
  ],
)
def test_published_lengths(inputs, density, span, tokens_length, targets):
  assert denoising.random_spans_helper(
    inputs, noise_density=density, mean_noise_span_length=span
  ) == (tokens_length, targets)


@pytest.mark.parametrize('density', [0.05, 0.15, 0.5, 0.8])
@pytest.mark.parametrize('span', [1.0, 3.0, 20.0])
@pytest.mark.parametrize('inputs_length', [3, 7, 33, 128])
def test_lengths_are_exactly_as_solved(inputs_length, density, span):
  settings = {'noise_density': density, 'mean_noise_span_length': span}
  length, targets_length = denoising.random_spans_helper(inputs_length, **settings)
  noise, spans = denoising.num_noise_tokens_and_spans(length, density, span)
  for i in range(2):
    mask = denoising.random_spans_noise_mask(
      one(length), density, seeds(i), mean_noise_span_length=span
    ).numpy()[0]
    assert mask.sum() == noise
    assert len(runs(mask)) == spans
    assert not mask[0] and mask[-1]
    inputs = corrupt(denoising.noise_span_to_unique_sentinel, tokens(length), mask)
    targets = corrupt(denoising.nonnoise_span_to_unique_sentinel, tokens(length), mask)
    assert len(targets) + 1 == targets_length
    assert len(inputs) + 1 <= inputs_length
  # No longer text would fit.
  noise, spans = denoising.num_noise_tokens_and_spans(length + 1, density, span)
  if density != 0.5:
    assert length + 1 - noise + spans + 1 > inputs_length


@pytest.mark.parametrize('length', [1, 2, 3, 5, 20, 113])
@pytest.mark.parametrize(
  'mask_fn', [denoising.random_spans_noise_mask, denoising.iid_noise_mask], ids=['spans', 'iid']
)
def test_inputs_and_targets_hold_every_token_once(length, mask_fn):
  for i in range(5):
    text = tokens(length, i)
    inputs, targets = denoising.denoise_tokens(
      tf.ragged.constant([text]),
      seed(i),
      vocabulary=VOCABULARY,
      noise_density=0.3,
      noise_mask_fn=mask_fn,
      inputs_fn=denoising.noise_span_to_unique_sentinel,
      targets_fn=denoising.nonnoise_span_to_unique_sentinel,
    )
    inputs, targets = inputs[0].numpy(), targets[0].numpy()
    for feature in (inputs, targets):
      sentinels = feature[feature >= SIZE - 100]
      # <extra_id_0> first, then down one by one.
      assert sentinels.tolist() == list(range(SIZE - 1, SIZE - 1 - len(sentinels), -1))
    kept = np.concatenate([inputs, targets])
    assert sorted(kept[kept < SIZE - 100]) == sorted(text)
    # Text that begins with noise shifts the sentinels of the targets by one,
    # in t5 as here; only masks of spans never do.
    if length > 1 and mask_fn is denoising.random_spans_noise_mask:
      assert join(inputs, targets) == text.tolist()


def test_all_masks_are_equally_likely():
  counts = {}
  mask_fn = tf.function(
    lambda seeds: denoising.random_spans_noise_mask(one(6), 0.5, seeds, mean_noise_span_length=1.5)[
      0
    ]
  )
  for i in range(300):
    mask = mask_fn(seeds(i))
    key = ''.join('x' if noise else '.' for noise in mask.numpy())
    counts[key] = counts.get(key, 0) + 1
  # 3 tokens in 2 spans, text first: 2 partitions of either.
  assert set(counts) == {'.x..xx', '.xx..x', '..x.xx', '..xx.x'}
  assert min(counts.values()) > 45


def test_prefix_mask_is_a_uniform_prefix():
  counts = np.zeros(6, int)
  for i in range(300):
    mask = denoising.random_prefix_noise_mask(one(5), 0.5, [seed(i)]).numpy()[0]
    prefix = mask.sum()
    assert mask[:prefix].all() and not mask[prefix:].any()
    counts[prefix] += 1
  assert counts[0] == counts[5] == 0
  assert counts[1:5].min() > 45


def test_iid_mask_has_the_density():
  mask = denoising.iid_noise_mask(one(20_000), 0.15, [seed(0)]).numpy()[0]
  assert mask.mean() == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize('max_spans', [1, 2, 5, 100])
def test_limited_spans_never_need_more_sentinels(max_spans):
  for i in range(5):
    mask = denoising.iid_noise_mask(one(60), 0.5, [seed(i)])
    limited = denoising.limit_spans(mask, max_spans).numpy()[0]
    assert len(runs(limited)) <= max_spans
    assert len(runs(~limited)) <= max_spans
    # Only later spans go, and they go whole.
    assert runs(limited) == runs(mask.numpy()[0])[: max_spans - 1]


def test_whole_text_objectives():
  text = tokens(2000)
  noise = denoising.iid_noise_mask(one(2000), 0.3, [seed(0)]).numpy()[0]
  mass = corrupt(denoising.noise_token_to_sentinel, text, noise)
  assert (mass[noise] == SIZE - 1).all()
  bert = corrupt(denoising.noise_token_to_random_token_or_sentinel, text, noise, seeds(5))
  assert (bert[~noise] == text[~noise]).all()
  random = bert[noise][bert[noise] != SIZE - 1]
  assert len(random) / noise.sum() == pytest.approx(0.1, abs=0.03)
  assert random.min() >= 3
  shuffled = corrupt(denoising.permute_noise_tokens, text, noise, seeds(5))
  assert (shuffled[~noise] == text[~noise]).all()
  assert (shuffled[noise] != text[noise]).any()
  assert sorted(shuffled) == sorted(text)
  dropped = corrupt(denoising.drop_noise_tokens, text, noise)
  kept = corrupt(denoising.drop_nonnoise_tokens, text, noise)
  assert len(dropped) + len(kept) == 2000
  assert (kept == text[noise]).all()


OBJECTIVES = {
  'spans': (
    denoising.random_spans_noise_mask,
    denoising.noise_span_to_unique_sentinel,
    denoising.nonnoise_span_to_unique_sentinel,
  ),
  'drop': (denoising.iid_noise_mask, denoising.drop_noise_tokens, denoising.drop_nonnoise_tokens),
  'prefix': (
    denoising.random_prefix_noise_mask,
    denoising.drop_nonnoise_tokens,
    denoising.drop_noise_tokens,
  ),
  'shuffle': (denoising.iid_noise_mask, denoising.permute_noise_tokens, None),
}


@pytest.mark.parametrize('name', OBJECTIVES)
def test_sequences_of_all_lengths_at_once(name):
  mask_fn, inputs_fn, targets_fn = OBJECTIVES[name]
  texts = [tokens(n, n) for n in (1, 57, 2, 3, 200, 20, 199)]
  inputs, targets = denoising.denoise_tokens(
    tf.ragged.constant(texts),
    seed(3),
    vocabulary=VOCABULARY,
    noise_density=0.15 if name == 'spans' else 0.5,
    noise_mask_fn=mask_fn,
    inputs_fn=inputs_fn,
    targets_fn=targets_fn,
  )
  masks = set()
  for text, a, b in zip(texts, inputs.numpy(), targets.numpy(), strict=True):
    held = np.concatenate([a, b]) if targets_fn else a
    assert sorted(held[held < SIZE - 100]) == sorted(text)
    if name == 'spans' and len(text) > 1:
      assert join(a, b) == text.tolist()
      noise, spans = denoising.num_noise_tokens_and_spans(len(text), 0.15, 3.0)
      assert len(a) == len(text) - noise + spans and len(b) == noise + spans
    masks.add(
      tuple(a[:20] == text[: len(a)][:20]) if name == 'shuffle' else tuple(np.isin(text[:20], a))
    )
  assert len(masks) > 4  # each has its own


@pytest.mark.parametrize('length', [1, 4, 100])
def test_segments_cut_every_row_by_itself(length):
  rows = [tokens(n, n) for n in (10, 0, 3, 4, 1, 8)]
  cut = denoising.segments(
    tf.RaggedTensor.from_row_lengths(np.concatenate(rows), [*map(len, rows)]), length
  )
  wanted = [row[i : i + length].tolist() for row in rows for i in range(0, len(row), length)]
  assert cut.to_list() == wanted


def test_the_seed_decides_and_nothing_else():
  def example(i):
    inputs, targets = denoising.denoise_tokens(
      tf.ragged.constant([tokens(200)]),
      seed(i),
      vocabulary=VOCABULARY,
      noise_density=0.15,
      noise_mask_fn=denoising.random_spans_noise_mask,
      inputs_fn=denoising.noise_span_to_unique_sentinel,
      targets_fn=denoising.nonnoise_span_to_unique_sentinel,
    )
    return inputs.to_list(), targets.to_list()

  assert example(7) == example(7)
  assert example(7) != example(8)


def test_sentinel_capacity():
  capacity = denoising.sentinel_capacity
  assert capacity(VOCABULARY) == 100
  assert capacity(VOCABULARY, 5) == 5
  # ByT5 reuses its last hundred bytes.
  assert capacity(seqio.ByteVocabulary()) == 100
  assert capacity(seqio.PassThroughVocabulary(50)) == 0
  assert capacity(seqio.PassThroughVocabulary(50), 9) == 9
  for wrong in (0, -1, SIZE - 2):
    with pytest.raises(UsageError, match=f'num_sentinels is {wrong}'):
      capacity(VOCABULARY, wrong)


def test_errors():
  solve = denoising.random_spans_helper
  with pytest.raises(UsageError, match=r'at least 3; got 2'):
    solve(2, noise_density=0.15, mean_noise_span_length=3.0)
  for density in (0.0, 1.0, -0.1):
    with pytest.raises(UsageError, match=r'noise_density is'):
      solve(512, noise_density=density, mean_noise_span_length=3.0)
  with pytest.raises(UsageError, match=r'mean_noise_span_length is 0.5'):
    solve(512, noise_density=0.15, mean_noise_span_length=0.5)
