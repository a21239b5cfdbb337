import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.training import adafactor as adafactor_lib
from t5x_lite.training.adafactor import adafactor, factoring

STEPS = 25
LAYERS = 3
# Dims from 128 on are factored; a smaller one leaves the matrix unfactored.
LAYER_SHAPES = {
  'wide': ((128, 160), ('embed', 'mlp')),
  'tall': ((160, 128), ('mlp', 'embed')),
  'square': ((128, 128), ('embed', 'joined_kv')),
  'small': ((24, 160), ('embed', 'mlp')),
  'scale': ((12,), ('embed',)),
}


class Reference:
  """One parameter under Adafactor, written out in float64.

  Shazeer and Stern 2018, algorithms 4 (matrices) and 5 (vectors) with the
  update clipping of section 6, the relative step size of section 8 and
  beta2_t = 1 - t^-0.8 of section 7.2. T5X keeps row and column means in place
  of the sums, which cancels; momentum is that of its step, learning rate
  included (t5x/adafactor.py apply_param_gradient).
  """

  def __init__(
    self,
    p,
    *,
    factored,
    beta1=None,
    clip=1.0,
    weight_decay=None,
    decay_exponent=None,
    scaled=True,
    max_scale=None,
    offset=0,
  ):
    self.p = np.array(p, np.float64)
    self.factored, self.beta1, self.clip = factored, beta1, clip
    self.weight_decay, self.decay_exponent = weight_decay, decay_exponent
    self.scaled, self.max_scale = scaled, max_scale
    self.t = -offset
    self.rows = np.zeros(self.p.shape[0])
    self.columns = np.zeros(self.p.shape[-1])
    self.v = np.zeros(self.p.shape)
    self.m = np.zeros(self.p.shape)

  def step(self, g, lr):
    g = np.array(g, np.float64)
    self.t += 1
    beta2 = 1 - self.t**-0.8
    squared = g**2 + 1e-30
    if self.factored:
      self.rows = beta2 * self.rows + (1 - beta2) * squared.sum(axis=1)
      self.columns = beta2 * self.columns + (1 - beta2) * squared.sum(axis=0)
      v = np.outer(self.rows, self.columns) / self.rows.sum()
    else:
      self.v = v = beta2 * self.v + (1 - beta2) * squared
    u = g / np.sqrt(v)
    if self.clip:
      u /= max(1.0, np.sqrt(np.mean(u**2)) / self.clip)
    alpha = lr
    if self.scaled:
      scale = max(1e-3, np.sqrt(np.mean(self.p**2)))
      alpha *= min(scale, self.max_scale) if self.max_scale else scale
    step = alpha * u
    if self.beta1 is not None:
      self.m = step = self.beta1 * self.m + (1 - self.beta1) * step
    decay = self.weight_decay
    if self.decay_exponent:
      decay = (1.0 if decay is None else decay) * lr**self.decay_exponent
    self.p = (1 - (decay or 0)) * self.p - step


def make_layers(seed=0):
  """Returns a list of layers' parameters and a list of their gradients."""
  rng = np.random.default_rng(seed)

  def draw(shape, layer):
    # Layers of very different size, and gradients of heavy tails, so that
    # what is averaged over what shows.
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))
    return (x * 10.0 ** (layer - 2)).astype(np.float32)

  def draw_all():
    return [
      {name: draw(shape, i) for name, (shape, _) in LAYER_SHAPES.items()} for i in range(LAYERS)
    ]

  params = draw_all()
  params[2]['scale'] *= 0  # T5's biases-like start: the scale is epsilon2
  return params, [draw_all() for _ in range(STEPS)]


def stack(layers):
  return {name: np.stack([x[name] for x in layers]) for name in layers[0]}


STACKED_AXES = {name: ('layers', *axes) for name, (_, axes) in LAYER_SHAPES.items()}
UNROLLED_AXES = {
  str(i): {name: axes for name, (_, axes) in LAYER_SHAPES.items()} for i in range(LAYERS)
}


def rates():
  return [0.1 / (1 + i) for i in range(STEPS)]


def run(tx, params, grads, lrs=None):
  """Returns the parameters after all steps."""
  params = jax.tree.map(jnp.asarray, params)

  @jax.jit
  def step(params, state, g, lr):
    updates, state = tx.update(g, state, params, learning_rate=lr)
    return jax.tree.map(lambda p, u: p + lr * u, params, updates), state

  state = tx.init(params)
  for g, lr in zip(grads, lrs or rates(), strict=True):
    params, state = step(params, state, g, jnp.float32(lr))
  return params


