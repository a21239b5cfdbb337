"""A prompt read at once leaves what one token after another would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.models import t5
from tests.models import tiny

P, NEW = 7, 4


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize(
  'fields',
  [{}, {'scan_layers': False}, {'relpos_per_layer': True}],
  ids=['scanned', 'unrolled', 'bias per layer'],
)
def test_continuations_are_those_of_the_whole_sequence(fields, bidirectional):
  cfg = tiny.config(architecture='decoder', bidirectional_prefix=bidirectional, **fields)
  params = tiny.params(cfg.replace(scan_layers=True))
  if not cfg.scan_layers:
    params = tiny.unstack(params, cfg)
  graphdef, _, _ = t5.abstract_params(cfg)
  rng = np.random.default_rng(0)
  lengths = np.asarray([7, 3, 1])
  whole = rng.integers(2, 64, (3, P + NEW)).astype(np.int32)
  whole[:, 0] = 0
  prompts = np.where(np.arange(P) < lengths[:, None], whole[:, :P], 0)

  @jax.jit
  def stepwise(params):
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(None, None, batch_size=3, max_decode_length=P + NEW)
    logits, cache = model.prefill(cache, jnp.asarray(prompts), jnp.asarray(lengths))
    result = [logits]
    for i in range(NEW):
      rows = np.arange(3)
      logits, cache = model.decode_step(whole[rows, lengths + i], cache)
      result.append(logits)
    return jnp.stack(result, axis=1)

  @jax.jit
  def at_once(params):
    prefix = (np.arange(P + NEW) < lengths[:, None]).astype(np.int32)
    batch = {'decoder_input_tokens': jnp.asarray(whole)}
    if bidirectional:
      batch['decoder_causal_attention'] = jnp.asarray(prefix)
    return nnx.merge(graphdef, params)(batch)

  full = np.asarray(at_once(params))
  step = np.asarray(stepwise(params))
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(step[row], full[row, length - 1 : length + NEW], atol=1e-4)
