import jax
import numpy as np
import optax
import pytest

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import trained_model
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import make_placement
from t5x_lite.programs import convert
from t5x_lite.runs import run_directory
from t5x_lite.runs.checkpoints import CheckpointConfig, Checkpointer
from t5x_lite.training import train_state
from tests import tiny_run
from tests.models import tiny

TX = optax.adam(1.0)


def spec_of(cfg):
  config = MeshConfig(data=2, fsdp=2, model=2)
  return train_state.make_spec(cfg, TX, make_placement(config))


def open_start(path, cfg=None, **fields):
  vocabulary = fields.pop('vocabulary', tiny_run.VOCABULARY)
  config = CheckpointConfig(restore_path=str(path), **fields)
  return trained_model.open_start(config, cfg or tiny_run.model(), vocabulary, seed=0)


def assert_same_bits(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with random parameters and an optimizer that has seen something."""
  model_dir = tmp_path_factory.mktemp('run')
  cfg = tiny_run.model()
  state = train_state.init_state(cfg, TX, spec_of(cfg), jax.random.key(1))
  state = jax.tree.map(lambda x: x + 1, state)
  run_directory.write_run(str(model_dir), model=cfg, vocabulary=tiny_run.VOCABULARY)
  checkpointer = Checkpointer(str(model_dir), CheckpointConfig())
  checkpointer.save(1, state, None)
  checkpointer.close()
  return model_dir, state


def test_from_scratch():
  spec = spec_of(tiny_run.model())
  key = jax.random.key(0)
  state = open_start('')(TX, spec, key)
  assert int(state.step) == 0
  expected = train_state.init_state(tiny_run.model(), TX, spec, key)
  assert_same_bits(state, expected)


def test_parameters_of_a_run(run):
  model_dir, saved = run
  spec = spec_of(tiny_run.model())
  state = open_start(model_dir)(TX, spec, jax.random.key(0))
  assert_same_bits(state.params, saved.params)
  assert int(state.step) == 0
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(state.opt_state))
  jax.tree.map(lambda x, s: x.sharding == s, state, spec.shardings)


def test_state_of_a_run(run):
  model_dir, saved = run
  state = open_start(model_dir, restore_optimizer=True)(
    TX, spec_of(tiny_run.model()), jax.random.key(0)
  )
  assert_same_bits(state, saved)


def test_layers_need_not_be_stacked_the_same_way(run):
  model_dir, saved = run
  cfg = tiny_run.model(scan_layers=False)
  state = open_start(model_dir, cfg)(TX, spec_of(cfg), jax.random.key(0))
  assert_same_bits(state.params, tiny.unstack(saved.params, cfg))


@pytest.mark.parametrize('form', ['hf', 't5x'])
def test_checkpoints_of_others(run, tmp_path, form):
  model_dir, saved = run
  convert.convert(source=str(model_dir), destination=str(tmp_path / form), to=form)
  spec = spec_of(tiny_run.model())
  path = tmp_path / form
  state = open_start(path)(TX, spec, jax.random.key(0))
  assert_same_bits(state.params, saved.params)
  with pytest.raises(UsageError, match='needs a run of t5x_lite'):
    open_start(path, restore_optimizer=True)


def test_parts_can_be_drawn_anew(run):
  model_dir, saved = run
  cfg = tiny_run.model(num_encoder_layers=2)
  with pytest.raises(UsageError, match='has no tensor for'):
    open_start(model_dir, cfg)
  state = open_start(model_dir, cfg, strict=False)(TX, spec_of(cfg), jax.random.key(0))
  first = jax.tree.map(lambda x: x[:1], state.params['encoder']['layers'])
  assert_same_bits(first, saved.params['encoder']['layers'])


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(vocabulary=VocabularyConfig()), 'another vocabulary'),
    (dict(cfg=tiny_run.model(mlp_dim=48)), 'the model needs'),
    (dict(assignment_map=[('nothing', None)]), 'matches nothing'),
    (dict(assignment_map=[('a', 'b', 'c')]), 'must be pairs'),
    (dict(restore_optimizer=True, strict=False), 'must be without assignment_map, and strict'),
  ],
)
def test_what_does_not_fit_is_one_clear_line(run, fields, message):
  with pytest.raises(UsageError, match=message):
    open_start(run[0], **fields)


def test_nothing_there(tmp_path):
  with pytest.raises(UsageError, match='does not exist'):
    open_start(tmp_path / 'nowhere')
  with pytest.raises(UsageError, match='holds no checkpoint'):
    open_start(tmp_path)