def assert_close(got, want, start, rtol=2e-4):
  """Compares how far a parameter went with how far it should have gone."""
  moved = np.abs(want - start).max()
  assert moved > 0
  # rtol=1e-6 is what 25 float32 additions to the parameter may round.
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=rtol * moved)


SETTINGS = {
  'default': ({}, {}),
  'momentum': ({'beta1': 0.9}, {'beta1': 0.9}),
  'weight decay': ({'weight_decay_rate': 0.01}, {'weight_decay': 0.01}),
  'weight decay by rate': (
    {'weight_decay_rate_lr_exponent': 2.0, 'beta1': 0.5},
    {'decay_exponent': 2.0, 'beta1': 0.5},
  ),
  'both weight decays': (
    {'weight_decay_rate': 0.5, 'weight_decay_rate_lr_exponent': 1.0},
    {'weight_decay': 0.5, 'decay_exponent': 1.0},
  ),
  'no clipping': ({'clipping_threshold': None}, {'clip': None}),
  'hard clipping': ({'clipping_threshold': 0.3}, {'clip': 0.3}),
  'absolute step': ({'multiply_by_parameter_scale': False}, {'scaled': False}),
  'largest scale': ({'max_parameter_scale': 0.05}, {'max_scale': 0.05}),
  'step offset': ({'step_offset': -7}, {'offset': -7}),
  'unfactored': ({'factored': False}, {}),
}


@pytest.mark.parametrize('setting', SETTINGS)
def test_stacked_layers_are_the_papers_formulas_for_each_layer(setting):
  ours, theirs = SETTINGS[setting]
  layers, grads = make_layers()
  tx = adafactor(axes=STACKED_AXES, **ours)
  got = run(tx, stack(layers), [stack(g) for g in grads])
  for i, layer in enumerate(layers):
    for name, p in layer.items():
      factored = min(p.shape) >= 128 and ours.get('factored', True)
      want = Reference(p, factored=factored, **theirs)
      for g, lr in zip(grads, rates(), strict=True):
        want.step(g[i][name], lr)
      assert_close(got[name][i], want.p, p)


@pytest.mark.parametrize('setting', ['default', 'momentum', 'unfactored'])
def test_stacked_is_unrolled(setting):
  ours, _ = SETTINGS[setting]
  layers, grads = make_layers()
  stacked = run(adafactor(axes=STACKED_AXES, **ours), stack(layers), [*map(stack, grads)])

  def named(layers):
    return {str(i): layer for i, layer in enumerate(layers)}

  unrolled = run(adafactor(axes=UNROLLED_AXES, **ours), named(layers), [*map(named, grads)])
  for i, layer in enumerate(layers):
    for name, start in layer.items():
      assert_close(stacked[name][i], unrolled[str(i)][name], start, rtol=1e-5)


def test_optax_adafactor_on_stacked_parameters_is_another_optimizer():
  layers, grads = make_layers()
  kwargs = {'decay_rate': 0.8, 'multiply_by_parameter_scale': True}

  def optax_run(params, grads):
    return run(optax.with_extra_args_support(optax.adafactor(1.0, **kwargs)), params, grads)

  one = [optax_run(layer, [g[i] for g in grads]) for i, layer in enumerate(layers)]
  ours = run(adafactor(axes=STACKED_AXES), stack(layers), [*map(stack, grads)])
  stacked = optax_run(stack(layers), [*map(stack, grads)])
  for i, layer in enumerate(layers):
    for name, start in layer.items():
      # Layer by layer optax's is T5X's, and so ours (stacked) ...
      assert_close(ours[name][i], one[i][name], start, rtol=1e-3)
      # ... but stacked, the layers of small parameters run away.
      moved = np.abs(one[i][name] - start).max()
      off = np.abs(stacked[name][i] - one[i][name]).max() / moved
      assert off > (1.0 if i == 0 else 0.02), (i, name, off)


def test_state_has_only_what_is_used():
  layers, _ = make_layers()
  state = adafactor(axes=STACKED_AXES).init(stack(layers))
  assert state.m == {}
  assert set(state.v) == {'small', 'scale'}
  assert set(state.v_row) == set(state.v_col) == {'wide', 'tall', 'square'}
  assert state.v_row['wide'].shape == (LAYERS, 128)
  assert state.v_col['wide'].shape == (LAYERS, 160)
  assert state.v_row['tall'].shape == (LAYERS, 128)
  assert state.v_col['tall'].shape == (LAYERS, 160)
  momentum = adafactor(axes=STACKED_AXES, beta1=0.9, dtype_momentum=jnp.bfloat16).init(
    stack(layers)
  )
  assert {x.dtype for x in jax.tree.leaves(momentum.m)} == {jnp.bfloat16.dtype}


