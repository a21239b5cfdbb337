import dataclasses
import functools

import jax
import numpy as np
import pytest
from scipy import stats

from t5x_lite.decoding import continuous, prediction
from t5x_lite.decoding.automaton import Automaton
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.continuous import ContinuousBatch, Request
from t5x_lite.errors import UsageError
from t5x_lite.models import model_sharding
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import single_device
from tests.decoding import filters_by_hand
from tests.models import tiny

LIMIT = 12
# Ends with the second of these ids.
STOPPER = Automaton(
  np.asarray([[0, 1], [1, 2], [2, 2]]), (np.arange(64) % 5 == 2).astype(int), np.asarray([2, 1, 0])
)


def make(cfg, params, **arguments):
  return ContinuousBatch(
    cfg, params, placement=single_device(), max_decode_length=LIMIT, **{'chunk': 3, **arguments}
  )


@pytest.fixture(scope='module', params=[False, True], ids=['unrolled', 'scanned_with_a_prompt'])
def model(request):
  cfg = tiny.config(
    scan_layers=request.param,
    prompt_length=3 if request.param else None,
    num_encoder_layers=1,
    num_decoder_layers=2,
  )
  return cfg, tiny.params(cfg)


# Of a row's own settings, as a Predictor's.
OWN = [
  {'temperature': 1.0, **settings}
  for settings in filters_by_hand.SETTINGS
  if settings.keys() <= {'temperature', 'top_k', 'top_p'}
]


def choose(logits, settings):
  """Returns what slots of these settings draw from [S, V], each by its number for a seed."""
  (n, V), jnp = logits.shape, jax.numpy
  slots = dataclasses.replace(
    continuous._empty(tiny.config(), n, 16, LIMIT),
    temperature_S=jnp.asarray([s['temperature'] for s in settings], jnp.float32),
    top_k_S=jnp.asarray([min(s.get('top_k') or V, V) for s in settings], jnp.int32),
    top_p_S=jnp.asarray([s.get('top_p', 1.0) for s in settings], jnp.float32),
    seed_S=jnp.arange(n, dtype=jnp.uint32),
    going_S=jnp.ones((n,), bool),
  )
  return np.asarray(continuous._choose(jnp.asarray(logits), slots, jax.random.key(0)))


def test_a_rows_own_filters_are_those_of_the_papers(monkeypatch):
  """Each row has other settings than its neighbours."""
  pairs = [(row, one) for row in filters_by_hand.logits(30) for one in OWN]
  logits = np.stack([row for row, _ in pairs])
  bits = 2 ** np.arange(logits.shape[1])  # of the number "drawn": the tokens that may be
  monkeypatch.setattr(
    jax.random, 'categorical', lambda key, x: (jax.numpy.isfinite(x) * bits).sum()
  )
  found = choose(logits, [one for _, one in pairs])
  for number, (row, one) in zip(found, pairs, strict=True):
    kept = filters_by_hand.probabilities(row, **one) > 0
    assert number == (kept * bits).sum(), (row, one, kept)


def test_rows_are_drawn_by_their_own_distribution():
  n = 4000
  row = filters_by_hand.logits(1)[0]
  drawn = choose(np.tile(row, (n * len(OWN), 1)), OWN * n).reshape(n, len(OWN))
  for one, tokens in zip(OWN, drawn.T, strict=True):
    p = filters_by_hand.probabilities(row, **one)
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-3 or (p > 0).sum() == 1, one


def test_top_p_of_1_hides_nothing(monkeypatch):
  """Though the probabilities of the first few tokens may add up to more than 1."""
  slots = continuous._empty(tiny.config(), 1, 16, LIMIT)
  settings = {'temperature_S': 1.0, 'top_k_S': 32128, 'going_S': True}
  settings = {name: jax.numpy.full((1,), value) for name, value in settings.items()}
  logits = 10 * np.random.default_rng(0).normal(size=(1, 32128)).astype(np.float32)
  monkeypatch.setattr(jax.random, 'categorical', lambda key, x: jax.numpy.isfinite(x).sum())
  slots, key = dataclasses.replace(slots, **settings), jax.random.key(0)
  assert continuous._choose(logits, slots, key).tolist() == [32128]


@pytest.fixture(scope='module')
def rows(model):
  rng = np.random.default_rng(0)
  lengths = rng.choice([1, 3, 7, 15, 33, 39], 11)
  return [[*rng.integers(2, model[0].vocab_size, n).tolist(), 1] for n in lengths]


@functools.cache
def predictor(cfg, length):
  return prediction.Predictor(
    cfg,
    placement=single_device(),
    decoding=DecodingConfig(max_decode_length=length),
    batch_size=1,
    max_input_length=64,
  )


def alone(cfg, params, row, length=LIMIT):
  [[output]] = predictor(cfg, length).predict_all(params, [row])
  return output.tokens, output.score


def test_each_row_gets_what_it_gets_alone(model, rows):
  cfg, params = model
  limits = [(4, LIMIT)[i % 2] for i in range(len(rows))]
  requests = [Request(tokens=r, max_new_tokens=n) for r, n in zip(rows, limits, strict=True)]
  outputs = dict(make(cfg, params, num_slots=4).run(requests))
  assert sorted(outputs) == list(range(len(rows)))
  for i, output in outputs.items():
    tokens, score = alone(cfg, params, rows[i], limits[i])
    assert output.tokens == tokens
    np.testing.assert_allclose(sum(output.log_probs), score, rtol=1e-4, atol=1e-4)
    assert output.ended in ('eos', 'length')
    assert output.ended == 'length' or len(output.log_probs) == len(output.tokens) + 1


