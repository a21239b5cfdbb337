"""What attention is made of besides vectors: who sees whom, bias by distance.

Both take O(L) memory here. Of every pair they become arrays at once (dense) or block by block.

Legend: B batch, L length of queries, M length of keys, H heads, P distances.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

# T5X adds this to the logits of masked pairs. It is finite: a row of padding alone makes no NaNs.
MASK_VALUE = -1e10
# The name of attention's operations in a trace.
SCOPE = 'attention'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
  """Which keys a query sees: those that no field hides."""

  key_seen_BM: Array | None = None  # False where a key is padding, which nobody sees
  # Of packed rows, (query_segments_BL, key_segments_BM): queries see keys of their own segment.
  segments: tuple[Array, Array] | None = None
  # With `causal`, True at positions that see each other all the same.
  prefix_BL: Array | None = None
  # Queries see no later key; L is M.
  causal: bool = dataclasses.field(default=False, metadata={'static': True})

  def dense(self, L: int) -> Array:
    """Returns mask_B1LM, True where a query sees a key; dims of 1 broadcast."""
    mask = jnp.tril(jnp.ones((1, 1, L, L), bool)) if self.causal else jnp.ones((1, 1, 1, 1), bool)
    if self.causal and self.prefix_BL is not None:
      mask |= self.prefix_BL[:, None, :, None] & self.prefix_BL[:, None, None, :]
    if self.key_seen_BM is not None:
      mask &= self.key_seen_BM[:, None, None, :]
    if self.segments is not None:
      queries_BL, keys_BM = self.segments
      mask &= queries_BL[:, None, :, None] == keys_BM[:, None, None, :]
    return mask

  def codes(self, B: int, L: int, M: int) -> tuple[Array, Array]:
    """Returns int32 codes [B, L] and [B, M] that `Blocks.masked` compares.

    Twice the segment, plus 1 in the prefix; no query has the segment of a key that nobody sees.
    """
    queries_BL, keys_BM = jnp.zeros((B, L), jnp.int32), jnp.zeros((B, M), jnp.int32)
    if self.segments is not None:
      queries_BL, keys_BM = (2 * x.astype(jnp.int32) for x in self.segments)
    if self.prefix_BL is not None:
      queries_BL, keys_BM = queries_BL + self.prefix_BL, keys_BM + self.prefix_BL
    if self.key_seen_BM is not None:
      keys_BM = jnp.where(self.key_seen_BM, keys_BM, -2)
    return queries_BL, keys_BM

  @property
  def skips(self) -> bool:
    """Whether blocks of later keys can be left out: not if a query may see nothing at all."""
    return self.causal and self.prefix_BL is None and self.key_seen_BM is None


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How lengths are cut, and what else is static where bias and mask are made by blocks."""

  l: int  # queries of a block
  m: int  # keys of a block
  M: int  # keys, where padding ends the last block; else 0
  causal: bool  # this and the next as in Visibility
  skips: bool
  interpret: bool = False  # of a kernel

  def masked(self, logits, query_codes, key_codes, rows, columns) -> tuple[Array, Array]:
    """Returns a block's logits, masked, and which pairs are seen; all broadcast."""
    seen = (query_codes >> 1) == (key_codes >> 1)
    if self.causal:
      seen &= (columns <= rows) | ((query_codes & key_codes & 1) == 1)
    logits = jnp.where(seen, logits, MASK_VALUE)
    if self.M:  # padding does not even count for a query that sees nothing
      logits = jnp.where(columns < self.M, logits, -jnp.inf)
    return logits, seen


def vjp_of(forward, backward):
  """Returns fn(blocks, *inputs), the first result of forward, with backward for its gradient."""
  forward, backward = map(jax.named_scope(SCOPE), (forward, backward))
  fn = jax.custom_vjp(lambda *args: forward(*args)[0], nondiff_argnums=(0,))
  fn.defvjp(forward, backward)
  return fn


def dot(a: Array, b: Array, a_dim: int, b_dim: int, dtype=None) -> Array:
  """Contracts a dim of each of the matrices in the last two; what is left of a comes first."""
  batch = tuple(range(a.ndim - 2))
  dims = (((a_dim,), (b_dim,)), (batch, batch))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def mean_gradient(g, y, dim: int) -> Array:
  """Returns the sum of weights times their gradients (Dao et al. 2022, appendix B.2)."""
  return jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=dim, keepdims=True)


def sees_any(mask: Array | Visibility) -> Array:
  """Returns [B, L or 1], False where a query sees no key at all."""
  if isinstance(mask, Visibility):
    mask = mask.dense(0)  # fused into the reduction; not used where causal
  return jnp.any(mask, axis=-1)[:, 0]


def skew(values_HP: Array, L: int, M: int) -> Array:
  """Returns [H, L, M] whose entry (i, j) is the value of distance j - i.

  Each row is the row above it moved by one. Reshaping instead of gathering keeps the gradient a sum
  over diagonals instead of a scatter of L x M values.
  The last value, of distance M, is not used: with it, rows read P - 1 apart drift by one.
  """
  H, P = values_HP.shape
  skewed = jnp.broadcast_to(values_HP[:, None, :], (H, L, P))
  skewed = skewed.reshape(H, L * P)[:, : L * (P - 1)].reshape(H, L, P - 1)
  # Row i now holds distance c - i - (L - 1) in column c, for c >= i.
  return skewed[:, :, L - 1 : L - 1 + M]


def unskew(x_HLM: Array) -> Array:
  """Returns the sums over diagonals [H, L + M], the transpose of `skew`."""
  H, L, M = x_HLM.shape
  P = L + M
  x = jnp.pad(x_HLM, ((0, 0), (0, 0), (L - 1, 0))).reshape(H, L * (P - 1))
  return jnp.sum(jnp.pad(x, ((0, 0), (0, L))).reshape(H, L, P), axis=1)
