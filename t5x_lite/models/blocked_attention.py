"""Attention block by block, in plain JAX: O(L) memory on every backend.

Softmax is taken online, a block of keys at a time (Milakov & Gimelshein 2018; Dao et al. 2022,
FlashAttention), and the backward pass makes every block again. T5's bias of a block is a skewed
slice of the values by distance, and its gradient a sum over diagonals.

Legend: B batch, L queries, M keys, H heads, K head_dim, P distances, N blocks of l and m.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from t5x_lite.models import attention_inputs
from t5x_lite.models.attention_inputs import Blocks, Visibility, skew, unskew, vjp_of

# Entries of a block, whichever way; see docs/lab_notes.md.
BLOCK = 512
_dot = functools.partial(attention_inputs.dot, dtype=jnp.float32)


def cut(length: int, block: int, multiple: int = 8) -> int:
  """Returns a block's length, so that blocks are about equal and few are padded."""
  parts = -(-length // block)
  return -(-length // (parts * multiple)) * multiple


def pad(x: Array, dim: int, block: int) -> Array:
  """Pads a dim with zeros to whole blocks."""
  widths = [(0, 0)] * x.ndim
  widths[dim] = (0, -x.shape[dim] % block)
  return jnp.pad(x, widths)


def attention(
  q_BLHK: Array,
  k_BMHK: Array,
  v_BMHK: Array,
  values_HP: Array | None,
  visibility: Visibility,
  block: int | None = None,
) -> Array:
  """Returns y_BLHK of queries, keys and values, as dense attention does.

  Values by distance are biases of distances -(L-1)..M-1, float32, or None for no bias; a block has
  at most `block` rows and columns, BLOCK by default.
  """
  B, L, _, _ = q_BLHK.shape
  M = k_BMHK.shape[1]
  l, m = cut(L, block or BLOCK), cut(M, block or BLOCK)
  blocks = Blocks(l, m, M % m and M, visibility.causal, visibility.skips)
  if values_HP is not None:
    # Distances -(Lp-1)..Mp of the padded lengths Lp and Mp.
    values_HP = jnp.pad(values_HP, ((0, 0), (-L % l, -M % m + 1)))
  codes_BL, codes_BM = visibility.codes(B, L, M)
  y_BHLK = _attention(
    blocks,
    *(pad(x.swapaxes(1, 2), 2, size) for x, size in ((q_BLHK, l), (k_BMHK, m), (v_BMHK, m))),
    values_HP,
    pad(codes_BL, 1, l),
    pad(codes_BM, 1, m),
  )
  return y_BHLK.swapaxes(1, 2)[:, :L]


def _split(size: int, *arrays: Array) -> tuple[Array, ...]:
  """Returns the numbers of blocks and, [N, ...], the blocks of each array's length."""
  blocks = []
  for x in arrays:
    dim = min(2, x.ndim - 1)
    x = x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])
    blocks.append(jnp.moveaxis(x, dim, 0))
  # The numbers too as if they depended on q, see `_attention_fwd`: causal masks are made of them.
  return jax.lax.optimization_barrier((jnp.arange(len(blocks[0])), *blocks))


def _join(x_NBHlK: Array) -> Array:
  """Undoes `_split` of vectors."""
  N, B, H, l, K = x_NBHlK.shape
  return jnp.moveaxis(x_NBHlK, 0, 2).reshape(B, H, N * l, K)


def _window(blocks: Blocks, i, j, num_rows: int):
  """Returns where a block's l + m values by distance begin."""
  return j * blocks.m - i * blocks.l + (num_rows - 1) * blocks.l


def _logits(blocks, i, j, num_rows, q_BHlK, k_BHmK, values_HP, codes_Bl, codes_Bm):
  """Returns the logits [B, H, l, m] of a block, and which pairs are seen [B, 1, l, m]."""
  l, m = blocks.l, blocks.m
  logits = _dot(q_BHlK, k_BHmK, 3, 3)
  if values_HP is not None:
    window = jax.lax.dynamic_slice_in_dim(values_HP, _window(blocks, i, j, num_rows), l + m, 1)
    logits += skew(window, l, m)[None]
  codes = codes_Bl[:, None, :, None], codes_Bm[:, None, None, :]
  rows, columns = i * l + jnp.arange(l), j * m + jnp.arange(m)
  return blocks.masked(logits, *codes, rows[None, None, :, None], columns[None, None, None, :])


def _unless_later(blocks: Blocks, i, j, run, skip, *operands):
  """Runs a block, or skips it if all of its keys come later than its queries."""
  if not blocks.skips:
    return run(*operands)
  return jax.lax.cond(j * blocks.m < (i + 1) * blocks.l, run, skip, *operands)


