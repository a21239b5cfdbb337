import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import make_placement
from t5x_lite.training import optimizers
from t5x_lite.training.optimizers import (
  OptimizerConfig,
  make_optimizer,
  opt_state_axes,
  trainable_mask,
)
from tests.models import tiny

AXES = {
  'embedding': ('vocab', 'embed'),
  'layers': {'kernel': ('layers', 'embed', 'mlp'), 'scale': ('layers', 'embed')},
  'rel_embedding': ('heads', 'relpos_buckets'),
}
SHAPES = {
  'embedding': (256, 128),
  'layers': {'kernel': (2, 128, 256), 'scale': (2, 128)},
  'rel_embedding': (4, 32),
}
RATES = [0.1, 0.3, 0.05, 0.2, 0.01]


def draw(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def train(tx, params, grads, rates=RATES):
  """Returns parameters and state after the steps, as train_step makes them."""

  @jax.jit
  def step(params, state, g, lr):
    updates, state = tx.update(g, state, params, learning_rate=lr)
    return jax.tree.map(lambda p, u: p + lr * u, params, updates), state

  state = tx.init(params)
  for g, lr in zip(grads, rates, strict=True):
    params, state = step(params, state, g, jnp.float32(lr))
  return params, state


def grads_for(rates=RATES):
  return [draw(i + 1) for i in range(len(rates))]


def assert_trees_close(a, b, **kwargs):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


# Optax's optimizers without gradient noise and with no state of their own kind.
@pytest.mark.parametrize('name', sorted(set(optimizers.OPTIMIZERS) - {'adafactor', 'adamw_scale'}))
def test_updates_at_learning_rate_1_are_optaxs_with_a_schedule(name):
  # sm3 wants a number for its learning rate.
  factory = getattr(optax, name)
  rates = [0.1] * 5 if name == 'sm3' else RATES
  lr = 0.1 if name == 'sm3' else lambda count: jnp.asarray(RATES)[count]
  decay = {}
  if 'weight_decay' in inspect.signature(factory).parameters:
    decay['weight_decay'] = 0.0
  theirs = optax.with_extra_args_support(factory(learning_rate=lr, **decay))
  config = OptimizerConfig(name=name)
  # Two parameters are enough here, and compile sooner.
  params = draw(0)['layers']
  grads = [g['layers'] for g in grads_for(rates)]
  tx = make_optimizer(config, AXES['layers'], params)
  ours, _ = train(tx, params, grads, rates)
  want, _ = train(theirs, params, grads, [1.0] * len(rates))
  assert_trees_close(ours, want, rtol=1e-5, atol=1e-6)


def test_weight_decay_is_decoupled_and_spares_norms_and_biases():
  params = draw(0)
  grads = [jax.tree.map(jnp.zeros_like, params)]
  for name in ('adamw', 'adafactor', 'sgd', 'lion', 'adamw_scale'):
    config = OptimizerConfig(name=name, weight_decay=0.1)
    tx = make_optimizer(config, AXES, params)
    got, _ = train(tx, params, grads, [0.5])
    decayed = {
      **params,
      'embedding': params['embedding'] * 0.95,
      'layers': {**params['layers'], 'kernel': params['layers']['kernel'] * 0.95},
    }
    assert_trees_close(got, decayed, rtol=1e-6)
  config = OptimizerConfig(name='sgd', weight_decay=0.1, weight_decay_exclude='')
  got, _ = train(make_optimizer(config, AXES, params), params, grads, [0.5])
  np.testing.assert_allclose(got['layers']['scale'], params['layers']['scale'] * 0.95, rtol=1e-6)


def test_adamw_has_no_weight_decay_unless_asked():
  params = draw(0)  # optax.adamw's default is 1e-4
  tx = make_optimizer(OptimizerConfig(name='adamw'), AXES, params)
  zeros = [jax.tree.map(jnp.zeros_like, params)]
  assert_trees_close(train(tx, params, zeros, [0.5])[0], params, rtol=0)


def test_adamw_scale_is_nanot5s_formula_for_each_layer():
  # nanoT5 AdamWScale: AdamW whose step is multiplied by max(1e-3, rms(p)).
  rng = np.random.default_rng(0)
  p = rng.standard_normal((2, 3, 4)) * np.array([1.0, 1e-5])[:, None, None]
  grads = [rng.standard_normal(p.shape) for _ in range(6)]
  config = OptimizerConfig(name='adamw_scale', b1=0.8, b2=0.99, weight_decay=0.1)
  tx = make_optimizer(config, {'w': ('layers', 'embed', 'mlp')}, {'w': p})
  got, _ = train(
    tx,
    {'w': jnp.asarray(p, jnp.float32)},
    [{'w': jnp.asarray(g, jnp.float32)} for g in grads],
    [0.1] * 6,
  )
  for layer in range(2):
    w, m, v = p[layer].copy(), 0.0, 0.0
    for t, g in enumerate((g[layer] for g in grads), 1):
      m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g**2
      u = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6)
      scale = max(1e-3, np.sqrt(np.mean(w**2)))
      w = w - 0.1 * (scale * u + 0.1 * w)
    np.testing.assert_allclose(got['w'][layer], w, rtol=1e-4, atol=1e-6)


