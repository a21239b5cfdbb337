import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.models import attention_inputs
from t5x_lite.models.attention_inputs import Visibility
from tests.models import attention_cases


def sees(visibility, b, i, j) -> bool:
  """One pair at a time."""
  if visibility.key_seen_BM is not None and not visibility.key_seen_BM[b, j]:
    return False
  if (
    visibility.segments is not None and visibility.segments[0][b, i] != visibility.segments[1][b, j]
  ):
    return False
  prefix = visibility.prefix_BL
  in_prefix = prefix is not None and bool(prefix[b, i]) and bool(prefix[b, j])
  return not visibility.causal or j <= i or in_prefix


@pytest.mark.parametrize('kind', ['encoder', 'causal', 'prefix', 'cross'])
@pytest.mark.parametrize('packed', [False, True])
def test_masks_are_the_pairs_that_see_each_other(kind, packed):
  B, L, M = 2, 7, 5 if kind == 'cross' else 7
  _, visibility = attention_cases.problem(kind=kind, B=B, L=L, M=M, H=1, K=4, packed=packed)
  visibility = jax.tree.map(np.asarray, visibility)
  expected = np.array(
    [[[sees(visibility, b, i, j) for j in range(M)] for i in range(L)] for b in range(B)]
  )
  dense = visibility.dense(L)
  np.testing.assert_array_equal(np.broadcast_to(dense, (B, 1, L, M))[:, 0], expected)
  queries, keys = visibility.codes(B, L, M)
  _, found = attention_inputs.Blocks(1, 1, M, visibility.causal, visibility.skips).masked(
    jnp.zeros((B, L, M)),
    queries[:, :, None],
    keys[:, None, :],
    jnp.arange(L)[None, :, None],
    jnp.arange(M)[None, None, :],
  )
  np.testing.assert_array_equal(found, expected)
  if not visibility.causal:
    for mask in (dense, visibility):
      any_seen = np.broadcast_to(attention_inputs.sees_any(mask), (B, L))
      np.testing.assert_array_equal(any_seen, expected.any(-1))


def test_without_any_field_everything_is_seen():
  assert Visibility().dense(3).all()


def test_skew_and_its_transpose():
  values = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12)))
  x = attention_inputs.skew(values, 5, 7)
  for i in range(5):
    np.testing.assert_array_equal(x[:, i], values[:, 4 - i : 11 - i])
  transposed = jax.linear_transpose(lambda v: attention_inputs.skew(v, 5, 7), values)
  np.testing.assert_allclose(attention_inputs.unskew(x), transposed(x)[0], rtol=1e-6)
