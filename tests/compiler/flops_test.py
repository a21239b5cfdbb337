import math

import jax
import numpy as np
import pytest

from t5x_lite.compiler import flops
from t5x_lite.models import t5
from t5x_lite.models.config import named_config
from tests.models import tiny

SHAPE = dict(batch_size=3, inputs=10, targets=7)


def matmul_flops(jaxpr):
  """Adds up the dot products of a jaxpr, 2 a multiply-add."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contract, _), _ = equation.params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      size = math.prod(equation.outvars[0].aval.shape)
      total += 2 * size * math.prod(shape[i] for i in contract)
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += matmul_flops(inner)
  return total


@pytest.mark.parametrize(
  'overrides', [{}, dict(mlp_activations=('relu',), logits_via_embedding=True)]
)
def test_forward_flops_are_those_of_the_models_matmuls(overrides):
  """The formula leaves out only what a causal mask hides."""
  cfg = tiny.config(scan_layers=False, **overrides)
  graphdef, shapes, _ = t5.abstract_params(cfg)
  tokens = {
    'encoder_input_tokens': np.ones((3, 10), np.int32),
    'decoder_input_tokens': np.ones((3, 7), np.int32),
  }

  def forward(params, batch):
    from flax import nnx

    return nnx.merge(graphdef, params)(batch)

  counted = matmul_flops(jax.make_jaxpr(forward)(shapes, tokens).jaxpr)
  hidden = 2 * 3 * 7 * 7 * cfg.num_heads * cfg.head_dim
  expected = counted - cfg.num_decoder_layers * hidden
  found = flops.forward_flops(cfg, **SHAPE)
  assert found == pytest.approx(expected, rel=1e-6)


def test_beams_share_the_encoder_and_its_keys():
  """The difference to one output is the decoder's alone, and half that of two more."""
  cfg = named_config('t5_1_1_small')
  one, two, three = (flops.forward_flops(cfg, **SHAPE, outputs=n) for n in (1, 2, 3))
  assert three - two == pytest.approx(two - one)
  decoder = cfg.replace(architecture='decoder')
  assert two - one > flops.forward_flops(decoder, **{**SHAPE, 'inputs': 0})
  assert two < 2 * one


def test_training_costs_three_forward_passes():
  cfg = named_config('t5_1_1_small')
  batch = {'encoder_input_tokens': np.zeros((3, 10)), 'decoder_target_tokens': np.zeros((3, 7))}
  assert flops.batch_train_flops(cfg, batch) == 3 * flops.forward_flops(cfg, **SHAPE)


def test_long_batches_cost_six_flops_a_parameter_and_token():
  """Up to attention, the rule of thumb of 6 N (Kaplan et al. 2020)."""
  cfg = named_config('t5_1_1_xxl')
  per_token = 3 * flops.forward_flops(cfg, batch_size=1, inputs=512, targets=512) / 512
  layers = 24 * (12 * 4096**2 + 6 * 4096 * 10240) + 4096 * 32128
  assert per_token == pytest.approx(6 * layers, rel=0.05)


def test_the_summary_counts_tokens_of_both_sides():
  config = named_config('t5_1_0_base')
  batch = {
    'encoder_input_tokens': np.zeros((2, 512), np.int32),
    'decoder_target_tokens': np.zeros((2, 128), np.int32),
  }
  total = 3 * flops.forward_flops(config, batch_size=2, inputs=512, targets=128)
  expected = f'{total:.3e} FLOPs a step, {total / 1280:.3e} a token of 1,280'
  assert flops.summary(config, batch) == expected