def test_global_norm_clip():
  params = draw(0)
  config = OptimizerConfig(name='sgd', global_norm_clip=0.5)
  tx = make_optimizer(config, AXES, params)
  grads = draw(1)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  for size, want in ((1.0, 0.5 / norm), (1e-4, 1e-4)):
    scaled = jax.tree.map(lambda g, size=size: g * np.float32(size), grads)
    got, _ = train(tx, params, [scaled], [1.0])
    step = jax.tree.map(lambda p, g, want=want: p - want * g, params, grads)
    assert_trees_close(got, step, rtol=1e-5, atol=1e-6)


# ---- Freezing ----


@pytest.mark.parametrize('name', ['adafactor', 'adamw', 'adamw_scale'])
def test_frozen_parameters_stay_and_cost_nothing(name):
  params = draw(0)
  config = OptimizerConfig(name=name, trainable='^layers/', weight_decay=0.1, global_norm_clip=1.0)
  tx = make_optimizer(config, AXES, params)
  got, state = train(tx, params, grads_for())
  for frozen in ('embedding', 'rel_embedding'):
    np.testing.assert_array_equal(got[frozen], params[frozen])
  alone = make_optimizer(
    OptimizerConfig(name=name, weight_decay=0.1, global_norm_clip=1.0),
    {'layers': AXES['layers']},
    {'layers': params['layers']},
  )
  want, alone_state = train(
    alone, {'layers': params['layers']}, [{'layers': g['layers']} for g in grads_for()]
  )
  # Clipping too saw the trained part alone.
  assert_trees_close(got['layers'], want['layers'], rtol=1e-6)
  sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in (state, alone_state)]
  assert sizes[0] == sizes[1]


def test_trainable_mask():
  mask = trainable_mask(OptimizerConfig(trainable='scale$|^emb'), draw(0))
  assert mask == {
    'embedding': True,
    'layers': {'kernel': False, 'scale': True},
    'rel_embedding': False,
  }
  with pytest.raises(UsageError, match='none of the 4 parameters, such as emb'):
    make_optimizer(OptimizerConfig(trainable='adapter'), AXES, draw(0))


# ---- Axes of the state ----


def axes_of(tx):
  params = draw(0)
  state = jax.eval_shape(tx.init, params)
  axes = opt_state_axes(tx, params, AXES)
  pairs = {}

  def note(path, leaf, names):
    assert len(names) == leaf.ndim, (path, names, leaf.shape)
    pairs[jax.tree_util.keystr(path, simple=True, separator='/')] = names

  jax.tree_util.tree_map_with_path(note, state, axes)
  return pairs


def test_state_axes_of_adafactor_are_those_left_in_each_moment():
  tx = make_optimizer(OptimizerConfig(b1=0.9, global_norm_clip=1.0), AXES, draw(0))
  assert axes_of(tx) == {
    'optimizer/count': (),
    'optimizer/m/embedding': ('vocab', 'embed'),
    'optimizer/m/layers/kernel': ('layers', 'embed', 'mlp'),
    'optimizer/m/layers/scale': ('layers', 'embed'),
    'optimizer/m/rel_embedding': ('heads', 'relpos_buckets'),
    'optimizer/v_row/embedding': ('embed',),
    'optimizer/v_row/layers/kernel': ('layers', 'embed'),
    'optimizer/v_col/embedding': ('vocab',),
    'optimizer/v_col/layers/kernel': ('layers', 'mlp'),
    'optimizer/v/layers/scale': ('layers', 'embed'),
    'optimizer/v/rel_embedding': ('heads', 'relpos_buckets'),
  }


def test_state_axes_of_square_matrices_are_not_confused():
  axes = {'q': ('layers', 'embed', 'joined_kv')}
  params = {'q': jnp.zeros((128, 128, 128))}
  tx = make_optimizer(OptimizerConfig(), axes, params)
  state = opt_state_axes(tx, params, axes)['optimizer']
  assert state.v_row == {'q': ('layers', 'embed')}
  assert state.v_col == {'q': ('layers', 'joined_kv')}


def test_state_axes_of_chains_masks_and_partitions():
  config = OptimizerConfig(name='adamw', weight_decay=0.1, global_norm_clip=1.0, trainable='layers')
  pairs = axes_of(make_optimizer(config, AXES, draw(0)))
  params = {k: v for k, v in pairs.items() if 'kernel' in k}
  assert len(params) == 2
  assert set(params.values()) == {('layers', 'embed', 'mlp')}
  assert not any('embedding' in k for k in pairs)
  assert {v for k, v in pairs.items() if 'count' in k} == {()}


