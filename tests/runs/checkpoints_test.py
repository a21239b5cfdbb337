import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from t5x_lite.errors import UsageError
from t5x_lite.runs import checkpoints
from t5x_lite.runs.checkpoints import CheckpointConfig, Checkpointer


class Iterator:
  """Counts; its position is a file."""

  def __init__(self, position: int = 0):
    self.position = position

  def save(self, directory):
    (pathlib.Path(directory) / 'position').write_text(str(self.position))

  def restore(self, directory):
    self.position = int((pathlib.Path(directory) / 'position').read_text())


def make_mesh(data: int, model: int):
  return jax.make_mesh(
    (data, model),
    ('data', 'model'),
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[: data * model],
  )


def make_state(mesh, seed: int = 0):
  """A state as optax makes it: named tuples, layers with integer keys."""

  def place(x, *axes):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

  rng = np.random.default_rng(seed)
  params = {
    'embedding': place(rng.normal(size=(16, 8)).astype('f'), 'data', 'model'),
    'layers': {
      i: {'kernel': place(rng.normal(size=(8, 4)).astype('f'), None, 'model')} for i in range(2)
    },
    'half': place(jnp.ones(8, jnp.bfloat16)),
  }
  opt_state = jax.jit(optax.adamw(1e-3).init)(params)
  replicated = NamedSharding(mesh, PartitionSpec())
  opt_state = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, replicated), opt_state)
  step = place(jnp.asarray(seed, jnp.int32))
  return {'step': step, 'params': params, 'opt_state': opt_state}


def abstract(state, mesh=None):
  mesh = mesh or make_mesh(1, 1)

  def shape(x):
    spec = getattr(x.sharding, 'spec', PartitionSpec())
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(shape, state)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_all(model_dir, config, losses):
  checkpointer = Checkpointer(model_dir, config)
  for step, loss in enumerate(losses, start=1):
    metrics = None if loss is None else {'loss': loss}
    state = make_state(make_mesh(1, 1), seed=step)
    checkpointer.save(step, state, None, metrics=metrics)
  checkpointer.close()
  return checkpoints.steps_in(Checkpointer(model_dir, config).directory)


# ---- Saving and restoring ----


@pytest.mark.parametrize('shape', [(4, 2), (2, 4), (8, 1), (1, 1)])
def test_restores_bit_identical_on_any_mesh(tmp_path, shape):
  state = make_state(make_mesh(4, 2), seed=3)
  checkpointer = Checkpointer(str(tmp_path), CheckpointConfig())
  assert checkpointer.latest_step is None
  assert checkpointer.save(3, state, Iterator(7), meta={'seed': 5})
  checkpointer.close()

  mesh, iterator = make_mesh(*shape), Iterator()
  checkpointer = Checkpointer(str(tmp_path), CheckpointConfig())
  restored, meta = checkpointer.restore(abstract(state, mesh), iterator)
  assert_same_bits(restored, state)
  assert restored['params']['embedding'].sharding.mesh == mesh
  assert iterator.position == 7
  assert (meta['step'], meta['seed'], meta['process_count']) == (3, 5, 1)


def test_state_and_iterator_may_move_on_while_a_save_is_under_way(tmp_path):
  state = make_state(make_mesh(4, 2))
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
  checkpointer = Checkpointer(str(tmp_path), CheckpointConfig(keep=0))
  expected, iterator = {}, Iterator()
  for i in range(1, 5):
    state = step(state)
    expected[i] = jax.tree.map(np.array, state)
    iterator.position = i
    checkpointer.save(i, state, iterator)
    iterator.position = -1
  checkpointer.wait()
  for i in expected:
    path = str(tmp_path / 'checkpoints' / str(i))
    assert_same_bits(checkpoints.load_state(path, abstract(state)), expected[i])
    iterator.restore(os.path.join(path, 'data'))
    assert iterator.position == i


