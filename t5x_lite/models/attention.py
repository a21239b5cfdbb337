"""Attention: one interface, several implementations.

The backward pass of 'dense' is written by hand: what automatic differentiation would give, in an
order that needs no transposed copy of a large array, and it keeps the attention weights alone. The
others are for long sequences or certain chips; docs/extend.md says how to add one.

Legend: B batch, L length of queries, M length of keys, H heads, K head_dim, P distances.
"""

import jax
import jax.numpy as jnp
from jax import Array

from t5x_lite.errors import UsageError
from t5x_lite.models import blocked_attention
from t5x_lite.models.attention_inputs import MASK_VALUE, SCOPE, Visibility, dot, mean_gradient
from t5x_lite.parallel import logical_axes

# From this many pairs on, 'auto' takes 'blocked': measured on CPUs, where it is faster from there
# on (docs/lab_notes.md), elsewhere a guess.
_LONG = {'cpu': 1024 * 1024}
_LONG_ELSEWHERE = 2048 * 2048

# These take bias and mask as arrays of every pair.
_DENSE = ('dense', 'cudnn')
PLATFORMS = {'cudnn': ('gpu', 'cuda'), 'pallas_gpu': ('gpu', 'cuda'), 'pallas_tpu': ('tpu',)}


def _platform() -> str:
  """Returns that of the mesh being traced, or JAX's own."""
  mesh = logical_axes.active_mesh()
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def choose(implementation: str, L: int, M: int, platform: str | None = None) -> str:
  """Returns the implementation that a setting means for L queries and M keys.

  One query alone, as in decoding, is always 'dense': its arrays are no larger than the keys. So are
  odd lengths instead of 'cudnn', which trains none. The platform is that of the mesh being traced,
  or JAX's own; UsageError if it has no such thing.
  """
  platform = platform or _platform()
  allowed = PLATFORMS.get(implementation, (platform,))
  if platform not in allowed:
    there = f"this is a {platform.upper()}: use 'auto', 'dense' or 'blocked'"
    need = f'which needs a {allowed[0].upper()}; {there}'
    raise UsageError(f'T5Config.attention is {implementation!r}, {need}')
  if L == 1 or (implementation == 'cudnn' and (L % 2 or M % 2)):
    return 'dense'
  if implementation == 'auto':
    return 'dense' if L * M < _LONG.get(platform, _LONG_ELSEWHERE) else 'blocked'
  return implementation


def describe(implementation: str, inputs: int, targets: int, platform: str) -> str:
  """Returns what each attention of a model is; lengths of 0 are not there."""
  pairs = {'encoder': (inputs, inputs), 'decoder': (targets, targets), 'cross': (targets, inputs)}
  return ', '.join(
    f'{name} {choose(implementation, *pair, platform)}' for name, pair in pairs.items() if all(pair)
  )


def takes_arrays(implementation: str, L: int, M: int) -> bool:
  """Returns whether bias and mask are arrays of every pair."""
  return choose(implementation, L, M) in _DENSE


def mask(implementation: str, visibility: Visibility, L: int, M: int) -> Array | Visibility:
  """Returns visibility as `attention` takes it."""
  return visibility.dense(L) if takes_arrays(implementation, L, M) else visibility


def attention(
  q_BLHK: Array,
  k_BMHK: Array,
  v_BMHK: Array,
  bias: Array | None = None,
  mask: Array | Visibility | None = None,
  implementation: str = 'dense',
) -> Array:
  """Returns y_BLHK: values averaged by the softmax of q.k + bias.

  Logits are not divided by sqrt(K); they and the softmax are float32 whatever the inputs' dtype. A
  query that sees nothing averages all values.

  The bias is float32: bias_1HLM, whose dims of size 1 are broadcast, where `takes_arrays`, else
  values_HP of distances -(L-1)..M-1. The mask is mask_B1LM, True where a query may see a key, or
  its Visibility, likewise. The implementation is as in T5Config.attention.
  """
  form = choose(implementation, q_BLHK.shape[1], k_BMHK.shape[1])
  if form not in _DENSE and mask is not None and not isinstance(mask, Visibility):
    form = 'dense'  # decoding with a cache, of a few queries
  if form == 'dense':
    return _dense(q_BLHK, k_BMHK, v_BMHK, bias, mask)
  if form == 'cudnn':
    assert not isinstance(mask, Visibility)
    if mask is not None:
      mask = jnp.broadcast_to(mask, (*mask.shape[:2], q_BLHK.shape[1], k_BMHK.shape[1]))
    # It takes no float32, and makes the mask part of the bias.
    return jax.nn.dot_product_attention(
      *(q_BLHK, k_BMHK, v_BMHK),
      bias=None if bias is None else bias.astype(q_BLHK.dtype),
      mask=mask,
      scale=1.0,
      implementation='cudnn',
    )
  kernel = blocked_attention
  if form == 'pallas_tpu':  # these are slow to import
    from t5x_lite.models import pallas_tpu_attention as kernel
  elif form == 'pallas_gpu':
    from t5x_lite.models import pallas_gpu_attention as kernel
  vector = ('batch', None, 'heads', None)  # whatever cuts lengths: a query sees whole keys, all
  axes = (vector, vector, vector, ('heads', None), ('batch', None))
  return logical_axes.per_shard(kernel.attention, axes, vector)(
    q_BLHK, k_BMHK, v_BMHK, bias, Visibility() if mask is None else mask
  )


