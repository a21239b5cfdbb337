"""Programs are complete: they compile, donate, and match their description."""

import re

import jax
import numpy as np
import pytest

from t5x_lite.compiler import hlo, step_programs
from t5x_lite.data.config import batch_spec
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import transfer
from t5x_lite.parallel import partitioning, pytrees
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.training import steps, train_state
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


def test_large_models_are_unrolled_on_cpus(monkeypatch):
  def loops(model):
    return train_program(model=model).lower().as_text().count('stablehlo.while')

  model = tiny.config(num_encoder_layers=2, num_decoder_layers=2)
  before = loops(model)
  monkeypatch.setattr(step_programs, 'UNROLLED_ON_CPU', 0)
  assert loops(model) == loops(model.replace(scan_layers=False)) < before


def test_the_gradient_of_the_encoders_output_crosses_the_model_axis_once(monkeypatch):
  def received():
    model = tiny.config(num_encoder_layers=1, num_decoder_layers=6)
    text = train_program(model=model, mesh=MeshConfig(data=4, model=2)).lower().compile().as_text()
    return sum(one.bytes * one.count for one in hlo.HloModule(text, 8).collectives())

  ahead = received()
  monkeypatch.setattr(steps, '_cross_ahead', lambda model: False)
  assert ahead < 0.95 * received()


def test_a_decode_step_compiles_with_parameters_cut():
  program = step_programs.decode_program(
    model=tiny.config(num_encoder_layers=1, num_decoder_layers=1),
    config=DecodingConfig(max_decode_length=4),
    batch=batch_spec(tiny_run.dataset(batch_size=8)),
    mesh=MeshConfig(fsdp=4, model=2),
  )
  tokens, scores, _ = program.lower().out_info
  assert (tokens.shape, scores.shape) == ((8, 1, 4), (8, 1))


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


# ---- Transfer methods ----

PARTS = {'lora_rank': 2, 'adapter_dim': 4, 'prompt_length': 3}


def _trained_for(num_steps, mesh, **overrides):
  """Returns the state before and after, on the host, and the program."""
  model = tiny.config(num_encoder_layers=1, num_decoder_layers=1, **PARTS)
  dataset = tiny_run.dataset(batch_size=8, pack=False)
  program = train_program(
    model=model,
    optimizer=OptimizerConfig(name='adamw', weight_decay=0.1, **overrides),
    batch=batch_spec(dataset),
    **mesh,
  )
  compiled = program.lower().compile()
  key = jax.jit(lambda: jax.random.key(0), out_shardings=partitioning.replicated(program.mesh))()
  params = jax.tree.map(jax.device_put, tiny.params(model), program.spec.shardings.params)
  state = train_state.start_from(params, program.tx, program.spec)
  before = jax.device_get(state)
  rng = np.random.default_rng(0)
  batch = partitioning.global_batch(
    {name: rng.integers(1, 9, x.shape).astype(x.dtype) for name, x in program.arguments[1].items()},
    program.mesh,
  )
  for _ in range(num_steps):
    state, _ = compiled(state, batch, key)
  return before, jax.device_get(state), program


def test_only_the_parts_of_a_method_train_on_any_mesh():
  one = {'mesh': MeshConfig(), 'devices': jax.devices()[:1]}
  before, after, program = _trained_for(3, one)
  _, cut, _ = _trained_for(3, {'mesh': MeshConfig(fsdp=4, model=2)})
  was, now = (pytrees.flatten_names(state.params) for state in (before, after))
  pattern = transfer.trained_pattern(was)
  for name, x in was.items():
    changed = x.tobytes() != now[name].tobytes()
    assert changed == bool(re.search(pattern, name)), name
  for name, x in pytrees.flatten_names(cut.params).items():
    np.testing.assert_allclose(x, now[name], atol=2e-4, err_msg=name)
  kept = pytrees.flatten_names(program.spec.shapes.opt_state)
  trained = tuple(name for name in was if re.search(pattern, name))
  assert all(not x.shape or name.endswith(trained) for name, x in kept.items())


def test_gradients_of_what_is_frozen_cost_nothing():
  def cost(**overrides):
    program = train_program(
      model=tiny.config(
        scan_layers=False,
        emb_dim=64,
        mlp_dim=256,
        num_encoder_layers=1,
        num_decoder_layers=1,
        lora_rank=1,
      ),
      mesh=MeshConfig(),
      devices=jax.devices()[:1],
      **overrides,
    )
    return program.lower().compile().cost_analysis()['flops']

  lora = cost()
  everything = cost(optimizer=OptimizerConfig(trainable='.'))
  # Two of the three products of each matrix, and attention, which is small here.
  assert 0.6 < lora / everything < 0.75