def test_a_step_is_saved_once(tmp_path):
  state = make_state(make_mesh(1, 1))
  checkpointer = Checkpointer(str(tmp_path), CheckpointConfig())
  assert checkpointer.save(1, state, None)
  assert not checkpointer.save(1, state, None)
  checkpointer.close()


def test_what_was_measured_after_a_save_counts(tmp_path):
  """As of a step that a stop saved in a hurry."""
  config = CheckpointConfig(keep=1, keep_best=1, best_metric='loss')
  state = make_state(make_mesh(1, 1))
  checkpointer = Checkpointer(str(tmp_path), config)
  for step, loss in ((1, None), (1, 0.5), (2, 3.0), (3, 2.0)):
    metrics = loss and {'loss': loss}
    checkpointer.save(step, state, None, metrics=metrics, meta={'evaluated': loss and step})
  checkpointer.close()
  assert checkpoints.steps_in(checkpointer.directory) == [1, 3]
  assert checkpoints.read_meta(epath.Path(tmp_path / 'checkpoints' / '1'))['evaluated'] == 1


def test_should_save():
  checkpointer = Checkpointer.__new__(Checkpointer)
  checkpointer.config = CheckpointConfig(period=3)
  assert [s for s in range(8) if checkpointer.should_save(s)] == [3, 6]


def test_plain_layout_on_disk(tmp_path):
  state = make_state(make_mesh(1, 1))
  checkpointer = Checkpointer(str(tmp_path), CheckpointConfig())
  checkpointer.save(1, state, None)
  checkpointer.close()
  saved = (tmp_path / 'checkpoints/1/state/_METADATA').read_text()
  assert "('params', 'layers', '0', 'kernel')" in saved
  assert "('opt_state', '0', 'mu', 'embedding')" in saved
  assert "'value'" not in saved


# ---- What is kept ----


@pytest.mark.parametrize(
  'config, losses, kept',
  [
    (dict(keep=2), [3.0, 1.0, 2.0, 5.0], [3, 4]),
    (dict(keep=0), [3.0, 1.0, 2.0], [1, 2, 3]),
    (dict(keep=1, keep_best=1), [3.0, 1.0, 2.0, 5.0], [2, 4]),
    (dict(keep=1, keep_best=2), [3.0, 1.0, 2.0, 5.0], [2, 3, 4]),
    (dict(keep=1, keep_best=1, best_mode='max'), [3.0, 9.0, 2.0], [2, 3]),
    # The newest stays though it is the worst, and NaN is never the best.
    (dict(keep=1, keep_best=1), [1.0, float('nan'), 2.0, 7.0], [1, 4]),
    (dict(keep=1, keep_best=1), [None, 4.0, None, None], [2, 4]),
  ],
)
def test_keeps_newest_and_best(tmp_path, config, losses, kept):
  if config.get('keep_best'):
    config = dict(config, best_metric='loss')
  assert save_all(str(tmp_path), CheckpointConfig(**config), losses) == kept


