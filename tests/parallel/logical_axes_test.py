import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_lite.compiler import step_programs
from t5x_lite.data.config import batch_spec
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.parallel import logical_axes, partitioning
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.training.losses import LossConfig
from tests import tiny_run
from tests.models import tiny

SIZES = {'data': 1, 'fsdp': 4, 'model': 2}


def rules(**kwargs):
  return partitioning.logical_axis_rules(MeshConfig(**kwargs))


@pytest.mark.parametrize(
  ('activation_dims', 'parameter_dims', 'expected'),
  [
    # The four tables of t5x/partitioning.py standard_logical_axis_rules, with
    # 'fsdp' where T5X says 'data'.
    (1, 1, P(None, 'model')),
    (1, 2, P('fsdp', 'model')),
    (2, 1, P(None, 'model')),
    (2, 2, P('fsdp', 'model')),
  ],
)
def test_a_matrix_under_t5x_rules(activation_dims, parameter_dims, expected):
  found = logical_axes.spec(
    ('embed', 'mlp'),
    (64, 128),
    SIZES,
    rules(activation_dims=activation_dims, parameter_dims=parameter_dims),
  )
  assert found == expected


def test_embed_takes_what_is_left():
  both = rules(activation_dims=2, parameter_dims=2)
  assert logical_axes.spec(('embed',), (64,), SIZES, both) == P('model')
  axes = ('batch', 'length', 'embed')
  spec = logical_axes.spec(axes, (8, 16, 64), SIZES, both)
  assert spec == P(('data', 'fsdp'), None, 'model')


def test_a_dim_that_does_not_divide_stays_whole():
  spec = logical_axes.spec(('heads', 'kv'), (3, 64), SIZES, rules())
  assert spec == P(None, None)


def test_an_unknown_logical_axis_is_an_error():
  with pytest.raises(UsageError, match="'moon'"):
    logical_axes.spec(('moon',), (4,), SIZES, rules())


def test_additional_rules_come_first():
  own = rules(additional_rules=[['vocab', ['fsdp', 'model']], ['embed', None]])
  spec = logical_axes.spec(('vocab', 'embed'), (64, 32), SIZES, own)
  assert spec == P(('fsdp', 'model'), None)


def test_rules_for_one_parameter_also_cut_its_moments():
  own = rules(parameter_rules={r'mlp/wo': {'mlp': 'fsdp', 'embed': 'model'}})
  path = 'opt_state/0/v_row/encoder/layers/mlp/wo/kernel'
  assert logical_axes.spec(('mlp',), (64,), SIZES, own, path) == P('fsdp')
  other = path.replace('wo', 'wi_0')
  assert logical_axes.spec(('mlp',), (64,), SIZES, own, other) == P('model')


def check(**kwargs):
  config = MeshConfig(fsdp=4, model=2, **kwargs)
  mesh = partitioning.make_mesh(config)
  _, shapes, axes = t5.abstract_params(tiny.config())
  logical_axes.check_rules(shapes, axes, mesh, partitioning.logical_axis_rules(config))


def test_standard_rules_pass_the_check():
  check()
  check(activation_dims=2)
  check(additional_rules=[('vocab', None)])
  check(parameter_rules=[('token_embedder', [('embed', None)])])


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'additional_rules': [('embbed', 'fsdp')]}, 'did you mean embed'),
    ({'additional_rules': [('embed', 'tensor')]}, "'tensor'.*mesh axes are data"),
    ({'parameter_rules': [('embeder', [('vocab', None)])]}, 'no parameter'),
    ({'parameter_rules': [('mlp/wo', [('mlp', 'fsdp'), ('embed', 'fsdp')])]}, 'collides'),
    (
      {
        'additional_rules': [('relpos_buckets', ('fsdp', 'model'))],
        'parameter_rules': [('rel_embedding', [('heads', 'fsdp')])],
      },
      'do(es)? not divide|collides',
    ),
  ],
)
def test_a_rule_that_cannot_be_kept_is_an_error(kwargs, message):
  with pytest.raises(UsageError, match=message):
    check(**kwargs)


def test_constrain_does_nothing_outside_a_program():
  x = jnp.ones((8, 4, 2))
  assert logical_axes.constrain(x, 'batch', 'length', 'embed') is x
  assert logical_axes.active_mesh() is None


def test_constrain_cuts_inside_a_program():
  config = MeshConfig(fsdp=4, model=2)
  mesh = partitioning.make_mesh(config)

  @jax.jit
  def f(x):
    assert logical_axes.active_mesh() is mesh
    return logical_axes.constrain(x + 1, 'batch', 'length', 'mlp')

  with logical_axes.axis_rules(mesh, partitioning.logical_axis_rules(config)):
    y = f(jnp.ones((8, 4, 2)))
  wanted = NamedSharding(mesh, P(('data', 'fsdp'), None, 'model'))
  assert y.sharding.is_equivalent_to(wanted, 3)


def test_an_axis_that_was_asked_for_must_cut():
  def program(**mesh):
    return step_programs.train_program(
      model=tiny_run.model(num_heads=4, mlp_dim=32),
      optimizer=tiny_run.optimizer(),
      loss=LossConfig(),
      batch=batch_spec(tiny_run.dataset()),
      mesh=MeshConfig(**mesh),
      total_steps=1,
      devices=jax.devices()[: 2 * mesh['model']],
    )

  with pytest.raises(UsageError, match="3 devices along the mesh axis 'model'"):
    program(model=3, data=2)
  program(model=2, data=2)


def test_each_device_runs_on_its_own_part():
  """A dim that does not divide stays whole; gradients of what is whole are summed."""
  mesh_config = MeshConfig(data=2, fsdp=2, model=2)
  mesh = partitioning.make_mesh(mesh_config)
  axes = (('batch', 'heads'), ('heads',))
  x, w = jnp.arange(24.0).reshape(8, 3), jnp.ones(3)
  shapes = []

  def scale(x, w):
    shapes.append((x.shape, w.shape))
    return x * w[None]

  def total(w):
    with logical_axes.axis_rules(mesh, partitioning.logical_axis_rules(mesh_config)):
      return jnp.sum(logical_axes.per_shard(scale, axes, axes[0])(x, w))

  assert (jax.jit(jax.grad(total))(w) == x.sum(0)).all()
  assert shapes[0] == ((2, 3), (3,))
  assert logical_axes.per_shard(scale, axes, axes[0]) is scale
