"""Each processor beside transformers' own class or a loop in plain Python."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding import processors
from t5x_lite.decoding.config import DecodingConfig
from tests.decoding import filters_by_hand

V, T = 7, 9


def history(rng, R=6):
  """Rows of different lengths, with anything after their end."""
  tokens = rng.integers(0, V, (R, T)).astype(np.int32)
  given, new = rng.integers(1, 4, R).astype(np.int32), 4
  return (
    tokens,
    given,
    processors.History(jnp.asarray(tokens), jnp.asarray(given), jnp.asarray(new), None),
  )


def logits(rng, R=6):
  return (3 * rng.standard_normal((R, V))).astype(np.float32)


def run(function, x, read, **settings):
  return np.asarray(jax.jit(lambda x, h: function(x, h, **settings))(x, read))


def test_penalties_count_tokens():
  for seed in range(5):
    rng = np.random.default_rng(seed)
    tokens, given, read = history(rng)
    x = logits(rng)
    repeated = run(processors.repetition_penalty, x, read, penalty=1.5)
    frequent = run(processors.frequency_penalty, x, read, penalty=0.3)
    for row, v in itertools.product(range(6), range(V)):
      end = given[row] + 4
      seen = v in tokens[row, :end]
      factor = 1.5 if x[row, v] < 0 else 1 / 1.5
      np.testing.assert_allclose(repeated[row, v], x[row, v] * (factor if seen else 1), rtol=1e-6)
      count = (tokens[row, given[row] : end] == v).sum()
      np.testing.assert_allclose(frequent[row, v], x[row, v] - 0.3 * count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('size', [1, 2, 3, 20])
def test_ngrams_are_not_repeated(size):
  for seed in range(10):
    rng = np.random.default_rng(seed)
    tokens, given, read = history(rng)
    x = logits(rng)
    found = run(processors.no_repeat_ngram, x, read, size=size)
    for row in range(6):
      past = tokens[row, : given[row] + 4].tolist()
      grams = {tuple(past[i : i + size]) for i in range(len(past) - size + 1)}
      last = past[len(past) - size + 1 :]
      banned = [tuple([*last, v]) in grams for v in range(V)]
      assert (found[row] == -np.inf).tolist() == banned


def test_a_forbidden_sequence_is_not_completed():
  rng = np.random.default_rng(0)
  tokens, given, read = history(rng)
  ends = [tokens[row, : given[row] + 4].tolist() for row in range(6)]
  sequence = (*ends[2][-2:], 5)
  found = run(processors.forbid, logits(rng), read, sequence=sequence)
  hidden = [list(sequence[:-1]) == end[-2:] for end in ends]
  assert (found[:, 5] == -np.inf).tolist() == hidden and hidden[2]
  assert np.isfinite(np.delete(found, 5, axis=1)).all()


def test_allowed_outputs_are_a_trie():
  outputs = ((2, 3), (2, 3, 4), (5,), (2, 6))
  whole = [(*o, 1) for o in outputs]
  for prefix in [(), (2,), (2, 3), (2, 3, 4), (5,), (2, 6)]:
    tokens = jnp.asarray([[0, 6, *prefix, *[3] * (T - 2 - len(prefix))]], jnp.int32)
    read = processors.History(tokens, jnp.asarray([2]), jnp.asarray(len(prefix)), None)
    found = run(processors.allow_only, np.zeros((1, V), np.float32), read, outputs=tuple(whole))
    n = len(prefix)
    allowed = {o[n] for o in whole if o[:n] == prefix and len(o) > n}
    assert set(np.flatnonzero(np.isfinite(found[0]))) == allowed


def test_off_by_default():
  assert processors.make_processors(DecodingConfig(), 1) == []
  logits = jnp.asarray([[1.0, 2.0]])
  found = processors.filtered(logits, jnp.ones(1), DecodingConfig(temperature=1.0))
  assert (found == logits).all()


@pytest.mark.parametrize('seed', range(3))
def test_filters_are_those_of_transformers(seed):
  torch = pytest.importorskip('torch')
  from transformers.generation import logits_process as theirs

  x = (2 * np.random.default_rng(seed).standard_normal((20, 50))).astype(np.float32)
  for ours, value, reference in [
    (processors.top_k, 3, theirs.TopKLogitsWarper(3)),
    (processors.top_p, 0.7, theirs.TopPLogitsWarper(0.7)),
    (processors.min_p, 0.2, theirs.MinPLogitsWarper(0.2)),
    (processors.typical, 0.6, theirs.TypicalLogitsWarper(0.6)),
    (processors.typical, 0.2, theirs.TypicalLogitsWarper(0.2)),
    (processors.epsilon, 0.05, theirs.EpsilonLogitsWarper(0.05)),
    (processors.epsilon, 0.9, theirs.EpsilonLogitsWarper(0.9)),
    (processors.eta, 0.3, theirs.EtaLogitsWarper(0.3)),
  ]:
    expected = reference(None, torch.tensor(x)).numpy()
    np.testing.assert_array_equal(np.asarray(ours(jnp.asarray(x), value=value)), expected)


@pytest.mark.parametrize('settings', filters_by_hand.SETTINGS, ids=str)
def test_filters_are_those_of_the_papers(settings):
  """Over every subset of the tokens, likely, equal or hidden before."""
  x = filters_by_hand.logits(60)
  config = DecodingConfig(**{'temperature': 1.0, **settings})
  found = processors.filtered(jnp.asarray(x), jnp.full(len(x), config.temperature), config)
  expected = np.stack([filters_by_hand.probabilities(row, **settings) for row in x])
  np.testing.assert_array_equal(np.isfinite(found), expected > 0)
  np.testing.assert_allclose(jax.nn.softmax(found, axis=-1), expected, atol=2e-6)
