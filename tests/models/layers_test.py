"""Layers against formulas written out here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.models import layers
from tests.models import tiny

RNGS = nnx.Rngs(params=0)


def bucket_by_hand(distance, bidirectional, num_buckets=32, max_distance=128):
  """Raffel et al. 2020, section 2.1, one distance at a time."""
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset = num_buckets if distance > 0 else 0
    n = abs(distance)
  else:
    n = max(-distance, 0)
  exact = num_buckets // 2
  if n < exact:
    return offset + n
  # A hair more than n, so that whole steps of the logarithm round down to
  # themselves (T5X adds float32's epsilon to the ratio).
  log = math.log(n / exact + 1e-7) / math.log(max_distance / exact)
  return offset + min(exact + int(log * (num_buckets - exact)), num_buckets - 1)


@pytest.mark.parametrize('bidirectional', [True, False])
def test_relative_position_bucket(bidirectional):
  distances = np.arange(-300, 301)
  ours = layers.relative_position_bucket(
    distances, bidirectional=bidirectional, num_buckets=32, max_distance=128
  )
  expected = [bucket_by_hand(int(d), bidirectional) for d in distances]
  np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(('L', 'M'), [(1, 1), (7, 7), (5, 40), (40, 5)])
def test_relative_bias_is_the_table_by_bucket(L, M):
  cfg = tiny.config()
  module = layers.RelativePositionBias(cfg, bidirectional=True, rngs=RNGS)
  bias = module(L, M)
  assert bias.shape == (1, cfg.num_heads, L, M)
  table = np.asarray(module.rel_embedding[...])
  for i in range(L):
    for j in range(M):
      np.testing.assert_array_equal(
        bias[0, :, i, j], table[:, bucket_by_hand(j - i, True)]
      )


def test_relative_bias_at_one_position_is_a_row():
  module = layers.RelativePositionBias(
    tiny.config(), bidirectional=False, rngs=RNGS
  )
  full = module(6, 6)
  for i in range(6):
    row = module.at(jnp.asarray(i), 6)
    np.testing.assert_array_equal(row[0, :, 0, :], full[0, :, i, :])
  rows = module.at(jnp.asarray([2, 5]), 6)
  np.testing.assert_array_equal(rows[1, :, 0, :], full[0, :, 5, :])


def test_rms_norm_has_no_mean_and_no_bias():
  cfg = tiny.config()
  module = layers.RMSNorm(cfg, rngs=RNGS)
  x = np.random.default_rng(0).normal(3.0, 2.0, (2, 5, 16)).astype('float32')
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(module(x), expected, rtol=1e-5)


def test_attention_by_hand():
  """No 1/sqrt(head_dim), bias added, masked keys unseen."""
  cfg = tiny.config()
  module = layers.Attention(cfg, rngs=RNGS)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 16)).astype('float32')
  memory = rng.normal(size=(2, 5, 16)).astype('float32')
  bias = rng.normal(size=(1, 4, 3, 5)).astype('float32')
  mask = rng.random((2, 1, 3, 5)) < 0.7
  mask[..., 0] = True
  w = {
    n: np.asarray(getattr(module, n).kernel[...], np.float64)
    for n in ('query', 'key', 'value', 'out')
  }
  expected = np.zeros((2, 3, 16))
  for b in range(2):
    heads = []
    for h in range(4):
      cut = slice(8 * h, 8 * h + 8)
      q, k, v = (
        x[b] @ w['query'][:, cut],
        memory[b] @ w['key'][:, cut],
        memory[b] @ w['value'][:, cut],
      )
      logits = np.where(mask[b, 0], q @ k.T + bias[0, h], -np.inf)
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    expected[b] = np.concatenate(heads, -1) @ w['out']
  ours = module(x, memory, bias_1HLM=bias, mask_B1LM=mask)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_row_with_nothing_to_see_is_finite():
  module = layers.Attention(tiny.config(), rngs=RNGS)
  x = jnp.ones((1, 2, 16))
  mask = jnp.zeros((1, 1, 2, 2), bool)

  def total(x):
    return module(x, x, mask_B1LM=mask).sum()

  assert np.isfinite(jax.grad(total)(x)).all()


def test_dropout_shares_its_mask_over_positions():
  x = jnp.ones((2, 7, 100))
  y = layers.dropout(x, 0.25, jax.random.key(0))
  np.testing.assert_array_equal(y, jnp.broadcast_to(y[:, :1], y.shape))
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
  assert layers.dropout(x, 0.25, None) is x
  apart = layers.dropout(x, 0.25, jax.random.key(0), ())
  assert not (apart == apart[:, :1]).all()


def test_gated_mlp_multiplies():
  cfg = tiny.config()
  module = layers.MLP(cfg, rngs=RNGS)
  x = np.random.default_rng(0).normal(size=(1, 2, 16)).astype('float32')
  wi_0, wi_1, wo = (
    np.asarray(getattr(module, n).kernel[...]) for n in ('wi_0', 'wi_1', 'wo')
  )
  z = x @ wi_0
  tanh = np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
  expected = (0.5 * z * (1 + tanh) * (x @ wi_1)) @ wo
  np.testing.assert_allclose(module(x), expected, atol=1e-5)


def test_initialisers_have_t5xs_deviations():
  cfg = tiny.config(emb_dim=256, mlp_dim=512, head_dim=64, vocab_size=512)
  attention = layers.Attention(cfg, rngs=RNGS)
  mlp = layers.MLP(cfg, rngs=RNGS)
  table = layers.Embedding(cfg, rngs=RNGS)
  for kernel, deviation in (
    (attention.query.kernel, (256 * 64) ** -0.5),
    (attention.key.kernel, 256**-0.5),
    (attention.out.kernel, 256**-0.5),
    (mlp.wi_0.kernel, 256**-0.5),
    (mlp.wo.kernel, 512**-0.5),
    (table.embedding, 1.0),
  ):
    assert abs(float(jnp.std(kernel[...])) / deviation - 1) < 0.02
