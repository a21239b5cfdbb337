import jax
import numpy as np
import pytest

from t5x_lite import main
from t5x_lite.interop import trained_model
from t5x_lite.models import model_sharding, t5
from t5x_lite.runs import run_directory
from t5x_lite.runs.checkpoints import CheckpointConfig, Checkpointer
from t5x_lite.training import train_state
from tests import tiny_run


def save_steps(model_dir, steps, **overrides):
  """Writes a run with a checkpoint of each step; returns their parameters."""
  cfg = tiny_run.model(**overrides)
  run_directory.write_run(
    str(model_dir), model=cfg, vocabulary=tiny_run.VOCABULARY, lengths=tiny_run.LENGTHS
  )
  checkpointer = Checkpointer(str(model_dir), CheckpointConfig(keep=0))
  found = [t5.init_params(cfg, jax.random.key(step)) for step in steps]
  for step, params in zip(steps, found, strict=True):
    state = train_state.TrainState(jax.numpy.asarray(step), params, ())
    checkpointer.save(step, state, None)
  checkpointer.close()
  return found


def load(path, last=1):
  run = trained_model.open_mean([str(path)], last)
  placement = model_sharding.place_here(run.config, None)
  return run, run.load_params(model_sharding.inference_params(run.config, placement))


def assert_is_mean(params, of):
  for leaf, *parts in zip(*map(jax.tree.leaves, (params, *of)), strict=True):
    expected = np.mean([np.asarray(part, np.float64) for part in parts], axis=0)
    np.testing.assert_array_equal(leaf, expected.astype(np.float32))


@pytest.mark.parametrize('scan_layers', [True, False])
def test_the_last_checkpoints_are_averaged_as_numpy_does(tmp_path, scan_layers):
  saved = save_steps(tmp_path / 'run', [1, 2, 3, 4], scan_layers=scan_layers, num_encoder_layers=2)
  assert main.main(['average', str(tmp_path / 'run'), str(tmp_path / 'mean'), '--last', '3']) == 0
  run, params = load(tmp_path / 'mean')
  assert (run.step, run.lengths) == (4, tiny_run.LENGTHS)
  assert_is_mean(params, saved[1:])
  _, params = load(tmp_path / 'run', last=3)  # the same without a run of its own
  assert_is_mean(params, saved[1:])


def test_several_runs_are_averaged(tmp_path):
  first = save_steps(tmp_path / 'a', [1, 2])
  other = save_steps(tmp_path / 'b', [7])
  words = [str(tmp_path / 'a'), str(tmp_path / 'b'), str(tmp_path / 'mean')]
  assert main.main(['average', *words, '--last', '1']) == 0
  assert_is_mean(load(tmp_path / 'mean')[1], [first[1], other[0]])


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--last', '3'], 'has 2 checkpoints, not 3'),
    (['--last', '0'], 'average.last is 0'),
    (['wide', '--last', '1'], 'another architecture'),
  ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, capsys, words, message):
  save_steps(tmp_path / 'run', [1, 2])
  save_steps(tmp_path / 'wide', [1], emb_dim=32)
  words = [str(tmp_path / word) if word == 'wide' else word for word in words]
  destination = str(tmp_path / 'mean')
  sources = [str(tmp_path / 'run'), *(word for word in words if '/' in word)]
  flags = [word for word in words if '/' not in word]
  assert main.main(['average', *sources, destination, *flags]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'mean').exists()
