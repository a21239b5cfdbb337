"""Weights in 8 bits: what is lost, and that everything reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.interop import tensors
from t5x_lite.models import int8
from t5x_lite.models.int8 import Int8
from tests.models import tiny


def test_a_channel_is_off_by_half_a_step():
  for path, axis in ((('layers', 'kernel'), 1), (('token_embedder', 'embedding'), 2)):
    weights = np.random.default_rng(0).standard_normal((3, 8, 6)).astype(np.float32)
    weights[1] *= 1000.0
    weights[0, :, 2] = 0.0
    weights[0, 3] = 0.0
    found = int8.quantize(path, jnp.asarray(weights))
    step = np.abs(weights).max(axis=axis, keepdims=True) / 127
    assert found.values.dtype == jnp.int8 and found.scales.shape == step.shape
    assert np.all(np.abs(found[...] - weights) <= 0.5001 * step)
    assert np.all(np.asarray(found.values)[weights == 0] == 0)
    assert found.values.max() == 127 and found.size == weights.size


def test_logits_lose_little(tmp_path):
  # Wide enough that errors of single weights average out.
  cfg = tiny.config(emb_dim=128, mlp_dim=256, num_encoder_layers=1, num_decoder_layers=1)
  t5x_lite.new(cfg).save(f'{tmp_path}/model')
  batch = tiny.batch()
  inputs, tokens = batch['encoder_input_tokens'], batch['decoder_input_tokens']
  logits, models = {}, {}
  for weights in ('float32', 'bfloat16', 'int8'):
    models[weights] = t5x_lite.load(f'{tmp_path}/model', param_dtype=weights)
    logits[weights] = models[weights].logits(inputs, tokens)
  norm = np.linalg.norm(logits['float32'])
  lost = {name: np.linalg.norm(x - logits['float32']) / norm for name, x in logits.items()}
  assert 0 < lost['bfloat16'] < 0.01 and 0 < lost['int8'] < 0.02, lost

  eight = models['int8']
  assert '(int8)' in repr(eight)
  size = sum(x.nbytes for x in jax.tree.leaves(eight.params))
  assert size < 0.3 * sum(x.nbytes for x in jax.tree.leaves(models['float32'].params))
  outputs = eight.generate([[5, 6, 7, 1], [9, 1]], max_new_tokens=4, num_beams=2)
  assert len(outputs) == 2 and all(map(len, outputs))
  for dtype in (None, 'float32'):
    with pytest.raises(
      UsageError, match=r"param_dtype is 'int8'; it must be another: 'int8' is for load"
    ):
      eight.save(f'{tmp_path}/again', dtype=dtype)
  with pytest.raises(UsageError, match=r"param_dtype is 'int8'"):
    t5x_lite.new(eight.config)


def test_layers_read_what_the_bits_stand_for():
  cfg = tiny.config(
    num_encoder_layers=1,
    num_decoder_layers=1,
    logits_via_embedding=True,
    scan_layers=False,
    relpos_per_layer=True,
    lora_rank=2,
  )
  found = tensors.of_params(tiny.params(cfg), cfg)
  params = tensors.place(found, cfg.replace(param_dtype='int8'))
  kept = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8))
  assert all(x.size <= 256 for x in kept if not isinstance(x, Int8))
  same = jax.tree.map(lambda x: x[...], params, is_leaf=lambda x: isinstance(x, Int8))
  batch = tiny.batch()
  inputs, tokens = batch['encoder_input_tokens'], batch['decoder_input_tokens']
  logits = [t5x_lite.Model(cfg, one).logits(inputs, tokens) for one in (params, same)]
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
