"""T5's relative position bias: a learned number for each head and distance.

Legend: L length of queries, M length of keys, T slots of a cache, H heads, P distances, B batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite.models import attention, layers
from t5x_lite.models.attention_inputs import skew
from t5x_lite.models.config import T5Config

RELPOS_INIT = nnx.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')


def relative_position_bucket(
  distance: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
  """Returns the bucket of each distance, key position minus query position.

  Half of the buckets are for exact small distances, the rest grow logarithmically to max_distance
  (t5x/examples/t5/layers.py _relative_position_bucket; Raffel et al. 2020, section 2.1). numpy, so
  that it is a constant of the program and rounds alike on every backend.
  """
  bucket = np.zeros_like(distance, dtype=np.int32)
  n = -distance
  if bidirectional:
    num_buckets //= 2
    bucket += (n < 0).astype(np.int32) * num_buckets
  n = np.abs(n) if bidirectional else np.maximum(n, 0)
  max_exact = num_buckets // 2
  large = max_exact + (
    np.log(n.astype(np.float32) / max_exact + np.finfo(np.float32).eps)
    / np.log(max_distance / max_exact)
    * (num_buckets - max_exact)
  ).astype(np.int32)
  large = np.minimum(large, num_buckets - 1)
  return bucket + np.where(n < max_exact, n, large).astype(np.int32)


class RelativePositionBias(nnx.Module):
  """A learned bias per head and distance bucket."""

  def __init__(self, cfg: T5Config, *, bidirectional: bool, rngs):
    self.cfg, self.bidirectional = cfg, bidirectional
    shape, axes = (cfg.num_heads, cfg.relpos_num_buckets), ('heads', 'relpos_buckets')
    self.rel_embedding = layers.param(rngs, RELPOS_INIT, shape, axes, cfg.vector_dtype)

  def by_distance(self, first: int, last: int) -> jax.Array:
    """Returns the bias [H, last - first + 1] of distances first..last."""
    buckets = relative_position_bucket(
      np.arange(first, last + 1),
      bidirectional=self.bidirectional,
      num_buckets=self.cfg.relpos_num_buckets,
      max_distance=self.cfg.relpos_max_distance,
    )
    return self.rel_embedding[...].astype(jnp.float32)[:, buckets]

  def of(self, L: int, M: int) -> jax.Array:
    """Returns the float32 bias as attention takes it: bias_1HLM, or values_HP by distance."""
    if not attention.takes_arrays(self.cfg.attention, L, M):
      return self.by_distance(-(L - 1), M - 1)
    # One value more than is used: see `skew`.
    return skew(self.by_distance(-(L - 1), M), L, M)[None]

  def at(self, index: jax.Array, T: int, L: int = 1) -> jax.Array:
    """Returns the bias [B or 1, H, L, T] of queries from index on, a scalar or [B], to T keys."""
    values_HT = self.by_distance(-(T - 1), T - 1)
    row_of = jax.vmap(
      lambda i: jax.lax.dynamic_slice_in_dim(values_HT, T - 1 - i, T, axis=1), out_axes=1
    )
    return jax.vmap(row_of)(jnp.atleast_1d(index)[:, None] + jnp.arange(L)[None, :])

  def around(self, index: jax.Array, T: int) -> jax.Array:
    """Returns the bias [1, H, 1, T] of the newest in a ring of slots, which is at index."""
    values_HT = self.by_distance(-(T - 1), 0)
    back_T = (index - jnp.arange(T)) % T  # how many steps ago a slot was written
    return values_HT[None, :, None, T - 1 - back_T]
