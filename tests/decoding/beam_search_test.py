"""Beam search beside an exhaustive one, over a toy step whose distribution is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_lite
from t5x_lite.decoding import beam_search
from t5x_lite.decoding.config import DecodingConfig
from tests.models import tiny

V, L, B = 5, 4, 3
# Logits of the next token by input, position and the last token; 1 ends.
TABLE = 2.0 * jax.random.normal(jax.random.key(3), (B, L, V, V))


def search(**settings):
  config = DecodingConfig(max_decode_length=L, **settings)
  K = config.num_beams

  def step(last_R, cache):
    inputs_R = jnp.repeat(jnp.arange(B), K)
    return TABLE[inputs_R, cache, last_R], cache + 1

  return jax.jit(
    lambda: beam_search.search(
      step,
      jnp.zeros((), jnp.int32),
      num_rows=B * K,
      config=config,
      start_id=0,
      eos_id=1,
      pad_id=0,
      reorder=lambda cache, parents: cache,
    )
  )()


def exhaustive(row, rank):
  """Returns every whole output as (rank, tokens), best first."""
  log_probs = np.asarray(jax.nn.log_softmax(TABLE[row], axis=-1), np.float64)
  found = []
  for length in range(1, L + 1):
    for tokens in itertools.product(range(V), repeat=length):
      if 1 in tokens[:-1] or (length < L and tokens[-1] != 1):
        continue
      last, total = 0, 0.0
      for t, token in enumerate(tokens):
        total += log_probs[t, last, token]
        last = token
      found.append((rank(total, length), tokens))
  return sorted(found, reverse=True)


@pytest.mark.parametrize(
  ('settings', 'rank'),
  [
    ({'length_penalty': 0.0}, lambda s, n: s),
    ({'length_penalty': 1.0}, lambda s, n: s / n),
    ({'length_penalty': 2.5}, lambda s, n: s / n**2.5),
    ({'brevity_alpha': 0.6}, lambda s, n: s / ((5 + n) / 6) ** 0.6),
  ],
)
def test_wide_beams_find_what_there_is(settings, rank):
  # Beams enough for every prefix: nothing is ever dropped.
  found = search(num_beams=V**3, num_return_sequences=5, early_stopping='never', **settings)
  for row in range(B):
    for k, (score, tokens) in enumerate(exhaustive(row, rank)[:5]):
      assert found.tokens_BnL[row, k].tolist() == [*tokens, *[0] * (L - len(tokens))]
      assert abs(float(found.scores_Bn[row, k]) - score) < 1e-4
      total = float(found.log_probs_BnL[row, k].sum())
      assert abs(rank(total, len(tokens)) - score) < 1e-4


def test_a_narrow_beam_is_not_better_than_the_best():
  found = search(num_beams=2, length_penalty=0.0)
  for row in range(B):
    best, _ = exhaustive(row, lambda s, n: s)[0]
    assert float(found.scores_Bn[row, 0]) <= best + 1e-5


def test_with_t5xs_penalty_all_candidates_may_finish():
  # A .4, B .35, EOS .25 and then nothing but flat: EOS at once is the best by far.
  first = jnp.log(jnp.asarray([1e-9, 0.25, 0.4, 0.35, 1e-9]))
  flat = jnp.asarray([1.0, -50.0, 1.0, 1.0, 1.0])

  def step(last_R, position):
    logits_V = jnp.where(position == 0, first, flat)
    return jnp.broadcast_to(logits_V, (len(last_R), V)), position + 1

  def best(**settings):
    config = DecodingConfig(max_decode_length=L, num_beams=2, early_stopping='never', **settings)
    ids = {'start_id': 0, 'eos_id': 1, 'pad_id': 0}
    still = {'num_rows': 2, 'config': config, 'reorder': lambda cache, _: cache}
    return beam_search.search(step, jnp.zeros((), jnp.int32), **still, **ids).tokens_BnL[0, 0]

  assert best(brevity_alpha=0.6).tolist() == [1, 0, 0, 0]  # t5x/decoding.py beam_search
  assert best(length_penalty=0.6)[0] != 1  # transformers: only the first num_beams


# What transformers 4.55.4 (the last with group beam search of its own) returns of this model,
# exported: the three best outputs of each input up to EOS, and their scores.
GROUPS = [
  (
    {'num_beams': 4, 'num_beam_groups': 2, 'diversity_penalty': 0.5},
    [[10, 7, 0, 5, 7, 12, 2, 29], [10, 7, 0, 5, 7, 0, 5, 7], [46, 46, 7, 7, 0, 46, 7, 0]],
    [-2.3608, -2.3874, -2.5763, -2.3856, -2.4085, -2.4245, -2.5164, -2.5463, -2.5591],
  ),
  (
    {
      'num_beams': 6,
      'num_beam_groups': 3,
      'diversity_penalty': 2.0,
      'length_penalty': 0.5,
      'early_stopping': 'never',
      'no_repeat_ngram_size': 2,
    },
    [[], [], [34, 21]],
    [-3.0029, -3.0029, -4.8515, -6.7067, -6.7814, -6.8357, -6.9629, -7.0348, -7.1602],
  ),
  (
    {'num_beams': 3, 'num_beam_groups': 3, 'diversity_penalty': 1.0, 'early_stopping': True},
    [[10, 7, 0, 17, 22, 62, 10, 29], [46, 46, 7, 7, 0, 5, 7, 0], [17, 10, 21, 26, 21, 26, 21, 26]],
    [-2.5439, -2.5979, -2.6033, -2.2521, -2.4539, -2.5226, -2.3928, -2.4993, -2.8116],
  ),
]


@pytest.mark.parametrize(('settings', 'first', 'scores'), GROUPS)
def test_groups_of_beams_are_those_of_transformers(settings, first, scores):
  cfg = tiny.config()
  model = t5x_lite.Model(cfg, tiny.params(cfg))
  rows = [[5, 9, 11, 1], [7, 1], [33, 34, 35, 1]]
  settings = {**settings, 'num_return_sequences': 3, 'return_scores': True}
  found, ours = model.generate(rows, max_new_tokens=8, **settings)
  strip = [np.trim_zeros(row, 'b') for row in first]  # padding at the end is none of an output
  assert found[0] == [list(row) for row in strip]
  np.testing.assert_allclose(np.ravel(ours), scores, atol=2e-4)