def _attention_fwd(blocks, *inputs):
  # As if bias and mask depended on q: differentiation of a scan over layers would else make what
  # does not, for all blocks, before the scan.
  inputs = jax.lax.optimization_barrier(inputs)
  q_BHLK, k_BHMK, v_BHMK, values_HP, codes_BL, codes_BM = inputs
  N = q_BHLK.shape[2] // blocks.l
  keys = _split(blocks.m, k_BHMK, v_BHMK, codes_BM)

  def row(_, xs):
    i, q_BHlK, codes_Bl = xs

    def column(carry, ys):
      j, k_BHmK, v_BHmK, codes_Bm = ys

      def run(y_BHlK, total_BHl, top_BHl):
        logits, _ = _logits(blocks, i, j, N, q_BHlK, k_BHmK, values_HP, codes_Bl, codes_Bm)
        new_top_BHl = jnp.maximum(top_BHl, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - new_top_BHl[..., None])
        shrunk_BHl = jnp.exp(top_BHl - new_top_BHl)
        y_BHlK = y_BHlK * shrunk_BHl[..., None] + _dot(weights.astype(v_BHmK.dtype), v_BHmK, 3, 2)
        return y_BHlK, total_BHl * shrunk_BHl + jnp.sum(weights, axis=-1), new_top_BHl

      return _unless_later(blocks, i, j, run, lambda *carry: carry, *carry), None

    zeros_BHl = jnp.zeros(q_BHlK.shape[:3], jnp.float32)
    start = (jnp.zeros(q_BHlK.shape, jnp.float32), zeros_BHl, zeros_BHl - jnp.inf)
    (y_BHlK, total_BHl, top_BHl), _ = jax.lax.scan(column, start, keys)
    return None, ((y_BHlK / total_BHl[..., None]).astype(v_BHMK.dtype), total_BHl, top_BHl)

  rows = _split(blocks.l, q_BHLK, codes_BL)
  _, (y_NBHlK, total_NBHl, top_NBHl) = jax.lax.scan(row, None, rows)
  y_BHLK = _join(y_NBHlK)
  # The top and the total, not the logarithm of their product: where nothing is seen the top is
  # -1e10, beside which a float32 logarithm is nothing.
  return y_BHLK, (*inputs, y_BHLK, total_NBHl, top_NBHl)


def _attention_bwd(blocks, residuals, g_BHLK):
  residuals, g_BHLK = jax.lax.optimization_barrier((residuals, g_BHLK))
  q_BHLK, k_BHMK, v_BHMK, values_HP, codes_BL, codes_BM = residuals[:6]
  y_BHLK, total_NBHl, top_NBHl = residuals[6:]
  N = q_BHLK.shape[2] // blocks.l
  keys = _split(blocks.m, k_BHMK, v_BHMK, codes_BM)
  mean_BHL1 = attention_inputs.mean_gradient(g_BHLK, y_BHLK, -1)

  def row(carry, xs):
    i, q_BHlK, codes_Bl, g_BHlK, mean_BHl1, total_BHl, top_BHl = xs

    def column(carry, ys):
      j, k_BHmK, v_BHmK, codes_Bm = ys

      def run(dq_BHlK, dvalues_HP):
        logits, seen = _logits(blocks, i, j, N, q_BHlK, k_BHmK, values_HP, codes_Bl, codes_Bm)
        weights = jnp.exp(logits - top_BHl[..., None]) / total_BHl[..., None]
        dweights = _dot(g_BHlK, v_BHmK, 3, 3)
        dlogits = jnp.where(seen, weights * (dweights - mean_BHl1), 0.0)
        if dvalues_HP is not None:
          start = _window(blocks, i, j, N)
          band = unskew(jnp.sum(dlogits, axis=0))
          band += jax.lax.dynamic_slice_in_dim(dvalues_HP, start, band.shape[1], 1)
          dvalues_HP = jax.lax.dynamic_update_slice_in_dim(dvalues_HP, band, start, 1)
        dlogits = dlogits.astype(q_BHlK.dtype)
        dq_BHlK += _dot(dlogits, k_BHmK, 3, 2)
        dk_BHmK = _dot(dlogits, q_BHlK, 2, 2)
        dv_BHmK = _dot(weights.astype(g_BHlK.dtype), g_BHlK, 2, 2)
        return (dq_BHlK, dvalues_HP), (dk_BHmK, dv_BHmK)

      zeros = jnp.zeros(k_BHmK.shape, jnp.float32)
      return _unless_later(blocks, i, j, run, lambda *carry: (carry, (zeros, zeros)), *carry)

    dk_NBHmK, dv_NBHmK, dvalues_HP = carry
    start = (jnp.zeros(q_BHlK.shape, jnp.float32), dvalues_HP)
    (dq_BHlK, dvalues_HP), (dk, dv) = jax.lax.scan(column, start, keys)
    return (dk_NBHmK + dk, dv_NBHmK + dv, dvalues_HP), dq_BHlK.astype(q_BHLK.dtype)

  rows = (*_split(blocks.l, q_BHLK, codes_BL, g_BHLK, mean_BHL1), total_NBHl, top_NBHl)
  zeros = jnp.zeros(keys[1].shape, jnp.float32)
  start = (zeros, zeros, None if values_HP is None else jnp.zeros_like(values_HP))
  (dk, dv, dvalues_HP), dq = jax.lax.scan(row, start, rows)
  dk, dv = _join(dk).astype(k_BHMK.dtype), _join(dv).astype(v_BHMK.dtype)
  return _join(dq), dk, dv, dvalues_HP, None, None


_attention = vjp_of(_attention_fwd, _attention_bwd)
