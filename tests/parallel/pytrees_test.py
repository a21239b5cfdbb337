import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_lite.parallel import pytrees
from t5x_lite.training.train_state import TrainState


def make_tree():
  params = {'a': {0: jnp.ones(2), 1: jnp.zeros(3)}, 'b': [jnp.arange(4)]}
  tx = optax.chain(optax.clip(1.0), optax.adam(1.0), optax.ema(0.9))
  return TrainState(jnp.asarray(3), params, tx.init(params))


def test_plain_trees_have_string_keys_only():
  plain = pytrees.to_plain(make_tree())
  assert set(plain) == {'step', 'params', 'opt_state'}
  assert set(plain['params']['a']) == {'0', '1'}
  assert set(plain['params']['b']) == {'0'}
  assert 'mu' in plain['opt_state']['1']['0']


def test_round_trip():
  tree = make_tree()
  again = pytrees.from_plain(pytrees.to_plain(tree), tree)
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_names_are_paths_in_tree_order():
  tree = make_tree()
  names = pytrees.flatten_names(tree)
  assert list(names)[:4] == ['step', 'params/a/0', 'params/a/1', 'params/b/0']
  assert len(names) == len(jax.tree.leaves(tree))
  plain = pytrees.to_plain(tree)
  assert pytrees.flatten_names(plain).keys() == names.keys()
