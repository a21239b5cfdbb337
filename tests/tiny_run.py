"""Tiny trainings for tests; as a program, one training in its own process."""

import json
import logging
import os
import sys
from typing import Any

import jax
import numpy as np
from etils import epath

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import zarr
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.runs import checkpoints, run_directory
from t5x_lite.runs.checkpoints import CheckpointConfig, Checkpointer
from t5x_lite.training import train_state
from t5x_lite.training.optimizers import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig

LENGTHS = {'inputs': 32, 'targets': 16}
VOCABULARY = VocabularyConfig(kind='byte')


def model(**overrides: Any) -> T5Config:
  fields: dict[str, Any] = dict(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dtype='float32',
    dropout_rate=0.1,
  )
  return T5Config(**{**fields, **overrides})


def dataset(name: str = 'pronounce', **overrides: Any) -> DatasetConfig:
  fields: dict[str, Any] = dict(
    mixture_or_task_name=name, task_feature_lengths=LENGTHS, batch_size=8, num_threads=1, window=64
  )
  return DatasetConfig(**{**fields, **overrides})


def optimizer(learning_rate: float = 1e-2) -> OptimizerConfig:
  schedule = ScheduleConfig(shape='constant', base_learning_rate=learning_rate, warmup_steps=2)
  return OptimizerConfig(name='adamw', schedule=schedule)


def arguments(model_dir: Any, **overrides: Any) -> dict[str, Any]:
  """Returns what `train` takes for a run of a few steps."""
  fields: dict[str, Any] = dict(
    model=model(),
    vocabulary=VOCABULARY,
    dataset=dataset(),
    optimizer=optimizer(),
    checkpoint=CheckpointConfig(period=2, keep=2),
    model_dir=str(model_dir),
    total_steps=4,
    stats_period=1,
    eval_period=100,
  )
  return {**fields, **overrides}


def save_untrained(model_dir: Any, *, seed: int = 0, **overrides: Any) -> Any:
  """Writes a run with random parameters, which it returns."""
  cfg = model(**overrides)
  params = t5.init_params(cfg, jax.random.key(seed))
  run_directory.write_run(str(model_dir), model=cfg, vocabulary=VOCABULARY, lengths=LENGTHS)
  checkpointer = Checkpointer(str(model_dir), CheckpointConfig())
  state = train_state.TrainState(jax.numpy.asarray(1), params, ())
  checkpointer.save(1, state, None)
  checkpointer.close()
  return params


def saved_arrays(path: Any) -> dict[str, np.ndarray]:
  """Returns the state in a checkpoint by name, 'params/...', without Orbax."""
  directory, step = checkpoints.find_checkpoint(str(path))
  found = zarr.orbax_tensors(epath.Path(directory) / str(step) / 'state', zarr.Reader())
  return {name.replace('.', '/'): tensor.read() for name, tensor in found.items()}


def main() -> None:
  """Trains with the arguments given as JSON, over those of `arguments`."""
  # Of Keras, which TensorFlow imports, these are two seconds of every start, and it
  # is content without them.
  sys.modules.update({'pandas': None, 'sklearn': None})
  from t5x_lite.parallel import distributed
  from t5x_lite.programs import train

  logging.basicConfig(level=logging.WARNING)
  logging.getLogger('t5x_lite').setLevel(logging.INFO)
  given = json.loads(sys.argv[1])
  period = given.pop('period', 2)
  data = given.pop('dataset', {})
  mesh = MeshConfig(**given.pop('mesh', {}))
  try:
    distributed.initialize(heartbeat_timeout=10)
    train.train(
      **arguments(
        given.pop('model_dir'),
        checkpoint=CheckpointConfig(period=period, keep=2),
        dataset=dataset(**data),
        mesh=mesh,
        **given,
      )
    )
  except distributed.LostProcessError as error:
    print(f'lost: {error}', flush=True)
    os._exit(error.exit_code)


if __name__ == '__main__':
  main()
