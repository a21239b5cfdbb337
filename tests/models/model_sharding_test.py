import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding import steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.models import model_sharding, t5
from t5x_lite.parallel.partitioning import MeshConfig
from tests.models import tiny


def load(params, specs):
  return jax.tree.map(
    lambda x, spec: jax.device_put(x.astype(spec.dtype), spec.sharding), params, specs
  )


@pytest.mark.parametrize('tied', [True, False])
def test_casting_once_changes_no_bit(tied):
  """bfloat16 of the loader is the bfloat16 that the model reads."""
  cfg = tiny.config(dtype='bfloat16', logits_via_embedding=tied, relpos_per_layer=not tied)
  placement = model_sharding.place_model(cfg, MeshConfig(data=8))
  params = tiny.params(cfg)
  batch = {'encoder_input_tokens': tiny.batch(8)['encoder_input_tokens']}
  whole = load(params, model_sharding.param_specs(cfg, placement))
  specs = model_sharding.inference_params(cfg, placement)
  step = model_sharding.jit_step(
    steps.make_predict_step, cfg, placement, DecodingConfig(max_decode_length=6)
  )
  expected = step(whole, batch)
  found = step(load(params, specs), batch)
  jax.tree.map(np.testing.assert_array_equal, expected, found)
  sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (whole, specs)]
  assert sizes[1] < 0.75 * sizes[0]


def test_nothing_is_cast_up():
  cfg = tiny.config(dtype='float32', param_dtype='bfloat16')
  placement = model_sharding.place_model(cfg, MeshConfig(data=8))
  specs = model_sharding.inference_params(cfg, placement)
  assert {x.dtype for x in jax.tree.leaves(specs)} == {jnp.dtype('bfloat16')}


def test_one_jitted_step_for_equal_arguments():
  cfg = tiny.config()
  placement = model_sharding.place_model(cfg, MeshConfig(data=8))
  one = model_sharding.jit_step(steps.make_score_step, cfg, placement)
  again = model_sharding.place_model(tiny.config(), MeshConfig(data=8))
  assert model_sharding.jit_step(steps.make_score_step, tiny.config(), again) is one
  other = model_sharding.place_model(cfg, MeshConfig(data=4, model=2))
  assert model_sharding.jit_step(steps.make_score_step, cfg, other) is not one


def test_count_params():
  cfg = tiny.config()
  _, shapes, _ = t5.abstract_params(cfg)
  assert model_sharding.count_params(shapes) == model_sharding.count_params(tiny.params(cfg))
