"""Adafactor's state between T5X's arrays and ours.

The arrays of a scanned and of an unrolled T5X run are constructed here, by
T5X's rules as t5x/adafactor.py states them.
"""

import jax
import numpy as np
import pytest
from etils import epath

from t5x_lite.interop import (
  adafactor_moments,
  checkpoint_source,
  export,
  t5x,
  tensor_names,
  tensors,
)
from t5x_lite.interop.adafactor_moments import Moment
from t5x_lite.models import t5
from t5x_lite.parallel import pytrees
from t5x_lite.programs import convert
from t5x_lite.programs.train import train
from t5x_lite.runs import checkpoints
from t5x_lite.training import optimizers
from t5x_lite.training.schedules import ScheduleConfig
from tests import tiny_run
from tests.models import tiny

# Some matrices are factored (both dims at least 128), wide and tall ones; the
# attention's are square, where which dim is the row is a matter of convention.
SIZES = dict(
  vocab_size=64,
  emb_dim=128,
  num_heads=4,
  head_dim=32,
  mlp_dim=136,
  num_encoder_layers=2,
  num_decoder_layers=1,
)


def config(**fields):
  return tiny.config(**{**SIZES, **fields})


def random_moments(cfg, seed=0):
  rng = np.random.default_rng(seed)
  result = {}
  for name, shape in tensor_names.shapes(cfg).items():
    if len(shape) == 2 and min(shape) >= 128:
      result[name] = Moment(*(rng.random(size, np.float32) for size in shape))
    else:
      result[name] = Moment(rng.random(shape, np.float32))
  return result


def same(a, b):
  assert a.keys() == b.keys()
  for name, moment in a.items():
    other = b[name]
    assert (moment.second is None) == (other.second is None), name
    np.testing.assert_array_equal(moment.first, other.first)
    if moment.second is not None:
      np.testing.assert_array_equal(moment.second, other.second)


