import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.models import relative_position
from tests.models import tiny

RNGS = nnx.Rngs(params=0)


def bucket_by_hand(distance, bidirectional, num_buckets=32, max_distance=128):
  """Raffel et al. 2020, section 2.1, one distance at a time."""
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset = num_buckets if distance > 0 else 0
    n = abs(distance)
  else:
    n = max(-distance, 0)
  exact = num_buckets // 2
  if n < exact:
    return offset + n
  # A hair more than n, so that whole steps of the logarithm round down to
  # themselves (T5X adds float32's epsilon to the ratio).
  log = math.log(n / exact + 1e-7) / math.log(max_distance / exact)
  return offset + min(exact + int(log * (num_buckets - exact)), num_buckets - 1)


@pytest.mark.parametrize('bidirectional', [True, False])
def test_relative_position_bucket(bidirectional):
  distances = np.arange(-300, 301)
  ours = relative_position.relative_position_bucket(
    distances, bidirectional=bidirectional, num_buckets=32, max_distance=128
  )
  expected = [bucket_by_hand(int(d), bidirectional) for d in distances]
  np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(('L', 'M'), [(1, 1), (7, 7), (5, 40), (40, 5)])
def test_relative_bias_is_the_table_by_bucket(L, M):
  cfg = tiny.config()
  module = relative_position.RelativePositionBias(cfg, bidirectional=True, rngs=RNGS)
  bias = module.of(L, M)
  assert bias.shape == (1, cfg.num_heads, L, M)
  table = np.asarray(module.rel_embedding[...])
  for i in range(L):
    for j in range(M):
      np.testing.assert_array_equal(bias[0, :, i, j], table[:, bucket_by_hand(j - i, True)])


def test_relative_bias_at_one_position_is_a_row():
  module = relative_position.RelativePositionBias(tiny.config(), bidirectional=False, rngs=RNGS)
  full = module.of(6, 6)
  for i in range(6):
    row = module.at(jnp.asarray(i), 6)
    np.testing.assert_array_equal(row[0, :, 0, :], full[0, :, i, :])
  rows = module.at(jnp.asarray([2, 5]), 6)
  np.testing.assert_array_equal(rows[1, :, 0, :], full[0, :, 5, :])
