"""What attention is made of besides vectors: who sees whom, bias by distance.

Both take O(L) memory here. Arrays of every pair are made from them at once (dense attention) or
block by block.

Legend: B batch, L length of queries, M length of keys, H heads, P distances.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import Array

# T5X adds this to the logits of masked pairs. It is finite, so a row in which everything is masked
# (padding) averages values instead of making NaNs.
MASK_VALUE = -1e10
# The name of attention's operations in a trace.
SCOPE = 'attention'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
  """Which keys a query sees: those that no field hides.

  Attributes:
    key_seen_BM: False where a key is padding, which nobody sees.
    segments: of packed rows, (query_segments_BL, key_segments_BM); queries see keys of their own
      segment.
    prefix_BL: with `causal`, True at positions that see each other all the same.
    causal: queries see no later key; L is M.
  """

  key_seen_BM: Array | None = None
  segments: tuple[Array, Array] | None = None
  prefix_BL: Array | None = None
  causal: bool = dataclasses.field(default=False, metadata={'static': True})

  def dense(self, L: int) -> Array:
    """Returns mask_B1LM, True where a query sees a key; dims of 1 broadcast."""
    parts = []
    if self.causal:
      mask_11LL = jnp.tril(jnp.ones((1, 1, L, L), bool))
      if self.prefix_BL is not None:
        prefix_BL = self.prefix_BL
        mask_11LL = mask_11LL | (prefix_BL[:, None, :, None] & prefix_BL[:, None, None, :])
      parts.append(mask_11LL)
    if self.key_seen_BM is not None:
      parts.append(self.key_seen_BM[:, None, None, :])
    if self.segments is not None:
      queries_BL, keys_BM = self.segments
      parts.append(queries_BL[:, None, :, None] == keys_BM[:, None, None, :])
    return functools.reduce(operator.and_, parts) if parts else jnp.ones((1, 1, 1, 1), bool)

  def codes(self, B: int, L: int, M: int) -> tuple[Array, Array]:
    """Returns int32 codes [B, L] and [B, M] that `visible` compares.

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
    """Whether blocks of later keys can be left out.

    Not if a query may see nothing at all: it averages all values.
    """
    return self.causal and self.prefix_BL is None and self.key_seen_BM is None


def visible(query_codes, key_codes, rows, columns, causal: bool) -> Array:
  """Returns which pairs see each other; all arguments broadcast.

  Args:
    query_codes: from `Visibility.codes`.
    key_codes: likewise.
    rows: positions of the queries.
    columns: positions of the keys.
    causal: as in Visibility.
  """
  seen = (query_codes >> 1) == (key_codes >> 1)
  if causal:
    seen &= (columns <= rows) | ((query_codes & key_codes & 1) == 1)
  return seen


def sees_any(mask: Array | Visibility) -> Array:
  """Returns [B, L or 1], False where a query sees no key at all."""
  if isinstance(mask, Visibility):
    mask = mask.dense(0)  # fused into the reduction; not used where causal
  return jnp.any(mask, axis=-1)[:, 0]


def skew(values_HP: Array, L: int, M: int) -> Array:
  """Returns [H, L, M] whose entry (i, j) is the value of distance j - i.

  Each row is the row above it moved by one, so the L x M values are a skewed copy of L + M - 1 of
  them. Reshaping instead of gathering keeps the gradient a sum over diagonals instead of a scatter
  of L x M values.

  Args:
    values_HP: of distances -(L-1)..M. The last is not used: with it, rows read P - 1 apart drift by
      one.
    L: rows.
    M: columns.
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
