"""Programs are complete: they compile, donate, and match their description."""

import jax
import numpy as np
import pytest

from t5x_lite.compiler import step_programs
from t5x_lite.data.config import batch_spec
from t5x_lite.decoding import prediction
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.training import train_state
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optimizers import OptimizerConfig
from tests import tiny_run
from tests.models import tiny


def train_program(**overrides):
  fields = dict(
    model=tiny.config(num_encoder_layers=1, num_decoder_layers=1),
    optimizer=OptimizerConfig(),
    loss=LossConfig(),
    batch=batch_spec(tiny_run.dataset(batch_size=8)),
    mesh=MeshConfig(fsdp=4, model=2),
    total_steps=10,
  )
  return step_programs.train_program(**{**fields, **overrides})


def test_a_compiled_step_runs_in_place():
  program = train_program()
  compiled = program.lower().compile()
  model = tiny.config(num_encoder_layers=1, num_decoder_layers=1)
  key = jax.jit(lambda: jax.random.key(0), out_shardings=partitioning.replicated(program.mesh))()
  state = train_state.init_state(model, program.tx, program.spec, key)
  embedding = state.params['token_embedder']['embedding']
  rng = np.random.default_rng(0)
  batch = partitioning.global_batch(
    {name: rng.integers(1, 9, x.shape).astype(x.dtype) for name, x in program.arguments[1].items()},
    program.mesh,
  )
  state, metrics = compiled(state, batch, key)
  assert int(state.step) == 1 and np.isfinite(float(metrics['loss']))
  assert embedding.is_deleted()
  for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(program.spec.shardings), strict=True):
    assert x.sharding.is_equivalent_to(s, x.ndim)


def test_a_decode_step_compiles_with_parameters_cut():
  program = step_programs.decode_program(
    model=tiny.config(num_encoder_layers=1, num_decoder_layers=1),
    config=DecodingConfig(max_decode_length=4),
    batch=batch_spec(tiny_run.dataset(batch_size=8)),
    mesh=MeshConfig(fsdp=4, model=2),
  )
  tokens, scores = program.lower().out_info
  assert (tokens.shape, scores.shape) == ((8, 4), (8,))


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'num_microbatches': 3}, 'multiple of 12'),
    ({'mesh': MeshConfig(data=16)}, 'does not multiply'),
    ({'mesh': MeshConfig(offload_optimizer=True)}, 'no memory of their own'),
    (
      {'mesh': MeshConfig(parameter_rules=[('nothing', [('embed', None)])])},
      'no parameter matches',
    ),
  ],
)
def test_mistakes_are_told_before_anything_is_traced(overrides, message):
  with pytest.raises(UsageError, match=message):
    train_program(**overrides)


def test_an_encoder_is_not_decoded():
  with pytest.raises(UsageError, match='not decoded'):
    step_programs.decode_program(
      model=tiny.config(architecture='encoder'),
      config=DecodingConfig(),
      batch=batch_spec(tiny_run.dataset(batch_size=8)),
      mesh=MeshConfig(),
    )


def test_decoding_is_compiled_for_the_parameters_that_are_loaded():
  cfg = tiny.config(dtype='bfloat16')
  program = step_programs.decode_program(
    model=cfg,
    config=DecodingConfig(max_decode_length=4),
    batch=batch_spec(tiny_run.dataset(batch_size=8)),
    mesh=MeshConfig(data=8),
  )
  predictor = prediction.Predictor(
    cfg,
    placement=program.placement,
    decoding=DecodingConfig(max_decode_length=4),
    batch_size=8,
    max_input_length=32,
  )
  assert program.arguments[0] == predictor.abstract_params