@jax.custom_vjp
def _dense(*inputs):
  return _dense_fwd(*inputs)[0]


def weights(q_BHLK: Array, k_BHMK: Array, bias_1HLM=None, mask_B1LM=None) -> Array:
  """Returns weights_BHLM in float32: the softmax of q.k + bias of each head."""
  logits_BHLM = dot(q_BHLK, k_BHMK, 3, 3, jnp.float32)
  if bias_1HLM is not None:
    logits_BHLM += jnp.broadcast_to(bias_1HLM, logits_BHLM.shape)
  if mask_B1LM is not None:
    logits_BHLM = jnp.where(mask_B1LM, logits_BHLM, MASK_VALUE)
  return jax.nn.softmax(logits_BHLM, axis=-1)


@jax.named_scope(SCOPE)
def _dense_fwd(q_BLHK, k_BMHK, v_BMHK, bias_1HLM, mask_B1LM):
  # Heads become a batch dim of every product, once, in the small arrays.
  q_BHLK, k_BHMK, v_BHMK = (x.swapaxes(1, 2) for x in (q_BLHK, k_BMHK, v_BMHK))
  weights_BHLM = weights(q_BHLK, k_BHMK, bias_1HLM, mask_B1LM).astype(v_BMHK.dtype)
  y_BHLK = dot(weights_BHLM, v_BHMK, 3, 2)
  return y_BHLK.swapaxes(1, 2), (q_BHLK, k_BHMK, v_BHMK, bias_1HLM, mask_B1LM, weights_BHLM, y_BHLK)


@jax.named_scope(SCOPE)
def _dense_bwd(residuals, g_BLHK):
  (q_BHLK, k_BHMK, v_BHMK, bias_1HLM, mask_B1LM, weights_BHLM, y_BHLK) = residuals
  g_BHLK = g_BLHK.swapaxes(1, 2)
  dweights_BHLM = dot(g_BHLK, v_BHMK, 3, 3, jnp.float32)
  mean_BHL1 = mean_gradient(g_BHLK, y_BHLK, -1)
  dlogits_BHLM = weights_BHLM.astype(jnp.float32) * (dweights_BHLM - mean_BHL1)
  if mask_B1LM is not None:
    dlogits_BHLM = jnp.where(mask_B1LM, dlogits_BHLM, 0.0)
  dbias_1HLM = None
  if bias_1HLM is not None:
    # Along which it was broadcast.
    dims = [i for i, n in enumerate(bias_1HLM.shape) if n == 1 and dlogits_BHLM.shape[i] != 1]
    if dims == [0] and _platform() == 'cpu':
      # A quarter of the time that XLA:CPU needs for the sum (docs/lab_notes.md).
      ones_B = jnp.ones(dlogits_BHLM.shape[:1])
      dbias_1HLM = jnp.einsum('b,bhlm->hlm', ones_B, dlogits_BHLM)[None]
    else:
      dbias_1HLM = jnp.sum(dlogits_BHLM, axis=dims, keepdims=True)
    dbias_1HLM = dbias_1HLM.astype(bias_1HLM.dtype)
  dlogits_BHLM = dlogits_BHLM.astype(q_BHLK.dtype)
  dq_BHLK = dot(dlogits_BHLM, k_BHMK, 3, 2)
  # The large operand second, as it is: the transposed result is small.
  dk_BHKM = dot(q_BHLK, dlogits_BHLM, 2, 2)
  dv_BHKM = dot(g_BHLK, weights_BHLM, 2, 2)
  dk_BMHK, dv_BMHK = (x.transpose(0, 3, 1, 2) for x in (dk_BHKM, dv_BHKM))
  return dq_BHLK.swapaxes(1, 2), dk_BMHK, dv_BMHK, dbias_1HLM, None


_dense.defvjp(_dense_fwd, _dense_bwd)
