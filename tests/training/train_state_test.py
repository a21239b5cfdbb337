"""The state is described before it exists, and made where it will live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.models import model_sharding, t5
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.placement import make_placement
from t5x_lite.training import optimizers, train_state
from tests.models import tiny


def make(mesh_config, optimizer='adafactor'):
  cfg = tiny.config(emb_dim=128, mlp_dim=256, vocab_size=512)
  _, shapes, axes = t5.abstract_params(cfg)
  tx = optimizers.make_optimizer(optimizers.OptimizerConfig(name=optimizer), axes, shapes)
  return cfg, tx, train_state.make_spec(cfg, tx, make_placement(mesh_config))


@pytest.mark.parametrize('optimizer', ['adafactor', 'adamw'])
def test_sharded_init_matches_its_description(optimizer):
  mesh = partitioning.MeshConfig(data=1, fsdp=4, model=2, parameter_dims=2)
  cfg, tx, spec = make(mesh, optimizer)
  state = train_state.init_state(cfg, tx, spec, jax.random.key(0))

  def check(x, s):
    assert (x.shape, x.dtype) == (s.shape, s.dtype)
    assert x.sharding.is_equivalent_to(s.sharding, x.ndim)

  jax.tree.map(check, state, spec.shapes)
  kernel = state.params['encoder']['layers']['mlp']['wi_0']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_init_does_not_depend_on_the_mesh():
  states = []
  for mesh in (
    partitioning.MeshConfig(),
    partitioning.MeshConfig(fsdp=4, model=2, parameter_dims=2),
  ):
    cfg, tx, spec = make(mesh)
    states.append(train_state.init_state(cfg, tx, spec, jax.random.key(5)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *states)


def test_starting_from_parameters_keeps_them():
  cfg, tx, spec = make(partitioning.MeshConfig())
  state = train_state.init_state(cfg, tx, spec, jax.random.key(0))
  new = train_state.start_from(state.params, tx, spec)
  assert int(new.step) == 0
  assert new.params is state.params
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, jnp.zeros_like(x)), new.opt_state)
  assert model_sharding.count_params(state.params) == sum(
    x.size for x in jax.tree.leaves(spec.shapes.params)
  )
