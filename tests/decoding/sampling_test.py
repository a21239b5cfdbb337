"""Decoding over a toy step whose distribution is known."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decoding import loop, sampling
from t5x_lite.decoding.config import DecodingConfig
from tests.decoding import filters_by_hand

V = 6
# Logits of the next token by the last one; 1 ends, 0 is padding.
TABLE = jax.random.normal(jax.random.key(0), (V, V)) * 2.0
TABLE = TABLE.at[:, 0].set(-1e9)


def step(last_B, cache):
  return TABLE[last_B], cache + 1


def run(config, batch_size=2, start_id=0, **kwargs):
  found = sampling.decode(
    step,
    jnp.zeros((), jnp.int32),
    num_rows=batch_size * config.rows_per_input,
    config=config,
    start_id=start_id,
    eos_id=1,
    pad_id=0,
    **kwargs,
  )
  if config.rows_per_input > 1:
    return found
  return found.tokens_BnL[:, 0], found.scores_Bn[:, 0]


def keys(n, seed=1):
  return jax.random.split(jax.random.key(seed), n)


def greedy_by_hand(L):
  tokens, score, last = [], 0.0, 0
  for _ in range(L):
    logits = np.asarray(TABLE[last], np.float64)
    last = int(logits.argmax())
    score += logits[last] - np.log(np.exp(logits).sum())
    tokens.append(last)
    if last == 1:
      break
  return tokens + [0] * (L - len(tokens)), score


def test_greedy():
  tokens, scores = jax.jit(lambda: run(DecodingConfig(max_decode_length=7)))()
  expected, score = greedy_by_hand(7)
  for row in range(2):
    assert tokens[row].tolist() == expected
    assert abs(float(scores[row]) - score) < 1e-4


def test_a_longer_limit_goes_on_in_stages():
  """The same tokens whether the cache grows or not, and it grows only if it must."""
  never = TABLE.at[:, 1].set(-1e9)
  grown = []

  def grow(cache, length):
    jax.debug.callback(lambda c: grown.append((length, int(c))), cache)
    return cache

  def endless(last_B, cache):
    return never[last_B], cache + 1

  for L, expected in ((20, [(20, 0)]), (100, [(32, 0), (100, 32)])):
    grown.clear()
    config = DecodingConfig(max_decode_length=L)
    arguments = dict(num_rows=2, config=config, start_id=0, eos_id=1, pad_id=0)
    zero = jnp.zeros((), jnp.int32)
    found = sampling.decode(endless, zero, grow=grow, **arguments)
    plain = sampling.decode(endless, zero, **arguments)
    jax.effects_barrier()
    assert grown == expected
    np.testing.assert_array_equal(found.tokens_BnL, plain.tokens_BnL)
    np.testing.assert_allclose(found.log_probs_BnL, plain.log_probs_BnL, rtol=1e-6)


def test_a_prompts_logits_come_first():
  logits = jnp.zeros((2, V)).at[0, 3].set(9.0).at[1, 4].set(9.0)
  prompt = loop.Prompt(jnp.asarray([[0, 5], [0, 0]]), jnp.asarray([2, 1]), logits)
  tokens, _ = run(DecodingConfig(max_decode_length=4), prompt=prompt)
  for row, first in enumerate((3, 4)):
    expected = [first]
    while len(expected) < 4 and expected[-1] != 1:
      expected.append(int(np.argmax(TABLE[expected[-1]])))
    assert tokens[row].tolist() == expected + [0] * (4 - len(expected))


def test_the_loop_stops_when_all_rows_have_ended():
  def ending(last_B, cache):
    return jnp.zeros((2, V)).at[:, 1].set(9.0), cache + 1

  # A step after the end would be seen in the cache's count.
  steps_taken = []

  def counting(last_B, cache):
    jax.debug.callback(lambda c: steps_taken.append(int(c)), cache)
    return ending(last_B, cache)

  tokens = sampling.decode(
    counting,
    jnp.zeros((), jnp.int32),
    num_rows=2,
    config=DecodingConfig(max_decode_length=9),
    start_id=0,
    eos_id=1,
    pad_id=0,
  ).tokens_BnL[:, 0]
  jax.block_until_ready(tokens)
  jax.effects_barrier()
  assert steps_taken == [0]
  assert tokens.tolist() == [[1] + [0] * 8] * 2


def chi_square(config, probs, n=20_000, **kwargs):
  """Draws first tokens and holds them against their probabilities (p = 0.001)."""
  config = dataclasses.replace(config, max_decode_length=1)
  tokens, _ = run(config, batch_size=n, keys_R=keys(n), **kwargs)
  counts = np.bincount(np.asarray(tokens)[:, 0], minlength=V)
  probs = np.asarray(probs)
  assert counts[probs < 1e-12].sum() == 0
  real = probs >= 1e-12
  statistic = (((counts - n * probs) ** 2)[real] / (n * probs[real])).sum()
  limits = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}
  assert real.sum() == 1 or statistic < limits[int(real.sum()) - 1], statistic


@pytest.mark.parametrize(
  'settings', {tuple(one): one for one in filters_by_hand.SETTINGS}.values(), ids=str
)
def test_sampling_has_the_right_distribution(settings):
  """After a token whose row is flat enough that cutoffs leave several."""
  config = DecodingConfig(**{'temperature': 1.0, **settings})
  probs = filters_by_hand.probabilities(TABLE[2], **settings)
  assert (probs > 0).sum() > 1 or len(settings) > 1
  chi_square(config, probs, start_id=2)


def test_a_temperature_and_a_key_for_each_row():
  n = 20_000
  temperature = jnp.where(jnp.arange(n) % 2 == 0, 0.0, 1.3)
  config = DecodingConfig(max_decode_length=1)
  tokens, _ = run(config, batch_size=n, keys_R=keys(n), temperature_R=temperature)
  tokens = np.asarray(tokens)[:, 0]
  assert set(tokens[::2]) == {int(np.argmax(TABLE[0]))}
  expected = jax.nn.softmax(TABLE[0] / 1.3)
  np.testing.assert_allclose(np.bincount(tokens[1::2], minlength=V) * 2 / n, expected, atol=0.02)
  same = jnp.broadcast_to(jax.random.key(5), (4,))
  tokens, _ = run(DecodingConfig(max_decode_length=5, temperature=1.0), batch_size=4, keys_R=same)
  assert len({tuple(row) for row in tokens.tolist()}) == 1


def test_the_best_of_several_samples():
  config = DecodingConfig(max_decode_length=5, temperature=1.5, num_return_sequences=6)
  drawn = run(config, keys_R=keys(12))
  config = dataclasses.replace(config, num_return_sequences=2, best_of=6, length_penalty=0.5)
  best = run(config, keys_R=keys(12))
  for row in range(2):
    ranked = []
    for tokens, log_probs in zip(drawn.tokens_BnL[row], drawn.log_probs_BnL[row], strict=True):
      tokens = tokens.tolist()
      length = tokens.index(1) + 1 if 1 in tokens else 5
      ranked.append((float(log_probs.sum()) / length**0.5, tokens))
    ranked.sort(reverse=True)
    np.testing.assert_allclose(best.scores_Bn[row], [r for r, _ in ranked[:2]], rtol=1e-5)
    assert best.tokens_BnL[row].tolist() == [tokens for _, tokens in ranked[:2]]


def test_score_is_the_sequences_log_probability():
  """Probabilities of all sequences of two tokens add up to 1."""
  outputs = [(a, b) if a != 1 else (a,) for a, b in itertools.product(range(1, V), repeat=2)]
  total = 0.0
  for output in sorted(set(outputs)):
    forced = [*output, 0]

    def only(logits, read, forced=forced):
      there = jax.nn.one_hot(jnp.asarray(forced)[read.new], V) > 0
      return jnp.where(there[None, :], logits, -jnp.inf)

    config = DecodingConfig(max_decode_length=2)
    tokens, scores = run(config, batch_size=1, extra=[only])
    assert tokens[0].tolist()[: len(output)] == list(output)
    total += math.exp(float(scores[0]))
  assert abs(total - 1.0) < 1e-4