@pytest.mark.parametrize(
  ('shape', 'axes', 'rows', 'columns'),
  [
    ((512, 1024), ('embed', 'mlp'), (0,), (1,)),
    ((1024, 512), ('mlp', 'embed'), (1,), (0,)),
    ((512, 384), ('embed', 'joined_kv'), (1,), (0,)),
    ((512, 512), ('embed', 'joined_kv'), (0,), (1,)),
    ((32128, 512), ('vocab', 'embed'), (1,), (0,)),
    ((512, 127), ('embed', 'joined_kv'), (), ()),
    ((512,), ('embed',), (), ()),
    ((), (), (), ()),
    ((12, 32), ('heads', 'relpos_buckets'), (), ()),
    ((24, 512), ('layers', 'embed'), (), ()),
    ((24, 512, 1024), ('layers', 'embed', 'mlp'), (1,), (2,)),
    ((24, 12, 32), ('layers', 'heads', 'relpos_buckets'), (), ()),
    ((24, 512, 2, 128), ('layers', 'embed', 'heads', 'kv'), (3,), (1,)),
    ((512, 2, 64), ('embed', 'heads', 'kv'), (), ()),
  ],
)
def test_what_is_factored(shape, axes, rows, columns):
  layout = factoring(shape, axes)
  assert (layout.row_dims, layout.column_dims) == (rows, columns)
  batch = tuple(i for i, a in enumerate(axes) if a == 'layers')
  assert set(layout.averaging_dims) == set(range(len(shape))) - set(batch)


def test_axes_are_those_of_every_parameter():
  with pytest.raises(UsageError, match='no logical axes for a/b'):
    adafactor(axes={'x': ('embed',)}).init({'a': {'b': jnp.zeros(3)}})


def test_parameter_scale_by_path():
  params = {'a': jnp.full((3,), 2.0), 'b': jnp.full((3,), 2.0)}
  tx = adafactor(multiply_by_parameter_scale=[('a', False), ('.*', True)])
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(updates['a'], -np.ones(3), rtol=1e-6)
  np.testing.assert_allclose(updates['b'], -2 * np.ones(3), rtol=1e-6)
  tx = adafactor(multiply_by_parameter_scale=[('a', False)])
  with pytest.raises(UsageError, match='matches b'):
    tx.update(params, tx.init(params), params)


def test_nan_updates_are_skipped_if_asked():
  params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3,))}
  axes = {'a': ('layers', 'embed'), 'b': ('embed',)}
  grads = {'a': jnp.ones((2, 3)).at[0, 0].set(jnp.nan), 'b': jnp.ones((3,))}
  tx = adafactor(axes=axes, skip_nan_updates=True)
  updates, state = tx.update(grads, tx.init(params), params)
  # Clipping spreads the NaN over its layer, and over nothing else.
  np.testing.assert_array_equal(updates['a'][0], 0)
  np.testing.assert_allclose(updates['a'][1], -1, rtol=1e-6)
  np.testing.assert_allclose(updates['b'], -1, rtol=1e-6)
  assert np.all(np.isfinite(state.v['a']))
  plain = adafactor(axes=axes)
  updates, _ = plain.update(grads, plain.init(params), params)
  assert np.isnan(updates['a'][0, 0])


def test_a_learning_rate_of_zero_moves_nothing():
  params = {'a': jnp.ones((3,))}
  for kwargs in ({'beta1': 0.9}, {'weight_decay_rate_lr_exponent': 1.0}):
    tx = adafactor(**kwargs)
    rate = jnp.float32(0)
    updates, state = tx.update(params, tx.init(params), params, learning_rate=rate)
    np.testing.assert_array_equal(rate * updates['a'], 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_what_update_needs():
  params = {'a': jnp.ones((3,))}
  tx = adafactor()
  with pytest.raises(ValueError, match='params'):
    tx.update(params, tx.init(params))
  tx = adafactor(beta1=0.9)
  with pytest.raises(ValueError, match='learning_rate'):
    tx.update(params, tx.init(params), params)


def test_scale_by_parameter_rms_is_by_layer():
  params = {'w': jnp.stack([jnp.full((4,), 3.0), jnp.zeros((4,))])}
  tx = adafactor_lib.scale_by_parameter_rms(axes={'w': ('layers', 'embed')})
  updates, _ = tx.update({'w': jnp.ones((2, 4))}, tx.init(params), params)
  np.testing.assert_allclose(updates['w'], [[3.0] * 4, [1e-3] * 4], rtol=1e-6)