def test_leftovers_of_a_killed_run_do_not_hurt(tmp_path):
  """A save cut short leaves a temporary directory, a deletion a torso."""
  assert save_all(str(tmp_path), CheckpointConfig(keep=2), [1.0] * 3) == [2, 3]
  root = tmp_path / 'checkpoints'
  (root / '4.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  for file in sorted((root / '2').rglob('*')):
    if file.is_file() and file.name != 'manifest.ocdbt':
      file.unlink()
  checkpointer = Checkpointer(str(tmp_path), CheckpointConfig(keep=2))
  assert checkpointer.latest_step == 3
  state = make_state(make_mesh(1, 1), seed=4)
  checkpointer.save(4, state, None)
  checkpointer.wait()
  restored, _ = checkpointer.restore(abstract(state))
  assert_same_bits(restored, state)
  checkpointer.close()
  assert sorted(path.name for path in root.iterdir()) == ['3', '4']


# ---- Finding, and parts of a checkpoint ----


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  root = tmp_path_factory.mktemp('run')
  checkpointer = Checkpointer(str(root), CheckpointConfig())
  for step in (1, 2):
    checkpointer.save(step, make_state(make_mesh(4, 2), seed=step), Iterator())
  checkpointer.close()
  return root


def test_finds_the_newest_or_the_named_checkpoint(run):
  directory = str(run / 'checkpoints')
  for path in (run, run / 'checkpoints', run / 'checkpoints' / '2'):
    assert checkpoints.find_checkpoint(str(path)) == (directory, 2)
  assert checkpoints.find_checkpoint(f'{directory}/1') == (directory, 1)


def test_says_when_there_is_none(run, tmp_path):
  with pytest.raises(UsageError, match='holds no checkpoint'):
    checkpoints.find_checkpoint(str(tmp_path))
  with pytest.raises(UsageError, match='no such checkpoint'):
    checkpoints.find_checkpoint(str(run / 'checkpoints' / '9'))
  (tmp_path / 'checkpoints' / '²' / 'state').mkdir(parents=True)  # a digit, and no number
  with pytest.raises(UsageError, match='holds no checkpoint'):
    checkpoints.find_checkpoint(str(tmp_path))


def load_params(path, wanted):
  return checkpoints.load_state(path, {'params': wanted})['params']


def test_loads_only_parameters_and_casts(run):
  mesh = make_mesh(2, 4)
  params = make_state(make_mesh(4, 2), seed=1)['params']
  path = str(run / 'checkpoints' / '1')
  restored = load_params(path, abstract(params, mesh))
  assert_same_bits(restored, params)
  assert restored['embedding'].sharding.mesh == mesh
  halved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
  restored = load_params(path, halved)
  assert restored['embedding'].dtype == jnp.bfloat16


def test_a_checkpoint_of_another_model_is_one_clear_line(run):
  state = make_state(make_mesh(1, 1))
  wanted = abstract(state)
  other = jax.ShapeDtypeStruct((16, 4), jnp.float32)
  wider = {**wanted['params'], 'embedding': other}
  with pytest.raises(UsageError, match=r'embedding of shape \(16, 8\)'):
    load_params(str(run), wider)
  more = {**wanted['params'], 'extra': other}
  with pytest.raises(UsageError, match='has no params/extra'):
    load_params(str(run), more)
  fewer = {'embedding': wanted['params']['embedding']}
  with pytest.raises(UsageError, match='which this model and optimizer does not'):
    load_params(str(run), fewer)
  checkpointer = Checkpointer(str(run), CheckpointConfig())
  sgd = jax.eval_shape(optax.sgd(1.0).init, wanted['params'])
  with pytest.raises(UsageError, match='opt_state/0/'):
    checkpointer.restore({**wanted, 'opt_state': sgd})


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(period=0), 'period is 0'),
    (dict(keep=-1), 'keep is -1'),
    (dict(best_mode='least'), "best_mode is 'least'"),
    (dict(keep_best=1), 'best_metric is .*for keep_best'),
  ],
)
def test_config_is_validated(fields, message):
  with pytest.raises(UsageError, match=message):
    CheckpointConfig(**fields)


# ---- The input iterator's position ----


class Position:
  def __init__(self):
    self.calls = []

  def save(self, directory):
    self.calls.append(('save', directory))

  def restore(self, directory):
    self.calls.append(('restore', directory))


def test_the_iterator_writes_and_reads_its_own_directory(tmp_path):
  position, handler = Position(), checkpoints.DataHandler()
  directory = epath.Path(tmp_path)
  handler.save(directory, checkpoints.DataArgs(position))
  handler.restore(directory, checkpoints.DataArgs(position))
  assert position.calls == [
    ('save', str(tmp_path)), ('restore', str(tmp_path)),
  ]  # fmt: skip
