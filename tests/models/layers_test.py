"""Layers against formulas written out here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite.models import layers
from tests.models import tiny

RNGS = nnx.Rngs(params=0)


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
  ours = module.attend(module.queries(x), *module.keys_values(memory), bias=bias, mask=mask)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_row_with_nothing_to_see_is_finite():
  module = layers.Attention(tiny.config(), rngs=RNGS)
  x = jnp.ones((1, 2, 16))
  mask = jnp.zeros((1, 1, 2, 2), bool)

  def total(x):
    return module.attend(module.queries(x), *module.keys_values(x), mask=mask).sum()

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
  wi_0, wi_1, wo = (np.asarray(getattr(module, n).kernel[...]) for n in ('wi_0', 'wi_1', 'wo'))
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
