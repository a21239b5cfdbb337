"""The layers of T5: norm, embedding, attention, feed-forward.

A module holds parameters with logical axes and static configuration. Randomness and caches are
arguments, so every transform is a plain `jax.*` one. Parameter names and initialisers are T5X's
(t5x/examples/t5/layers.py).

Legend: B batch, L length of queries, M length of keys, T slots of a cache, D emb_dim, H heads, K
head_dim, F mlp_dim, V vocabulary.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t5x_lite.models import attention
from t5x_lite.models.config import T5Config
from t5x_lite.parallel.logical_axes import constrain

_ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': functools.partial(jax.nn.gelu, approximate=True),
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
  'linear': lambda x: x,
}

# For functions of single entries, cheaper to compute again in the backward pass than to keep (up to
# eight arrays for a gated GELU). Without barriers: unrolled, XLA may well keep some.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)

ATTENTION_INIT = nnx.initializers.variance_scaling(1.0, 'fan_in', 'normal')
DENSE_INIT = nnx.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')
EMBEDDING_INIT = nnx.initializers.normal(stddev=1.0)
# Uniform within 1 / sqrt(fan_in), as PEFT draws LoRA's A.
LORA_INIT = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def param(rngs: nnx.Rngs, init, shape, axes: tuple[str, ...], dtype: str):
  """Makes a parameter that knows its logical axes."""
  # Drawn in float32 whatever the dtype at rest, so that dtypes share numbers.
  value = init(rngs.params(), shape, jnp.float32).astype(dtype)
  return nnx.Param(value, axes=axes)


def dropout(x: Array, rate: float, key: Array | None, broadcast_dims=(-2,)) -> Array:
  """Drops entries of x with probability `rate`, or none without a key.

  One mask is drawn for broadcast_dims, by T5's default for all positions of a sequence.
  """
  if key is None or rate == 0.0:
    return x
  shape = list(x.shape)
  for dim in broadcast_dims:
    shape[dim] = 1
  keep = jax.random.bernoulli(key, 1.0 - rate, shape)
  return _recomputed(lambda x, keep: jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x)))(x, keep)


def split_key(key: Array | None, num: int):
  """Splits a key that may be None into as many keys or Nones."""
  return [None] * num if key is None else list(jax.random.split(key, num))


@jax.custom_vjp
def matmul(x_BLD: Array, w_DF: Array) -> Array:
  """Returns x @ w; x may have any number of leading dims.

  The gradient of w is `x.T @ g`; JAX would ask for `(g.T @ x).T`, for which XLA:CPU copies g.
  """
  return x_BLD @ w_DF


def _matmul_bwd(residuals, g_BLF):
  x_BLD, w_DF = residuals
  rows = tuple(range(x_BLD.ndim - 1))
  dx_BLD = jax.lax.dot_general(g_BLF, w_DF, (((len(rows),), (1,)), ((), ())))
  return dx_BLD, jax.lax.dot_general(x_BLD, g_BLF, ((rows, rows), ((), ())))


matmul.defvjp(lambda x_BLD, w_DF: (x_BLD @ w_DF, (x_BLD, w_DF)), _matmul_bwd)


class Linear(nnx.Module):
  """A matrix without bias; with LoRA x W + (alpha / rank) x A B (Hu et al. 2021, 4.1)."""

  def __init__(self, shape, axes, cfg: T5Config, *, init=DENSE_INIT, name: str = '', rngs):
    self.dtype = cfg.dtype
    self.kernel = param(rngs, init, shape, axes, cfg.param_dtype)
    self.lora_scale = None
    if name in cfg.lora_targets:
      assert cfg.lora_rank is not None and cfg.lora_alpha is not None
      self.lora_scale = cfg.lora_alpha / cfg.lora_rank
      (D, F), R = shape, cfg.lora_rank
      zeros = nnx.initializers.zeros
      self.lora_a = param(rngs, LORA_INIT, (D, R), (axes[0], 'lora_rank'), cfg.param_dtype)
      self.lora_b = param(rngs, zeros, (R, F), ('lora_rank', axes[1]), cfg.param_dtype)

  def __call__(self, x_BLD: Array, product=matmul) -> Array:
    """Multiplies the last dim, in the compute dtype."""
    y_BLF = product(x_BLD, self.kernel[...].astype(self.dtype))
    if self.lora_scale is not None:
      x_BLR = product(x_BLD, self.lora_a[...].astype(self.dtype))
      y_BLF += product(x_BLR, self.lora_b[...].astype(self.dtype)) * self.lora_scale
    return y_BLF


class Adapter(nnx.Module):
  """y + up(relu(down(y))), without biases (Houlsby et al. 2019, 2.1); up is 0 at first."""

  def __init__(self, cfg: T5Config, *, rngs):
    D, A = cfg.emb_dim, cfg.adapter_dim
    assert A is not None
    self.down = Linear((D, A), ('embed', 'adapter'), cfg, rngs=rngs)
    self.up = Linear((A, D), ('adapter', 'embed'), cfg, init=nnx.initializers.zeros, rngs=rngs)

  def __call__(self, y_BLD: Array) -> Array:
    """Transforms each position."""
    return y_BLD + self.up(jax.nn.relu(self.down(y_BLD)))


class RMSNorm(nnx.Module):
  """Root mean square norm: no mean, no bias, computed in float32."""

  def __init__(self, cfg: T5Config, *, rngs):
    self.epsilon = cfg.layer_norm_epsilon
    self.dtype = cfg.dtype
    self.scale = param(rngs, nnx.initializers.ones, (cfg.emb_dim,), ('embed',), cfg.vector_dtype)

  def __call__(self, x_BLD: Array) -> Array:
    """Normalises the last dim."""
    return _rms_norm(x_BLD, self.scale[...], self.epsilon, self.dtype)


@functools.partial(_recomputed, static_argnums=(2, 3))
def _rms_norm(x_BLD, scale_D, epsilon: float, dtype: str) -> Array:
  x_BLD = x_BLD.astype(jnp.float32)
  mean2_BL1 = jnp.mean(jax.lax.square(x_BLD), axis=-1, keepdims=True)
  y_BLD = x_BLD * jax.lax.rsqrt(mean2_BL1 + epsilon)
  # Cast before scaling, as T5X does.
  return y_BLD.astype(dtype) * scale_D.astype(dtype)[None, None, :]


class Embedding(nnx.Module):
  """Token embedding; also the output projection where the head is tied."""

  def __init__(self, cfg: T5Config, *, rngs):
    self.dtype = cfg.dtype
    shape, axes = (cfg.vocab_size, cfg.emb_dim), ('vocab', 'embed')
    self.embedding = param(rngs, EMBEDDING_INIT, shape, axes, cfg.param_dtype)

  def __call__(self, tokens_BL: Array) -> Array:
    """Returns x_BLD in the compute dtype."""
    # A gather, before Int8 becomes float. T5X multiplies by a one-hot, V times the work.
    table = self.embedding.get_value()
    return jax.tree.map(lambda x: jnp.take(x, tokens_BL, axis=0), table)[...].astype(self.dtype)


class Attention(nnx.Module):
  """Multi-head attention; logits are not divided by sqrt(K)."""

  def __init__(self, cfg: T5Config, *, rngs):
    self.cfg = cfg
    D, J = cfg.emb_dim, cfg.num_heads * cfg.head_dim

    # The missing 1/sqrt(K) is folded into the query's initialiser (T5X).
    def query_init(*args):
      return ATTENTION_INIT(*args) / np.sqrt(cfg.head_dim).astype(np.float32)

    def project(name, init=ATTENTION_INIT):
      return Linear((D, J), ('embed', 'joined_kv'), cfg, init=init, name=name, rngs=rngs)

    self.query = project('query', query_init)
    self.key = project('key')
    self.value = project('value')
    out_axes = ('joined_kv', 'embed')
    self.out = Linear((J, D), out_axes, cfg, init=ATTENTION_INIT, name='out', rngs=rngs)

  def _heads(self, x_BLJ: Array) -> Array:
    x_BLHK = x_BLJ.reshape(*x_BLJ.shape[:2], self.cfg.num_heads, self.cfg.head_dim)
    return constrain(x_BLHK, 'batch', 'length', 'heads', 'kv')

  def keys_values(self, x_BMD: Array, product=matmul) -> tuple[Array, Array]:
    """Returns k_BMHK and v_BMHK."""
    return self._heads(self.key(x_BMD, product)), self._heads(self.value(x_BMD, product))

  def queries(self, x_BLD: Array) -> Array:
    """Returns q_BLHK."""
    return self._heads(self.query(x_BLD))

  def attend(self, q_BLHK, k_BMHK, v_BMHK, *, bias=None, mask=None, key=None) -> Array:
    """Returns what given queries find among given keys and values.

    See `attention.attention` for bias and mask (None sees all); the key is that of dropout.
    """
    # T5X draws one mask for all queries: dropping weights is dropping keys, with L times less work.
    v_BMHK = dropout(v_BMHK, self.cfg.dropout_rate, key, (-1,))
    y_BLHK = attention.attention(q_BLHK, k_BMHK, v_BMHK, bias, mask, self.cfg.attention)
    return self.out(y_BLHK.reshape(*y_BLHK.shape[:2], -1))


class MLP(nnx.Module):
  """Feed-forward block: wi, or wi_0 * wi_1 where gated, then wo."""

  def __init__(self, cfg: T5Config, *, rngs):
    self.cfg = cfg
    gated = len(cfg.mlp_activations) > 1
    self.names = tuple(f'wi_{i}' if gated else 'wi' for i in range(len(cfg.mlp_activations)))
    shape, axes = (cfg.emb_dim, cfg.mlp_dim), ('embed', 'mlp')
    for name in self.names:
      setattr(self, name, Linear(shape, axes, cfg, name=name, rngs=rngs))
    self.wo = Linear((cfg.mlp_dim, cfg.emb_dim), ('mlp', 'embed'), cfg, name='wo', rngs=rngs)

  def __call__(self, x_BLD: Array, *, key=None) -> Array:
    """Transforms each position; key is that of the dropout inside."""
    inputs = [getattr(self, name)(x_BLD) for name in self.names]

    # The product wo needs is not kept either: it comes from the inputs.
    @_recomputed
    def output(inputs, key):
      pairs = zip(self.cfg.mlp_activations, inputs, strict=True)
      hidden_BLF = functools.reduce(operator.mul, [_ACTIVATIONS[name](x) for name, x in pairs])
      hidden_BLF = dropout(hidden_BLF, self.cfg.dropout_rate, key)
      return self.wo(constrain(hidden_BLF, 'batch', 'length', 'mlp'))

    return output(inputs, key)
