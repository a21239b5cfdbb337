"""The cache is written in place, and layers lend and borrow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.models import blocks
from tests.models import tiny


@pytest.mark.parametrize('i', [0, 2])
def test_a_position_is_written_for_all_rows_or_for_each(i):
  cache = jnp.arange(3 * 2 * 5 * 2 * 4, dtype=jnp.float32)
  cache = cache.reshape(3, 2, 2, 5, 4)
  new = -jnp.ones((2, 1, 2, 4))
  together = blocks._write(cache, new, i, jnp.asarray(3))
  apart = blocks._write(cache, new, i, jnp.asarray([3, 3]))
  np.testing.assert_array_equal(together, apart)
  expected = np.asarray(cache).copy()
  expected[i, :, :, 3] = -1
  np.testing.assert_array_equal(together, expected)
  rows = np.asarray(cache).copy()
  rows[i, 0, :, 1] = rows[i, 1, :, 4] = -1
  np.testing.assert_array_equal(blocks._write(cache, new, i, jnp.asarray([1, 4])), rows)
  by_layer = blocks._write([*cache], new, i, jnp.asarray([1, 4]))
  np.testing.assert_array_equal(jnp.stack(by_layer), rows)


def test_beams_of_a_position_are_written_side_by_side():
  cache, new = (
    jnp.zeros((3, 1, 2, 5 * 2, 4)),
    jnp.ones((2, 1, 2, 4)) * jnp.asarray([[[[1]]], [[[2]]]]),
  )
  for index in (jnp.asarray(3), jnp.asarray([3, 3])):
    written = blocks._write(cache, new, 1, index)
    np.testing.assert_array_equal(written[1, 0, :, :, 0], [[0] * 6 + [1, 2] + [0] * 2] * 2)
    assert not written[::2].any()


def test_a_borrowing_decoder_layer_owns_only_cross_attention():
  cfg = tiny.config(share_encoder_decoder=True, num_decoder_layers=2)
  layer = blocks.DecoderLayer(cfg, rngs=nnx.Rngs(params=0))
  names = {path[0] for path, _ in nnx.to_flat_state(nnx.split(layer, graph=False)[1])}
  assert names == {'pre_cross_attention_layer_norm', 'encoder_decoder_attention'}
  lender = blocks.EncoderLayer(cfg, rngs=nnx.Rngs(params=1))
  norm, attention = layer.self_block(lender)
  assert norm is lender.pre_attention_layer_norm
  assert attention is lender.attention


def test_the_cache_is_a_pytree():
  cache = blocks.Cache(*(jnp.zeros(1) for _ in range(6)))
  cache = dataclasses.replace(cache, cross_mask_B11M=None)
  assert len(jax.tree.leaves(cache)) == 5