def test_state_axes_of_anything_else_are_replicated_or_extended():
  def init(params):
    history = jax.tree.map(lambda p: jnp.zeros((5, *p.shape)), params)
    return {'history': history, 'flat': {'embedding': jnp.zeros((7,))}}

  tx = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
  pairs = axes_of(tx)
  assert pairs['history/embedding'] == (None, 'vocab', 'embed')
  assert pairs['flat/embedding'] == (None,)


@pytest.mark.parametrize(
  'config',
  [
    OptimizerConfig(b1=0.9, kwargs={'weight_decay_rate': 0.01}),
    OptimizerConfig(global_norm_clip=1.0, trainable='layers|emb'),
    OptimizerConfig(name='adamw_scale', weight_decay=0.1),
  ],
)
def test_8_devices_are_1(config):
  params, grads = draw(0), grads_for()
  tx = make_optimizer(config, AXES, params)
  want, want_state = train(tx, params, grads)

  placement = make_placement(MeshConfig(data=2, fsdp=2, model=2, parameter_dims=2))
  shapes = jax.eval_shape(tx.init, params)
  shardings = placement.shardings(params, AXES)
  state_shardings = placement.shardings(shapes, opt_state_axes(tx, params, AXES))

  def step(params, state, g, lr):
    updates, state = tx.update(g, state, params, learning_rate=lr)
    return jax.tree.map(lambda p, u: p + lr * u, params, updates), state

  step = jax.jit(step, out_shardings=(shardings, state_shardings))
  got = jax.device_put(params, shardings)
  state = jax.jit(tx.init, out_shardings=state_shardings)(got)
  for g, lr in zip(grads, RATES, strict=True):
    got, state = step(got, state, jax.device_put(g, shardings), jnp.float32(lr))
  assert_trees_close(got, want, rtol=1e-5, atol=1e-6)
  assert_trees_close(state, want_state, rtol=1e-4, atol=1e-6)
  if config.name == 'adafactor':
    moments = next(
      s
      for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, 'v_row'))
      if hasattr(s, 'v_row')
    )
    kernel = moments.v_row['layers']['kernel'].sharding.spec
    assert kernel == P(None, 'fsdp')
    kernel = moments.v_col['layers']['kernel'].sharding.spec
    assert kernel == P(None, 'model')


# ---- Mistakes ----


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    ({'name': 'adamW'}, 'did you mean adamw'),
    ({'name': 'lbfgs'}, 'allowed: adabelief'),
    ({'weight_decay': -0.1}, 'weight_decay is -0.1'),
    ({'global_norm_clip': 0}, 'global_norm_clip is 0'),
    ({'trainable': '('}, 'no regular expression'),
    ({'name': 'sgd', 'b2': 0.9}, "of sgd in OptimizerConfig is 'b2'"),
    ({'name': 'adamw', 'b1': 1.5}, 'less than 1'),
    ({'name': 'adamw', 'eps': -1}, 'eps is -1'),
    ({'kwargs': {'decay_rat': 0.8}}, 'did you mean decay_rate'),
    ({'name': 'adamw', 'kwargs': {'learning_rate': 1}}, 'learning_rate'),
  ],
)
def test_bad_settings(kwargs, match):
  with pytest.raises(UsageError, match=match):
    OptimizerConfig(**kwargs)


@pytest.mark.parametrize(
  'overrides',
  [
    {},
    {'scan_layers': False},
    {'logits_via_embedding': True, 'mlp_activations': ('relu',)},
    {'relpos_per_layer': True},
    {'architecture': 'decoder'},
  ],
)
def test_every_parameter_of_every_model_has_axes_for_its_moments(overrides):
  cfg = tiny.config(emb_dim=128, head_dim=32, mlp_dim=256, **overrides)
  _, params, axes = t5.abstract_params(cfg)
  tx = make_optimizer(OptimizerConfig(), axes, params)
  state = jax.eval_shape(tx.init, params)['optimizer']
  moments = opt_state_axes(tx, params, axes)['optimizer']
  factored = 0
  for shape, roles in zip(
    jax.tree.leaves(params), jax.tree.structure(params).flatten_up_to(axes), strict=True
  ):
    matrix = [n for n, r in zip(shape.shape, roles, strict=True) if r != 'layers']
    factored += len(matrix) == 2 and min(matrix) >= 128
  assert len(jax.tree.leaves(state.v_row)) == factored > 5

  def check(x, names):
    assert x.ndim == len(names) > 0
    assert ('layers' in names) == (cfg.scan_layers and x.shape[0] in (2, 3))

  for field in ('v_row', 'v_col', 'v'):
    jax.tree.map(check, getattr(state, field), getattr(moments, field))
