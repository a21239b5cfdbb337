"""Whatever is damaged in the newest checkpoint, a good one is used.

Every file of a checkpoint in turn: a flipped bit; every fourth: cut to half; another
fourth: deleted. What comes back is bit for bit a state that was saved.
"""

import os
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from t5x_lite import main
from t5x_lite.compiler import step_programs
from t5x_lite.data.config import batch_spec
from t5x_lite.data.rows.dataset_iterator import DatasetIterator
from t5x_lite.errors import DamagedError, UsageError
from t5x_lite.interop import zarr
from t5x_lite.parallel import pytrees
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import start_checks
from t5x_lite.programs.train import train
from t5x_lite.runs import metric_writers
from t5x_lite.runs.checkpoints import CheckpointConfig, Checkpointer
from t5x_lite.training.losses import LossConfig
from tests import tiny_run

CONFIG = CheckpointConfig(period=2, keep=3)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with checkpoints of steps 2, 4 and 6."""
  model_dir = tmp_path_factory.mktemp('damage') / 'run'
  train(**tiny_run.arguments(model_dir, total_steps=6, checkpoint=CONFIG))
  return model_dir


@pytest.fixture(scope='module')
def spec():
  program = step_programs.train_program(
    model=tiny_run.model(),
    optimizer=tiny_run.optimizer(),
    loss=LossConfig(),
    batch=batch_spec(tiny_run.dataset()),
    mesh=MeshConfig(),
    total_steps=6,
  )
  assert program.spec is not None
  return program.spec.shapes


@pytest.fixture(scope='module')
def iterator():
  cfg = start_checks.resolve_dataset(tiny_run.dataset(), tiny_run.model(), tiny_run.VOCABULARY)
  iterator = DatasetIterator(cfg)
  yield iterator
  iterator.close()


def files(run):
  root = run / 'checkpoints' / '6'
  return sorted(p.relative_to(root) for p in root.rglob('*') if p.is_file())


def damage(path, kind, rng):
  data = bytearray(path.read_bytes())
  if kind == 'deleted':
    path.unlink()
  elif kind == 'cut':
    path.write_bytes(data[: len(data) // 2])
  else:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['flipped', 'cut', 'deleted'])
def test_every_file_in_turn(run, spec, iterator, tmp_path, kind):
  saved = {step: tiny_run.saved_arrays(f'{run}/checkpoints/{step}') for step in (4, 6)}
  rng = random.Random(0)
  outcomes = set()
  for name in files(run)[
    {'flipped': slice(None), 'cut': slice(0, None, 4), 'deleted': slice(2, None, 4)}[kind]
  ]:
    copy = tmp_path / 'copy'
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    damage(copy / 'checkpoints' / '6' / name, kind, rng)
    with Checkpointer(str(copy), CONFIG) as checkpointer:
      state, meta = checkpointer.restore(spec, iterator, verify=zarr.verify)
    step = int(state.step)
    assert meta['step'] == step
    assert checkpointer.damaged == ([] if step == 6 else [6]), name
    aside = copy / 'checkpoints' / '6.damaged'
    assert aside.is_dir() == (step != 6)
    found = pytrees.flatten_names(state)
    assert found.keys() == saved[step].keys()
    for leaf, array in found.items():
      assert np.asarray(array).tobytes() == saved[step][leaf].tobytes(), name
    # The data stands at the step's own batch.
    assert iterator.num_batches == step, name
    outcomes.add(step)
  assert 4 in outcomes  # some files hold nothing that is needed


def test_training_says_so_and_ends_the_same(run, tmp_path):
  copy = tmp_path / 'run'
  shutil.copytree(run, copy)
  manifest = copy / 'checkpoints' / '6' / 'state' / 'manifest.ocdbt'
  damage(manifest, 'cut', random.Random(0))
  state = train(**tiny_run.arguments(copy, total_steps=6, checkpoint=CONFIG))
  assert (copy / 'checkpoints' / '6.damaged').is_dir()
  metrics = metric_writers.read_metrics(str(copy))
  [told] = [entry for entry in metrics if 'damaged_checkpoints' in entry]
  assert told['step'] == 4 and told['damaged_checkpoints'] == 1
  wanted = tiny_run.saved_arrays(f'{run}/checkpoints/6')
  for name, leaf in pytrees.flatten_names(jax.device_get(state)).items():
    assert np.asarray(leaf).tobytes() == wanted[name].tobytes(), name


def test_programs_that_only_read_refuse_and_name_another(run, tmp_path, capsys):
  copy = tmp_path / 'run'
  shutil.copytree(run, copy)
  state = copy / 'checkpoints' / '6' / 'state'
  [manifest] = [p for p in state.iterdir() if p.name == 'manifest.ocdbt']
  damage(manifest, 'cut', random.Random(0))
  source = pathlib.Path(tmp_path / 'in.txt')
  source.write_text('pronounce: one\n')
  output = tmp_path / 'out.jsonl'
  arguments = ['infer', '--input', str(source), '--output', str(output)]
  assert main.main([*arguments, '--model', str(copy)]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert 'checkpoints/6' in line and '[2, 4]' in line
  assert not os.path.exists(output)
  older = str(copy / 'checkpoints' / '4')
  limit = ['--max_decode_length', '2']
  assert main.main([*arguments, *limit, '--model', older]) == 0


def test_nothing_whole_is_an_error_and_no_new_start(run, tmp_path, spec):
  copy = tmp_path / 'run'
  shutil.copytree(run, copy)
  for step in (2, 4, 6):
    shutil.rmtree(copy / 'checkpoints' / str(step) / 'meta')
  arguments = tiny_run.arguments(copy, total_steps=6, checkpoint=CONFIG)
  with pytest.raises(UsageError, match=r'no checkpoint in .* is whole'):
    train(**arguments)
  # Nor does the next start begin from scratch.
  with pytest.raises(UsageError, match='damaged'):
    train(**arguments)
  with pytest.raises(DamagedError):
    zarr.verify(str(copy / 'checkpoints' / '2.damaged'))