def test_sampling_does_not_depend_on_the_company(model, rows):
  cfg, params = model
  requests = [
    Request(tokens=r, temperature=0.5 + 0.2 * (i % 3), top_k=(0, 5)[i % 2], top_p=0.9, seed=i)
    for i, r in enumerate(rows)
  ]
  one = dict(make(cfg, params, num_slots=1, chunk=5).run(requests[:5]))
  many = dict(make(cfg, params, num_slots=8).run(reversed(requests)))
  for i, output in one.items():
    assert output.tokens == many[len(rows) - 1 - i].tokens


def test_bounds_of_sampling_are_the_rows_own(model, rows):
  """Of 100 draws of one position, none is outside of its own top k or top p."""
  cfg, params = model
  greedy, _ = alone(cfg, params, rows[0])
  batch = make(cfg, params, num_slots=8)
  settings = [dict(top_k=1), dict(top_p=1e-6), dict(top_k=3), dict()]
  requests = [
    Request(tokens=rows[0], max_new_tokens=1, temperature=2.0, seed=i, **settings[i % 4])
    for i in range(100)
  ]
  drawn = [set() for _ in settings]
  for i, output in batch.run(requests):
    drawn[i % 4].add(tuple(output.tokens))
  assert drawn[0] == drawn[1] == {tuple(greedy[:1])}
  assert 1 < len(drawn[2]) <= 3 < len(drawn[3])


def test_a_dropped_slot_is_free_and_disturbs_nobody(model, rows):
  cfg, params = model
  batch = make(cfg, params, num_slots=2)
  first, second = batch.add([Request(tokens=rows[0]), Request(tokens=rows[1])])
  batch.advance()
  batch.drop([first])
  [third] = batch.add([Request(tokens=rows[2])])
  assert batch.num_free == 0
  ended = {}
  while batch.num_free < 2:
    ended |= {k: v for k, v in batch.advance().items() if v.ended}
  assert first not in ended
  for ticket, row in ((second, rows[1]), (third, rows[2])):
    expected = alone(cfg, params, row)[0]
    assert ended[ticket].tokens[: len(expected)] == expected


@pytest.mark.parametrize(
  'how',
  [
    {},
    {'temperature': 0.8},
    {'temperature': 1.5, 'top_k': 7, 'top_p': 0.8, 'stopper': STOPPER},
    {'num_beams': 2},
  ],
)
def test_rows_decode_as_in_batches(model, rows, how, monkeypatch):
  """Greedy, drawn or searched, and again after a caller who left in the middle."""
  cfg, params = model
  whole = prediction.Predictor(
    cfg,
    placement=single_device(),
    decoding=DecodingConfig(max_decode_length=LIMIT, **how),
    batch_size=len(rows),
    max_input_length=64,
    seed=2**63 + 3,
  )
  seeds = [7 * i for i in range(len(rows))]
  expected = whole.predict_all(params, rows, seeds=seeds)
  whole.batch_size = 4
  if 'num_beams' in how:
    with pytest.raises(UsageError, match='greedy search or one sample'):
      continuous.RowDecoder(whole, continuous=True)
  decode = continuous.RowDecoder(whole, continuous='num_beams' not in how)
  if 'num_beams' not in how:
    monkeypatch.setattr(whole, 'predict_all', None)
  next(left := decode(params, rows, seeds=seeds))
  left.close()
  for _ in range(2):
    found = dict(decode(params, rows, seeds=seeds))
    assert sorted(found) == [*range(len(rows))]
    for i, outputs in found.items():
      assert [one.tokens for one in outputs] == [one.tokens for one in expected[i]]
      for one, other in zip(outputs, expected[i], strict=True):
        np.testing.assert_allclose(one.score, other.score, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)


def test_on_a_mesh_as_on_one_device():
  rows = [[5, 9, 1], [7] * 12 + [1], [8, 3, 4, 1], [1], [2, 1]]
  cfg = tiny.config(num_encoder_layers=1, num_decoder_layers=1)
  params = tiny.params(cfg)
  placement = model_sharding.place_model(cfg, MeshConfig(data=2, fsdp=2, model=2))
  specs = model_sharding.inference_params(cfg, placement)
  placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, specs)
  batch = continuous.ContinuousBatch(
    cfg, placed, placement=placement, num_slots=4, max_decode_length=LIMIT
  )
  requests = [Request(tokens=row) for row in rows]
  expected = dict(make(cfg, params, num_slots=4).run(requests))
  found = dict(batch.run(requests))
  assert {i: o.tokens for i, o in found.items()} == {i: o.tokens for i, o in expected.items()}


def test_what_cannot_be_decoded_is_refused():
  cfg = tiny.config(architecture='decoder')
  with pytest.raises(UsageError, match='encoder_decoder'):
    make(cfg, None)
  with pytest.raises(UsageError, match='num_slots is 0'):
    make(tiny.config(), None, num_slots=0)
