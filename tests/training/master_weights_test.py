import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.training import optimizers
from t5x_lite.training.optimizers import OptimizerConfig, master_weights

PARAMS = {'a': {'kernel': np.linspace(0.5, 2.0, 12).reshape(3, 4)}}
AXES = {'a': {'kernel': ('embed', 'mlp')}}


def run(tx, dtype, rates):
  """Returns the parameters after steps whose gradients point one way."""
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)
  state = tx.init(params)
  for rate in rates:
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params, learning_rate=rate)
    updates = jax.tree.map(lambda u, r=rate: r * u, updates)
    params = optax.apply_updates(params, updates)
  return params['a']['kernel'], state


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'adafactor'])
def test_parameters_are_the_rounded_copies(name):
  config = OptimizerConfig(name=name, master_weights=True)
  shapes = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
  tx = optimizers.make_optimizer(config, AXES, shapes)
  kernel, state = run(tx, jnp.bfloat16, [1e-3] * 5)
  assert kernel.dtype == jnp.bfloat16
  master = state['master']['a']['kernel']
  assert master.dtype == jnp.float32
  np.testing.assert_array_equal(kernel, master.astype(jnp.bfloat16))


def test_small_updates_add_up():
  # 1e-4 is below half of bfloat16's spacing at 1: alone it rounds away.
  tx = optax.sgd(1.0)
  lost, _ = run(optax.with_extra_args_support(tx), jnp.bfloat16, [1e-4] * 300)
  kept, _ = run(master_weights(tx), jnp.bfloat16, [1e-4] * 300)
  exact, _ = run(optax.with_extra_args_support(tx), jnp.float32, [1e-4] * 300)
  np.testing.assert_allclose(kept.astype(jnp.float32), exact, rtol=4e-3)
  assert np.max(np.abs(lost.astype(jnp.float32) - exact)) > 0.02


def test_a_rate_of_0_changes_nothing():
  tx = master_weights(optax.sgd(1.0))
  kernel, _ = run(tx, jnp.bfloat16, [0.0, 0.0])
  np.testing.assert_array_equal(kernel, jnp.asarray(PARAMS['a']['kernel'], jnp.bfloat16))


def test_copies_are_cut_like_their_parameters():
  config = OptimizerConfig(name='adafactor', master_weights=True)
  shapes = {'a': {'kernel': jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)}}
  tx = optimizers.make_optimizer(config, AXES, shapes)
  axes = optimizers.opt_state_axes(tx, shapes, AXES)
  assert axes['master'] == AXES
  inner = jax.tree.leaves(axes['inner'], is_leaf=lambda x: x in (('embed',), ('mlp',)))
  assert ('embed',) in inner and ('mlp',) in inner


def test_it_asks_for_what_it_needs():
  tx = master_weights(optax.sgd(1.0))
  state = tx.init(PARAMS | {'a': {'kernel': jnp.ones((3, 4))}})
  with pytest.raises(ValueError, match='learning_rate'):
    tx.update(PARAMS, state, PARAMS)
