"""Layers below the open ones keep every byte, and their optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.parallel import pytrees
from t5x_lite.training import losses, optimizers, steps, train_state
from t5x_lite.training.optimizers import OptimizerConfig
from tests.models import tiny


def states(cfg, optimizer, num_steps):
  graphdef, shapes, axes = t5.abstract_params(cfg)
  tx = optimizers.make_optimizer(optimizer, axes, shapes)
  params = tiny.params(cfg.replace(scan_layers=True))
  if not cfg.scan_layers:
    params = tiny.unstack(params, cfg)
  state = train_state.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
  step = jax.jit(steps.make_train_step(graphdef, tx, lambda s: 0.01, losses.LossConfig()))
  found = [state]
  for _ in range(num_steps):
    found.append(step(found[-1], tiny.batch(), jax.random.key(0))[0])
  return found


def moved(a, b):
  """Returns which layers of which stack changed, and what else did."""
  found = set()
  other = pytrees.flatten_names(b)
  for name, x in pytrees.flatten_names(a).items():
    x, y = np.asarray(x), np.asarray(other[name])
    side, kind, *rest = name.split('/')
    if kind != 'layers':
      found |= {f'{side}/{kind}'} if (x != y).any() else set()
    elif rest[0].isdigit():
      found |= {f'{side}/{rest[0]}'} if (x != y).any() else set()
    else:
      found |= {f'{side}/{i}' for i in range(len(x)) if (x[i] != y[i]).any()}
  return found


ALWAYS = {
  'decoder/decoder_norm',
  'decoder/logits_dense',
  'encoder/encoder_norm',
  'token_embedder/embedding',
}


@pytest.mark.parametrize(('name', 'scan'), [('adafactor', True), ('adamw', False)])
def test_one_more_layer_from_the_top(name, scan):
  optimizer = OptimizerConfig(
    name=name, unfreeze_every=2, weight_decay=0.1 if name == 'adamw' else 0.0
  )
  found = states(tiny.config(scan_layers=scan), optimizer, 5)
  first, _, two, _, four, five = (state.params for state in found)
  assert moved(first, two) == ALWAYS | {'encoder/1', 'decoder/2'}
  encoder = {'encoder/0', 'encoder/1', 'encoder/relpos_bias'}
  assert moved(first, four) == ALWAYS | encoder | {'decoder/1', 'decoder/2'}
  assert moved(four, five) == ALWAYS | encoder | {
    'decoder/0', 'decoder/1', 'decoder/2', 'decoder/relpos_bias',
  }  # fmt: skip
  # Moments of a layer that has not trained are as they were made.
  before, after = (pytrees.flatten_names(found[i].opt_state) for i in (0, 2))
  for path in before:
    if scan and '/decoder/layers/' in path and np.ndim(before[path]) > 1:
      np.testing.assert_array_equal(before[path][:2], after[path][:2])
    elif '/decoder/layers/0/' in path:
      np.testing.assert_array_equal(before[path], after[path])


def test_scanned_is_unrolled():
  optimizer = OptimizerConfig(name='adamw', unfreeze_every=1, global_norm_clip=0.5)
  cfg = tiny.config(num_encoder_layers=1, num_decoder_layers=2)
  scanned = states(cfg, optimizer, 3)[-1].params
  unrolled = states(cfg.replace(scan_layers=False), optimizer, 3)[-1].params
  wanted = pytrees.flatten_names(tiny.unstack(jax.device_get(scanned), cfg))
  for name, x in pytrees.flatten_names(unrolled).items():
    np.testing.assert_allclose(x, wanted[name], atol=2e-5, err_msg=name)


def test_it_counts_from_one():
  with pytest.raises(UsageError, match='unfreeze_every is 0'):
    OptimizerConfig(unfreeze_every=0)
