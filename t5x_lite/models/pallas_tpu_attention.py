"""Attention in a Pallas kernel for TPUs that makes T5's bias itself.

As blocked_attention.py, in one kernel forward and one backward. Positions lie along the lanes:
queries, keys and values are [K, l], so that a head of 64 wastes no half of a register, and logits
are [m, l], so that what is kept of a query is a row.

The b x b biases of a block come from 2 b values, which are two blocks of the values by distance and
arrive like any other input: each row is rotated by one more, and back to be summed in backward.

Legend: B batch, L queries, M keys, H heads, K head_dim, b a block, P distances.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5x_lite.errors import UsageError
from t5x_lite.models.attention_inputs import Blocks, Visibility, dot, mean_gradient, vjp_of
from t5x_lite.models.blocked_attention import pad

BLOCK = 512
_LANES = 128
_Shape = jax.ShapeDtypeStruct
_dot = functools.partial(dot, dtype=jnp.float32)
_VMEM_BYTES = 16 * 2**20  # for blocks and scratch; what a kernel has by default
_MAX_QUERIES_BYTES = 48 * 2**20


def _call(blocks, kernel, grid, in_specs, out_specs, out_shape, scratch, *args):
  """Runs a kernel on a grid of (batch, heads, blocks, blocks)."""
  # The gradient of all queries of a head lies in VMEM, twice.
  queries_bytes = 8 * args[0].shape[2] * args[0].shape[3]
  return pl.pallas_call(
    functools.partial(kernel, blocks),
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=_VMEM_BYTES + queries_bytes,
    ),
    interpret=pltpu.InterpretParams() if blocks.interpret else False,
  )(*args)


def attention(
  q_BLHK: Array,
  k_BMHK: Array,
  v_BMHK: Array,
  values_HP: Array | None,
  visibility: Visibility,
  block: int | None = None,
  interpret: bool = False,
) -> Array:
  """Returns y_BLHK; see `blocked_attention.attention` for the other arguments.

  A block has `block` rows and columns, 128 times a power of 2; the interpreter is for tests without
  a TPU. Raises UsageError if the queries of a head do not fit into the chip's own memory.
  """
  B, L, H, K = q_BLHK.shape
  M = k_BMHK.shape[1]
  if 8 * K * L > _MAX_QUERIES_BYTES:
    why = f'whose memory on the chip does not hold {L} queries of {K} dims'
    raise UsageError(f"T5Config.attention is 'pallas_tpu', {why}: use 'blocked'")
  b = block or BLOCK
  while b > _LANES and b >= 2 * max(L, M):
    b //= 2
  if values_HP is None:
    values_HP = jnp.zeros((H, L + M - 1), jnp.float32)
  # By query minus key: -Mp..Lp-1 of the padded lengths. A window begins at a whole block.
  values_HP = jnp.pad(values_HP, ((0, 0), (-L % b, -M % b + 1)))[:, None, ::-1]
  queries_BL, keys_BM = visibility.codes(B, L, M)
  blocks = Blocks(b, b, M % b and M, visibility.causal, visibility.skips, interpret)
  y_BHKL = _attention(
    blocks,
    *(pad(x.transpose(0, 2, 3, 1), 3, b) for x in (q_BLHK, k_BMHK, v_BMHK)),
    values_HP,
    pad(queries_BL, 1, b)[:, None, :],
    pad(keys_BM, 1, b)[:, :, None],
  )
  return y_BHKL.transpose(0, 3, 1, 2)[:, :L]


def _logits(blocks, i, j, q, k, near, far, queries, keys):
  """Returns logits [m, l] of a block and which pairs are seen."""
  b = blocks.m
  window = jnp.concatenate([near[0], far[0]], axis=1)
  window = jnp.broadcast_to(window, (b, 2 * b))
  # Entry (key c, query r) takes window[r - c + b].
  bias = pltpu.roll(window, b, 1, stride=1, stride_axis=0)[:, :b]
  logits = _dot(k[0, 0], q[0, 0], 0, 0) + bias
  rows = i * b + jax.lax.broadcasted_iota(jnp.int32, (b, b), 1)
  columns = j * b + jax.lax.broadcasted_iota(jnp.int32, (b, b), 0)
  codes = (jnp.broadcast_to(x[0], (b, b)) for x in (queries, keys))
  return blocks.masked(logits, *codes, rows, columns)


def _sum_diagonals(x_bb: Array) -> Array:
  """Returns [1, 2 b], the transpose of what `_logits` does with a window.

  Row c goes back by c, and rows are summed: halves of them, as often as that can be done. (Mosaic
  rotates rows by more and more to the right alone.)
  """
  b = x_bb.shape[0]
  x = jnp.concatenate([x_bb, jnp.zeros_like(x_bb)], axis=1)
  while (half := x.shape[0] // 2) > 0:
    x = x[:half] + pltpu.roll(x[half:], 2 * b - half, 1)
  return pltpu.roll(x, b, 1)


def _unless_later(blocks: Blocks, i, j, run):
  """Runs a block, unless all of its keys come later than its queries."""
  return pl.when(j <= i)(run) if blocks.skips else run()


def _forward(blocks, q, k, v, near, far, queries, keys, *refs):
  y, total, top, y_sum, total_sum, top_sum = refs
  i, j = pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    y_sum[...] = jnp.zeros_like(y_sum)
    total_sum[...] = jnp.zeros_like(total_sum)
    top_sum[...] = jnp.full_like(top_sum, -jnp.inf)

  def run():
    logits, _ = _logits(blocks, i, j, q, k, near, far, queries, keys)
    top_1l = jnp.maximum(top_sum[...], jnp.max(logits, axis=0, keepdims=True))
    weights = jnp.exp(logits - top_1l)
    shrunk_1l = jnp.exp(top_sum[...] - top_1l)
    total_sum[...] = total_sum[...] * shrunk_1l + jnp.sum(weights, axis=0, keepdims=True)
    y_sum[...] = y_sum[...] * shrunk_1l + _dot(v[0, 0], weights.astype(v.dtype), 1, 0)
    top_sum[...] = top_1l

  _unless_later(blocks, i, j, run)

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    y[0, 0] = (y_sum[...] / total_sum[...]).astype(y.dtype)
    total[0, 0] = total_sum[...]
    top[0, 0] = top_sum[...]


def _backward(blocks, *refs):
  q, k, v, near, far, queries, keys, g, mean, total, top = refs[:11]
  dq, dk, dv, dvalues, dk_sum, dv_sum = refs[11:]
  j, i = pl.program_id(2), pl.program_id(3)
  num_keys, b = pl.num_programs(2), blocks.m

  @pl.when((i == 0) & (j == 0))
  def _():
    dq[...] = jnp.zeros_like(dq)
    dvalues[...] = jnp.zeros_like(dvalues)

  @pl.when(i == 0)
  def _():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  def run():
    q_Kl, g_Kl = q[0, 0], g[0, 0]
    logits, seen = _logits(blocks, i, j, q, k, near, far, queries, keys)
    weights = jnp.exp(logits - top[0, 0]) / total[0, 0]
    dlogits = weights * (_dot(v[0, 0], g_Kl, 0, 0) - mean[0, 0])
    dlogits = jnp.where(seen, dlogits, 0.0)
    band_1P = _sum_diagonals(dlogits)
    first = i - j + num_keys - 1
    dvalues[0, 0, pl.ds(first, 1)] += band_1P[:, :b]
    dvalues[0, 0, pl.ds(first + 1, 1)] += band_1P[:, b:]
    dlogits = dlogits.astype(q.dtype)
    at = pl.ds(pl.multiple_of(i * b, b), b)
    dq[0, 0, :, at] += _dot(k[0, 0], dlogits, 1, 0)
    dk_sum[...] += _dot(q_Kl, dlogits, 1, 1)
    dv_sum[...] += _dot(g_Kl, weights.astype(g.dtype), 1, 1)

  _unless_later(blocks, i, j, run)

  @pl.when(i == pl.num_programs(3) - 1)
  def _():
    dk[0, 0] = dk_sum[...].astype(dk.dtype)
    dv[0, 0] = dv_sum[...].astype(dv.dtype)


def _specs(b: int, K: int, num_keys: int, query: int, key: int):
  """Returns BlockSpecs of a vector and of a row of queries, and of all inputs.

  Dims `query` and `key` of the grid count blocks of queries and of keys, num_keys of them.
  """

  def vector(dim):
    return pl.BlockSpec((1, 1, K, b), lambda *at: (at[0], at[1], 0, at[dim]))

  def window(first):
    return pl.BlockSpec((1, 1, b), lambda *at: (at[1], 0, at[query] - at[key] + first))

  inputs = [
    *(vector(query), vector(key), vector(key), window(num_keys - 1), window(num_keys)),
    pl.BlockSpec((1, 1, b), lambda *at: (at[0], 0, at[query])),
    pl.BlockSpec((1, b, 1), lambda *at: (at[0], at[key], 0)),
  ]
  row = pl.BlockSpec((1, 1, 1, b), lambda *at: (at[0], at[1], 0, at[query]))
  return vector, row, inputs


def _attention_fwd(blocks, q, k, v, values, queries, keys):
  (B, H, K, L), M, b = q.shape, k.shape[3], blocks.m
  vector, row, inputs = _specs(b, K, M // b, 2, 3)
  row_shape = _Shape((B, H, 1, L), jnp.float32)
  y, total, top = _call(
    blocks,
    _forward,
    (B, H, L // b, M // b),
    inputs,
    [vector(2), row, row],
    [_Shape(q.shape, v.dtype), row_shape, row_shape],
    [pltpu.VMEM((K, b), jnp.float32), *(pltpu.VMEM((1, b), jnp.float32),) * 2],
    *(q, k, v, values, values, queries, keys),
  )
  return y, (q, k, v, values, queries, keys, y, total, top)


def _attention_bwd(blocks, residuals, g):
  q, k, v, values, queries, keys, y, total, top = residuals
  (B, H, K, L), M, b = q.shape, k.shape[3], blocks.m
  mean = mean_gradient(g, y, 2)
  vector, row, inputs = _specs(b, K, M // b, 3, 2)

  def whole(*shape):
    return pl.BlockSpec((1, 1, *shape), lambda *at: (at[0], at[1], 0, 0))

  num_windows = (L + M) // b
  bands = _Shape((B, H, num_windows, b), jnp.float32)
  dq, dk, dv, dvalues = _call(
    blocks,
    _backward,
    (B, H, M // b, L // b),
    [*inputs, vector(3), row, row, row],
    [whole(K, L), vector(2), vector(2), whole(num_windows, b)],
    [_Shape(q.shape, jnp.float32), *(_Shape(x.shape, x.dtype) for x in (k, v)), bands],
    [pltpu.VMEM((K, b), jnp.float32)] * 2,
    *(q, k, v, values, values, queries, keys, g, mean, total, top),
  )
  dvalues = jnp.sum(dvalues, axis=0).reshape(H, 1, -1)
  return dq.astype(q.dtype), dk, dv, dvalues, None, None


_attention = vjp_of(_attention_fwd, _attention_bwd)
