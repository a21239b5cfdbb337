"""Random attention problems, and their comparison with dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from t5x_lite.models import attention
from t5x_lite.models.attention_inputs import Visibility, skew

KINDS = ('encoder', 'causal', 'prefix', 'cross')
TOLERANCES = {'float32': 1e-5, 'bfloat16': 2e-2}


@st.composite
def cases(draw, max_length: int = 40):
  """Draws what `problem` takes."""
  kind = draw(st.sampled_from(KINDS))
  lengths = st.integers(1, max_length)
  L = draw(lengths)
  return dict(
    kind=kind,
    B=draw(st.integers(1, 2)),
    L=L,
    M=draw(lengths) if kind == 'cross' else L,
    H=draw(st.integers(1, 3)),
    K=draw(st.sampled_from([4, 8])),
    packed=draw(st.booleans()),
    dtype=draw(st.sampled_from(list(TOLERANCES))),
    seed=draw(st.integers(0, 1000)),
  )


def problem(*, kind, B, L, M, H, K, packed=False, dtype='float32', seed=0):
  """Returns (q, k, v, values by distance or None) and a Visibility.

  The first row is padding throughout, so that its queries see nothing where
  padding is hidden.
  """
  rng = np.random.default_rng(seed)
  q, k, v = (
    jnp.asarray(rng.standard_normal((B, n, H, K)), dtype) * scale
    for n, scale in ((L, K**-0.5), (M, 1), (M, 1))
  )
  values = None
  if kind != 'cross':
    values = jnp.asarray(rng.standard_normal((H, L + M - 1)), jnp.float32)
  segments, seen = None, rng.random((B, M)) < 0.8
  seen[0] = False
  if packed:
    keys = np.sort(rng.integers(0, 4, (B, M)), axis=1)
    seen &= keys != 0
    queries = np.sort(rng.integers(0, 4, (B, L)), axis=1) if kind == 'cross' else keys
    segments = (jnp.asarray(queries), jnp.asarray(keys))
  causal = kind in ('causal', 'prefix')
  return (q, k, v, values), Visibility(
    key_seen_BM=None if causal else jnp.asarray(seen),
    segments=segments,
    prefix_BL=jnp.arange(L)[None] < rng.integers(0, L + 1, (B, 1)) if kind == 'prefix' else None,
    causal=causal,
  )


def dense(q, k, v, values, visibility):
  """The same by the dense implementation, in float32."""
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  L, M = q.shape[1], k.shape[1]
  bias = None if values is None else skew(jnp.pad(values, ((0, 0), (0, 1))), L, M)[None]
  return attention.attention(q, k, v, bias, visibility.dense(L))


def check(fn, case):
  """Compares results and all gradients of fn(q, k, v, values, visibility)."""
  arguments, visibility = problem(**case)
  g = np.random.default_rng(1).standard_normal(arguments[0].shape)

  @jax.jit
  def both(arguments, visibility):
    y, vjp = jax.vjp(lambda *a: fn(*a, visibility), *arguments)
    expected, dense_vjp = jax.vjp(lambda *a: dense(*a, visibility), *arguments)
    return (y, *vjp(jnp.asarray(g, y.dtype))), (expected, *dense_vjp(jnp.asarray(g, jnp.float32)))

  found, expected = both(arguments, visibility)
  assert found[0].dtype == case['dtype']
  for one, other, argument in zip(found, expected, (arguments[0], *arguments), strict=True):
    if one is None:
      continue
    assert one.dtype == argument.dtype
    one, other = (np.asarray(x, np.float32) for x in (one, other))
    tolerance = TOLERANCES[case['dtype']]
    np.testing.assert_allclose(one, other, atol=tolerance * max(1, np.abs(other).max()))
