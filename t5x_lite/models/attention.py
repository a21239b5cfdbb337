"""Attention with a backward pass written by hand.

It is what automatic differentiation would give, in an order that needs no
transposed copy of a large array, and it keeps the attention weights alone, not
the logits, the exponentials and the mask beside them. No layers and no
parameters here.

Legend: B batch, L length of queries, M length of keys, H heads, K head_dim.
"""

import jax
import jax.numpy as jnp
from jax import Array

# T5X adds this to the logits of masked pairs. It is finite, so a row in which
# everything is masked (padding) averages values instead of making NaNs.
MASK_VALUE = -1e10

_HEADS = ((0, 1), (0, 1))
# The name of these operations in a trace.
SCOPE = 'attention'


@jax.custom_vjp
def attention(
  q_BLHK: Array,
  k_BMHK: Array,
  v_BMHK: Array,
  bias_1HLM: Array | None = None,
  mask_B1LM: Array | None = None,
) -> Array:
  """Returns y_BLHK: values averaged by the softmax of q.k + bias.

  Logits are not divided by sqrt(K); they and the softmax are float32 whatever
  the inputs' dtype.

  Args:
    q_BLHK: queries.
    k_BMHK: keys.
    v_BMHK: values.
    bias_1HLM: added to the logits, in float32; dims of size 1 are broadcast.
    mask_B1LM: True where a query may see a key; dims of size 1 are broadcast.
      A row that sees nothing averages all values.
  """
  return _attention_fwd(q_BLHK, k_BMHK, v_BMHK, bias_1HLM, mask_B1LM)[0]


@jax.named_scope(SCOPE)
def _attention_fwd(q_BLHK, k_BMHK, v_BMHK, bias_1HLM, mask_B1LM):
  # Heads become a batch dim of every product, once, in the small arrays.
  q_BHLK, k_BHMK, v_BHMK = (x.swapaxes(1, 2) for x in (q_BLHK, k_BMHK, v_BMHK))
  logits_BHLM = _dot(q_BHLK, k_BHMK, 3, 3, jnp.float32)
  if bias_1HLM is not None:
    logits_BHLM += jnp.broadcast_to(bias_1HLM, logits_BHLM.shape)
  if mask_B1LM is not None:
    logits_BHLM = jnp.where(mask_B1LM, logits_BHLM, MASK_VALUE)
  weights_BHLM = jax.nn.softmax(logits_BHLM, axis=-1).astype(v_BMHK.dtype)
  y_BHLK = _dot(weights_BHLM, v_BHMK, 3, 2)
  return y_BHLK.swapaxes(1, 2), (q_BHLK, k_BHMK, v_BHMK, bias_1HLM, mask_B1LM, weights_BHLM, y_BHLK)


@jax.named_scope(SCOPE)
def _attention_bwd(residuals, g_BLHK):
  (q_BHLK, k_BHMK, v_BHMK, bias_1HLM, mask_B1LM, weights_BHLM, y_BHLK) = residuals
  g_BHLK = g_BLHK.swapaxes(1, 2)
  dweights_BHLM = _dot(g_BHLK, v_BHMK, 3, 3, jnp.float32)
  # sum over M of weights * dweights, without reading them (Dao et al. 2022,
  # FlashAttention, appendix B.2).
  mean_BHL1 = jnp.sum(g_BHLK.astype(jnp.float32) * y_BHLK.astype(jnp.float32), -1, keepdims=True)
  dlogits_BHLM = weights_BHLM.astype(jnp.float32) * (dweights_BHLM - mean_BHL1)
  if mask_B1LM is not None:
    dlogits_BHLM = jnp.where(mask_B1LM, dlogits_BHLM, 0.0)
  dbias_1HLM = None
  if bias_1HLM is not None:
    dbias_1HLM = _sum_to(dlogits_BHLM, bias_1HLM.shape).astype(bias_1HLM.dtype)
  dlogits_BHLM = dlogits_BHLM.astype(q_BHLK.dtype)
  dq_BHLK = _dot(dlogits_BHLM, k_BHMK, 3, 2)
  # The large operand second, as it is: the transposed result is small.
  dk_BHKM = _dot(q_BHLK, dlogits_BHLM, 2, 2)
  dv_BHKM = _dot(g_BHLK, weights_BHLM, 2, 2)
  return (
    dq_BHLK.swapaxes(1, 2),
    dk_BHKM.transpose(0, 3, 1, 2),
    dv_BHKM.transpose(0, 3, 1, 2),
    dbias_1HLM,
    None,
  )


attention.defvjp(_attention_fwd, _attention_bwd)


def _dot(a: Array, b: Array, a_dim: int, b_dim: int, dtype=None) -> Array:
  """Contracts a dim of each [B, H, ., .]; what is left of a comes first."""
  return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), _HEADS), preferred_element_type=dtype)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
  """Sums over the dims along which `shape` was broadcast."""
  dims = [i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1]
  return jnp.sum(x, axis=dims, keepdims=True)