def flat(tree, prefix=t5x.PARAM_STATES):
  return {
    prefix + pytrees.path_name(keys): tensors.of_array(leaf)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_unrolled_t5x_state():
  cfg = config()
  given = random_moments(cfg)
  tree = adafactor_moments.to_t5x(given, cfg)
  kernel = tree['encoder']['layers_1']['mlp']['wi_0']['kernel']
  # T5X: v_row keeps the smaller dim, unused places are zeros((1,)).
  assert kernel['v_row'].shape == (128,)
  assert kernel['v_col'].shape == (136,)
  assert kernel['v'].shape == kernel['m'].shape == (1,)
  tall = tree['encoder']['layers_1']['mlp']['wo']['kernel']
  assert (tall['v_row'].size, tall['v_col'].size) == (128, 136)
  assert tree['token_embedder']['embedding']['v'].shape == (64, 128)
  same(adafactor_moments.of_t5x(flat(tree), cfg), given)


def test_scanned_t5x_state():
  cfg = config(relpos_per_layer=True)
  given = random_moments(cfg)
  tree = adafactor_moments.to_t5x(given, cfg)
  layer = tree['encoder']['encoder']
  # ('embed', 'layers', 'mlp'): v_row keeps embed, v_col the rest.
  assert layer['mlp']['wi_0']['kernel']['v_row'].shape == (128, 2)
  assert layer['mlp']['wi_0']['kernel']['v_col'].shape == (2, 136)
  # ('mlp', 'layers', 'embed')
  assert layer['mlp']['wo']['kernel']['v_row'].shape == (2, 128)
  assert layer['mlp']['wo']['kernel']['v_col'].shape == (136, 2)
  assert layer['relpos_bias']['rel_embedding']['v'].shape == (4, 2, 32)
  assert layer['pre_mlp_layer_norm']['scale']['v'].shape == (128, 2)
  same(adafactor_moments.of_t5x(flat(tree), cfg), given)


def test_small_scanned_matrices_which_t5x_factors_and_we_do_not():
  cfg = tiny.config(relpos_per_layer=True)
  rng = np.random.default_rng(0)
  first, second = rng.random(16), rng.random(32)
  given = {
    name: Moment(np.zeros(shape, np.float32)) for name, shape in tensor_names.shapes(cfg).items()
  }
  name = 'encoder/layers_1/mlp/wi_0/kernel'
  given[name] = Moment(np.outer(first, second))
  tree = adafactor_moments.to_t5x(given, cfg)
  back = adafactor_moments.of_t5x(flat(tree), cfg)
  np.testing.assert_allclose(back[name].as_whole(), given[name].first, rtol=1e-6)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_ours_and_back(scan_layers):
  cfg = config(scan_layers=scan_layers)
  given = random_moments(cfg)
  state = adafactor_moments.to_run(given, cfg, step=9)
  stored = {'.'.join(('opt_state', *keys)): t for keys, t in state.items()}
  same(adafactor_moments.of_run(stored, cfg), given)
  count = [t for keys, t in state.items() if keys[-1] == 'count']
  assert [int(t.read()) for t in count] == [9]


def test_a_run_that_factors_smaller_matrices_is_read():
  cfg = tiny.config()
  stored = {}
  for path, leaf, names in tensor_names.leaves(cfg):
    layers = leaf.shape[: tensor_names.is_stacked(cfg, path)]
    shape, fields = tensor_names.shapes(cfg)[names[0]], {'v': leaf.shape}
    if len(shape) == 2:
      fields = {'v_row': (*layers, min(shape)), 'v_col': (*layers, max(shape))}
    for field, size in fields.items():
      stored['.'.join(('opt_state', field, *path))] = tensors.of_array(np.zeros(size))
  found = adafactor_moments.of_run(stored, cfg)
  for name, shape in tensor_names.shapes(cfg).items():
    assert found[name].as_whole().shape == shape


def test_another_optimizer_is_no_adafactor():
  cfg = config()
  assert adafactor_moments.of_t5x({}, cfg) == {}
  assert adafactor_moments.of_run({}, cfg) == {}


@pytest.mark.parametrize('relpos_per_layer', [False, True])
def test_a_t5x_run_goes_on_here_and_back(relpos_per_layer, tmp_path):
  cfg = config(relpos_per_layer=relpos_per_layer)
  found = tensors.of_params(tiny.params(cfg), cfg)
  given = random_moments(cfg)
  source = checkpoint_source.Source('', 't5x', cfg, found, step=21)
  export.write(epath.Path(tmp_path / 't5x'), source, to='t5x', second_moments=given)
  run = str(tmp_path / 'run')
  convert.convert(source=str(tmp_path / 't5x'), destination=run)
  # What train restores with restore_optimizer=True, through Orbax.
  restored = checkpoint_source.open_source(run)
  _, shapes, axes = t5.abstract_params(restored.config)
  tx = optimizers.make_optimizer(optimizers.OptimizerConfig(), axes, shapes)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
    {
      'step': jax.ShapeDtypeStruct((), np.int32),
      'params': shapes,
      'opt_state': jax.eval_shape(tx.init, shapes),
    },
  )
  state = checkpoints.load_state(run, wanted)
  assert int(state['step']) == 21
  inner = state['opt_state']['optimizer']
  assert int(inner.count) == 21
  kernel = inner.v_row['encoder']['layers']['mlp']['wo']['kernel']
  for i in range(2):
    second = given[f'encoder/layers_{i}/mlp/wo/kernel'].second
    np.testing.assert_array_equal(kernel[i], second)
  back = str(tmp_path / 'back')
  convert.convert(source=run, destination=back, to='t5x')
  same(checkpoint_source.open_source(back).read_moments(), given)


@pytest.mark.parametrize('settings', [{}, {'global_norm_clip': 1.0, 'weight_decay': 0.01}])
def test_training_goes_on_inside_what_was_converted(settings, tmp_path, caplog):
  """With T5X's step and second moments, whatever stands before Adafactor."""
  cfg = config(vocab_size=384)
  given = random_moments(cfg)
  found = tensors.of_params(tiny.params(cfg), cfg)
  source = checkpoint_source.Source('', 't5x', cfg, found, step=21)
  export.write(epath.Path(tmp_path / 't5x'), source, to='t5x', second_moments=given)
  run = str(tmp_path / 'run')
  convert.convert(source=str(tmp_path / 't5x'), destination=run, vocabulary='byte')
  saved = checkpoint_source.open_source(run).config
  optimizer = optimizers.OptimizerConfig(
    schedule=ScheduleConfig(factors='constant', base_learning_rate=0.0), **settings
  )
  state = train(**tiny_run.arguments(run, model=saved, optimizer=optimizer, total_steps=22))
  assert int(state.step) == 22
  assert 'is read from its beginning' in caplog.text
  inner = state.opt_state['optimizer']
  assert int(inner.count) == 22
  # One step later: beta2 of what was converted is still in them.
  beta2 = 1 - 22.0**-0.8
  moved = np.asarray(inner.v['encoder']['encoder_norm']['scale'])
  assert (moved >= 0.999 * beta2 * given['encoder/encoder_norm/scale'].first).all()
  assert (moved < given['encoder/encoder_norm/scale'].first + 0.1).all()


def test_a_new_state_is_all_zeros():
  cfg = config()
  tree = adafactor_moments.to_t5x(adafactor_moments.new(cfg), cfg)
  assert not any(leaf.any() for leaf in jax.tree.leaves(tree))
