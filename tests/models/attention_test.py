"""Hand-written backward passes against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.models import attention, layers

B, L, M, H, K = 2, 5, 7, 3, 4


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def plain_attention(q, k, v, bias, mask):
  logits = jnp.einsum('BLHK,BMHK->BHLM', q, k)
  if bias is not None:
    logits += jnp.broadcast_to(bias, logits.shape)
  if mask is not None:
    logits = jnp.where(mask, logits, -1e10)
  return jnp.einsum('BHLM,BMHK->BLHK', jax.nn.softmax(logits), v)


def assert_same(fn, reference, arguments, rtol=1e-5):
  """Compares values and the gradients of a random projection."""
  g = draw(99, *reference(*arguments).shape)
  value, vjp = jax.vjp(fn, *arguments)
  expected, expected_vjp = jax.vjp(reference, *arguments)
  np.testing.assert_allclose(value, expected, rtol, 1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 2e-6), vjp(g), expected_vjp(g))


@pytest.mark.parametrize('lead', [(), (6,), (2, 3)])
def test_matmul(lead):
  arguments = draw(0, *lead, 4), draw(1, 4, 5)
  assert_same(layers.matmul, lambda x, w: x @ w, arguments)


@pytest.mark.parametrize('bias_shape', [None, (1, H, L, M), (B, H, 1, M)])
@pytest.mark.parametrize('mask_shape', [None, (B, 1, 1, M), (B, 1, L, M)])
def test_attention(bias_shape, mask_shape):
  """Rows that see nothing are among the masks."""
  mask = None
  if mask_shape is not None:
    mask = jax.random.bernoulli(jax.random.key(5), 0.6, mask_shape)
    mask = mask.at[0, :, 0].set(False)
  q, k, v = draw(0, B, L, H, K), draw(1, B, M, H, K), draw(2, B, M, H, K)
  bias = None if bias_shape is None else draw(3, *bias_shape)
  assert_same(
    lambda q, k, v, bias: attention.attention(q, k, v, bias, mask),
    lambda q, k, v, bias: plain_attention(q, k, v, bias, mask),
    (q, k, v, bias),
  )


def test_gradients_have_the_dtypes_of_their_arguments():
  q = draw(0, B, L, H, K).astype(jnp.bfloat16)
  k, v = (draw(i, B, M, H, K).astype(jnp.bfloat16) for i in (1, 2))
  bias = draw(3, 1, H, L, M)
  y, vjp = jax.vjp(attention.attention, q, k, v, bias)
  assert y.dtype == jnp.bfloat16
  dtypes = [x.dtype for x in vjp(y)[:4]]
  assert dtypes == [jnp.bfloat16] * 3 + [jnp.float32]


def test_attention_keeps_no_logits_for_the_backward_pass():
  """One array of B H L M entries is kept: the weights."""
  arguments = (
    draw(0, B, L, H, K),
    draw(1, B, M, H, K),
    draw(2, B, M, H, K),
    draw(3, 1, H, L, M),
    jnp.ones((B, 1, 1, M), bool),
  )
  _, vjp = jax.vjp(lambda *a: attention.attention(*a, arguments[4]), *arguments[:4])
  kept = [x for x in jax.tree.leaves(vjp) if getattr(x, 'shape', ()) == (B, H, L, M)]
  assert len(kept) == 1
