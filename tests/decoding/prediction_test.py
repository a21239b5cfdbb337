import jax
import numpy as np
import pytest

from t5x_lite.decoding import prediction, steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import model_sharding, t5
from t5x_lite.parallel.partitioning import MeshConfig
from tests.models import tiny

ROWS = [[5, 6, 7, 1], [9, 1], [*range(3, 23), 1]]


MESH = MeshConfig(data=1, model=8)


def make_predictor(cfg, mesh=MESH, **overrides):
  arguments = dict(decoding=DecodingConfig(max_decode_length=6), batch_size=4, max_input_length=40)
  placement = model_sharding.place_model(cfg, mesh)
  return prediction.Predictor(cfg, placement=placement, **{**arguments, **overrides})


def place(predictor, params):
  specs = model_sharding.inference_params(predictor.model, predictor.placement)
  return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, specs)


def best(predictor, params, rows, **options):
  outputs = [one for one, *_ in predictor.predict_all(params, rows, **options)]
  return [output.tokens for output in outputs], [output.score for output in outputs]


@pytest.mark.parametrize(
  'longest, lengths', [(5, {5}), (16, {16}), (40, {16, 32, 40}), (None, {16, 32, 64})]
)
def test_sizes_are_few(longest, lengths):
  found = set()
  for length in range(1, (longest or 64) + 1):
    size = prediction.padded_length(length, longest)
    assert length <= size
    found.add(size)
  assert found == lengths


def test_missing_rows_are_no_empty_rows():
  array = prediction.pad_rows([[3, 1]], batch_size=3, length=4, pad_id=0)
  np.testing.assert_array_equal(array, [[3, 1, 0, 0]] * 3)


def test_predictions_are_the_steps_own():
  """Whatever the batch, bucket and mesh, a row decodes as it does alone."""
  cfg = tiny.config()
  params = tiny.params(cfg)
  predictor = make_predictor(cfg)
  outputs, scores = best(predictor, place(predictor, params), ROWS)
  assert len(outputs) == len(scores) == len(ROWS)

  graphdef, _, _ = t5.abstract_params(cfg)
  step = jax.jit(steps.make_predict_step(graphdef, predictor.decoding))
  for row, output, score in zip(ROWS, outputs, scores, strict=True):
    batch = {'encoder_input_tokens': np.array([row], np.int32)}
    tokens, alone, _ = step(params, batch)
    expected = tokens[0, 0].tolist()
    if cfg.eos_id in expected:
      expected = expected[: expected.index(cfg.eos_id)]
    assert output == expected
    assert score == pytest.approx(float(alone[0, 0]), rel=1e-4)


def count_traces(monkeypatch, name):
  """Returns a list that grows with every trace of a step of this name."""
  traces = []
  make = getattr(steps, name)

  def counting(*arguments):
    step = make(*arguments)

    def traced(*args):
      traces.append(name)
      return step(*args)

    return traced

  monkeypatch.setattr(steps, name, counting)
  return traces


def test_one_compilation_a_size(monkeypatch):
  traces = count_traces(monkeypatch, 'make_predict_step')
  cfg = tiny.config()
  predictor = make_predictor(cfg)
  params = place(predictor, tiny.params(cfg))
  for length in (3, 9, 16, 14, 1):
    best(predictor, params, [[2] * length])
  best(predictor, params, [[2] * 5, [3] * 11])
  assert len(traces) == 1
  best(predictor, params, [[2] * 17])
  assert len(traces) == 2
  # Another predictor of the same kind finds what is compiled.
  best(make_predictor(cfg, seed=2**63), params, [[2] * 30])
  assert len(traces) == 2


def test_batches_fill_the_mesh():
  predictor = make_predictor(tiny.config(), MeshConfig(data=4, model=2), batch_size=5)
  assert predictor.batch_size == 8


def test_sampling_differs_between_batches_and_not_between_runs():
  cfg = tiny.config()
  config = DecodingConfig(max_decode_length=6, temperature=1.0)
  predictor = make_predictor(cfg, decoding=config)
  params = place(predictor, tiny.params(cfg))
  first, _ = best(predictor, params, ROWS, index=0)
  again, _ = best(predictor, params, ROWS, index=0)
  second, _ = best(predictor, params, ROWS, index=1)
  assert first == again != second


def test_needs_a_decoder():
  with pytest.raises(UsageError, match="architecture='encoder' cannot"):
    make_predictor(tiny.config(architecture='encoder'))


@pytest.mark.parametrize(
  'settings',
  [
    {'forced_bos_id': 64},
    {'forced_eos_id': -1},
    {'forbidden_tokens': [[5, 64]]},
    {'allowed_outputs': [[7], [-2]]},
  ],
)
def test_ids_that_the_model_has_not_are_refused(settings):
  name, config = next(iter(settings)), DecodingConfig(**settings)
  with pytest.raises(UsageError, match=rf'{name} has the id (64|-1|-2); the model has 0 to 63'):
    make_predictor(tiny.config(), decoding=config)
