"""Attention in Pallas kernels for GPUs that make T5's bias themselves.

As blocked_attention.py, by Pallas' Triton backend. A program holds a block of queries and goes over
those of keys (for their gradients the other way around); biases come from values by distance.

The gradient of these values has a kernel of its own, which goes along a diagonal of blocks: an
entry of each of them has the same distance, so that blocks are added up as they are, and sums over
diagonals are left for their sum alone. This makes nine products of a block out of seven, and needs
no atomic additions, which would come one by one and in any order.

Legend: B batch, L queries, M keys, H heads, K head_dim, b a block, P distances.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from t5x_lite.models.attention_inputs import Blocks, Visibility, dot, mean_gradient, unskew, vjp_of
from t5x_lite.models.blocked_attention import pad

BLOCK = 128
_BLOCK_BYTES = 32768  # of vectors; a kernel needs up to five times as much shared memory
_LEAST = 16  # of each dim of a product
_COPIES = 2
# Powers of 2 are one instruction, where the compiler makes fifteen of an exponential.
_LOG2_E = 1.4426950408889634
_Shape = jax.ShapeDtypeStruct
_dot = functools.partial(dot, dtype=jnp.float32)


def _call(blocks, kernel, length, outputs, *inputs):
  """Runs a kernel for each head and each block of vectors of its first output.

  It gets all inputs of the head, and what is written of each output.
  """
  batch, size, H, _ = outputs[0].shape
  block_bytes = blocks.l * inputs[0].shape[3] * inputs[0].dtype.itemsize

  def whole(x):
    head = x.ndim // 2 if x.ndim > 2 else None
    return pl.BlockSpec(
      [None if dim == head else n for dim, n in enumerate(x.shape)],
      lambda *at: tuple(at[1] if dim == head else 0 for dim in range(x.ndim)),
    )

  def part(x):
    if x.ndim == 3:
      return pl.BlockSpec((None, None, length), lambda i, h, row: (row, h, i))
    return pl.BlockSpec((None, length, None, x.shape[3]), lambda i, h, row: (row, i, h, 0))

  return pl.pallas_call(
    functools.partial(kernel, blocks),
    grid=(size // length, H, batch),
    in_specs=jax.tree.map(whole, list(inputs)),
    out_specs=[part(x) for x in outputs],
    out_shape=outputs,
    compiler_params=plt.CompilerParams(num_warps=4 if block_bytes <= 8192 else 8, num_stages=2),
    interpret=blocks.interpret,
  )(*inputs)


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

  A block has at most `block` rows and columns, a power of 2 from 16 on; tests use the interpreter.
  """
  (B, L, _, K), M = q_BLHK.shape, k_BMHK.shape[1]
  width = max(_LEAST, pl.next_power_of_2(K))
  b = max(_LEAST, min(block or BLOCK, _BLOCK_BYTES // (width * q_BLHK.dtype.itemsize)))
  while b > _LEAST and b >= 2 * max(L, M):
    b //= 2
  if values_HP is not None:  # distances -(Lp-1)..Mp of the padded lengths Lp and Mp
    values_HP = jnp.pad(values_HP, ((0, 0), (-L % b, -M % b + 1)))
  queries_BL, keys_BM = visibility.codes(B, L, M)
  y_BLHK = _attention(
    Blocks(b, max(_LEAST, b // 2), M % b and M, visibility.causal, visibility.skips, interpret),
    *(pad(pad(x, 3, width), 1, b) for x in (q_BLHK, k_BMHK, v_BMHK)),
    *(values_HP, pad(queries_BL, 1, b), pad(keys_BM, 1, b)),
  )
  return y_BLHK[:, :L, :, :K]


def _copies(values_HP: Array | None):
  """Returns the biases [2, H, P] that `_logits` reads, as powers of 2, from distance -Lp on.

  The second copy is moved by one, so that in one of them any row of a block begins at an even
  index: two values, the most that come through the L1 cache, are loaded at once.
  """
  if values_HP is not None:
    return _LOG2_E * jnp.stack([jnp.roll(values_HP, n + 1, axis=1) for n in range(_COPIES)])


def _at(refs, row, block, length: int) -> list[Array]:
  """Returns a block of a row of the batch of each input."""
  return [ref[row, pl.ds(block * length, length)] for ref in refs]


def _logits(blocks, i, j, q_lK, k_mK, queries, keys, values, L):
  """Returns the logits [l, m] of a block, as powers of 2, and which pairs are seen."""
  rows = i * blocks.l + jnp.arange(blocks.l)[:, None]
  columns = j * blocks.m + jnp.arange(blocks.m)[None, :]
  logits = _LOG2_E * _dot(q_lK, k_mK, 1, 1)
  if values is not None:
    start = L - jax.lax.div(rows, _COPIES) * _COPIES
    logits += plt.load(values.at[jax.lax.rem(rows, _COPIES), start + columns])
  return blocks.masked(logits, queries[:, None], keys[None, :], rows, columns)


def _gradients(blocks, i, j, query, key, values, L):
  """Returns the weights of a block and the gradients of its logits."""
  q_bK, g_bK, queries, mean, share, top = query
  k_bK, v_bK, keys = key
  logits, seen = _logits(blocks, i, j, q_bK, k_bK, queries, keys, values, L)
  weights = jnp.exp2(logits - top[:, None]) * share[:, None]
  dweights = _dot(g_bK, v_bK, 1, 1)
  return weights, jnp.where(seen, weights * (dweights - mean[:, None]), 0.0)


def _forward(blocks, q, k, v, values, queries, keys, y, total, top):
  i, row, l = pl.program_id(0), pl.program_id(2), blocks.l
  q_lK, queries = _at((q, queries), row, i, l)

  def column(j, carry):
    y_lK, total_l, top_l = carry
    k_mK, v_mK, keys_m = _at((k, v, keys), row, j, blocks.m)
    logits, _ = _logits(blocks, i, j, q_lK, k_mK, queries, keys_m, values, q.shape[1])
    new_top_l = jnp.maximum(top_l, jnp.max(logits, axis=1))
    weights = jnp.exp2(logits - new_top_l[:, None])
    shrunk_l = jnp.exp2(top_l - new_top_l)
    y_lK = y_lK * shrunk_l[:, None] + _dot(weights.astype(v.dtype), v_mK, 1, 0)
    return y_lK, total_l * shrunk_l + jnp.sum(weights, axis=1), new_top_l

  zeros_l = jnp.zeros(l, jnp.float32)
  start = jnp.zeros(y.shape, jnp.float32), zeros_l, zeros_l - jnp.inf
  num_columns = (i + 1) * (l // blocks.m) if blocks.skips else k.shape[1] // blocks.m
  y_lK, total_l, top_l = jax.lax.fori_loop(0, num_columns, column, start)
  y[...] = (y_lK / total_l[:, None]).astype(y.dtype)
  total[...], top[...] = total_l, top_l


def _backward_queries(blocks, *refs):
  *queries, k, v, keys, values, dq = refs
  i, row, b = pl.program_id(0), pl.program_id(2), blocks.l
  query = _at(queries, row, i, b)

  def column(j, dq_bK):
    key = _at((k, v, keys), row, j, b)
    _, dlogits = _gradients(blocks, i, j, query, key, values, queries[0].shape[1])
    return dq_bK + _dot(dlogits.astype(k.dtype), key[0], 1, 0)

  num_columns = i + 1 if blocks.skips else k.shape[1] // b
  dq_bK = jax.lax.fori_loop(0, num_columns, column, jnp.zeros(dq.shape, jnp.float32))
  dq[...] = dq_bK.astype(dq.dtype)


def _backward_keys(blocks, *refs):
  *queries, k, v, keys, values, dk, dv = refs
  j, row, b = pl.program_id(0), pl.program_id(2), blocks.m
  key = _at((k, v, keys), row, j, b)

  def step(i, sums):
    query = _at(queries, row, i, b)
    weights, dlogits = _gradients(blocks, i, j, query, key, values, queries[0].shape[1])
    dk_bK = sums[0] + _dot(dlogits.astype(k.dtype), query[0], 0, 0)
    return dk_bK, sums[1] + _dot(weights.astype(v.dtype), query[1], 0, 0)

  zeros = jnp.zeros(dk.shape, jnp.float32)
  first, end = j if blocks.skips else 0, queries[0].shape[1] // b
  dk_bK, dv_bK = jax.lax.fori_loop(first, end, step, (zeros, zeros))
  dk[...], dv[...] = dk_bK.astype(dk.dtype), dv_bK.astype(dv.dtype)


def _backward_values(blocks, *refs):
  *queries, k, v, keys, values, dvalues = refs
  B, b = keys.shape[0], blocks.l
  num_rows, num_columns = queries[0].shape[1] // b, k.shape[1] // b
  d = pl.program_id(0) - (num_rows - 1)  # keys' block minus queries'
  first, end = jnp.maximum(-d, 0), jnp.minimum(num_rows, num_columns - d)
  length = jnp.where(blocks.skips & (d > 0), 0, end - first)

  def step(n, sum_bb):
    row, i = jax.lax.div(n, length), first + jax.lax.rem(n, length)
    query, key = _at(queries, row, i, b), _at((k, v, keys), row, i + d, b)
    return sum_bb + _gradients(blocks, i, i + d, query, key, values, queries[0].shape[1])[1]

  dvalues[...] = jax.lax.fori_loop(0, B * length, step, jnp.zeros((b, b), jnp.float32))


def _attention_fwd(blocks, q, k, v, values, queries, keys):
  B, L, H, _ = q.shape
  outputs = [_Shape(q.shape, v.dtype), *[_Shape((B, H, L), jnp.float32)] * 2]
  inputs = (q, k, v, _copies(values), queries, keys)
  y, total, top = _call(blocks, _forward, blocks.l, outputs, *inputs)
  return y, (q, k, v, values, queries, keys, y, total, top)


def _attention_bwd(blocks, residuals, g):
  q, k, v, values, queries, keys, y, total, top = residuals
  H, b = q.shape[2], blocks.m
  blocks = dataclasses.replace(blocks, l=b)  # square ones
  mean = mean_gradient(g, y, 3)[..., 0].swapaxes(1, 2)
  inputs = (q, g, queries, mean, 1 / total, top, k, v, keys, _copies(values))
  dq, dk, dv = (_Shape(x.shape, x.dtype) for x in (q, k, v))
  [dq] = _call(blocks, _backward_queries, b, [dq], *inputs)
  dk, dv = _call(blocks, _backward_keys, b, [dk, dv], *inputs)
  if values is None:
    return dq, dk, dv, None, None, None
  N = values.shape[1] // b - 1
  [sums] = _call(blocks, _backward_values, b, [_Shape((1, N * b, H, b), jnp.float32)], *inputs)
  sums = sums.reshape(N, b, H, b).transpose(2, 0, 1, 3)
  # Those of neighbours overlap by half.
  bands = unskew(sums.reshape(H * N, b, b)).reshape(H, N, 2, b)
  near, far = (jnp.pad(bands[:, :, n], ((0, 0), (n, 1 - n), (0, 0))) for n in (0, 1))
  return dq, dk, dv, (near + far).reshape(values.shape), None, None


_attention = vjp_of(_attention_fwd, _attention_bwd)
