"""Decoding over a toy step whose distribution is known."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.decoding import sampling
from t5x_lite.decoding.config import DecodingConfig

V = 6
# Logits of the next token by the last one; 1 ends, 0 is padding.
TABLE = jax.random.normal(jax.random.key(0), (V, V)) * 2.0
TABLE = TABLE.at[:, 0].set(-1e9)


def step(last_B, cache):
  return TABLE[last_B], cache + 1


def run(config, batch_size=2, **kwargs):
  return sampling.decode(
    step,
    jnp.zeros((), jnp.int32),
    batch_size=batch_size,
    config=config,
    start_id=0,
    eos_id=1,
    pad_id=0,
    **kwargs,
  )


def greedy_by_hand(L, prompt=()):
  tokens, score, last = [], 0.0, 0
  for t in range(L):
    logits = np.asarray(TABLE[last], np.float64)
    last = prompt[t] if t < len(prompt) else int(logits.argmax())
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


def test_prompts_of_different_lengths_are_forced():
  prompt = jnp.asarray([[3, 4, 2], [5, 0, 0]], jnp.int32)
  tokens, scores = run(DecodingConfig(max_decode_length=7), prompt_BP=prompt)
  for row, forced in enumerate(([3, 4, 2], [5])):
    expected, score = greedy_by_hand(7, forced)
    assert tokens[row].tolist() == expected
    assert abs(float(scores[row]) - score) < 1e-4


def test_the_loop_stops_when_all_rows_have_ended():
  def ending(last_B, cache):
    return jnp.zeros((2, V)).at[:, 1].set(9.0), cache + 1

  # A step after the end would be seen in the cache's count.
  steps_taken = []

  def counting(last_B, cache):
    jax.debug.callback(lambda c: steps_taken.append(int(c)), cache)
    return ending(last_B, cache)

  tokens, _ = sampling.decode(
    counting,
    jnp.zeros((), jnp.int32),
    batch_size=2,
    config=DecodingConfig(max_decode_length=9),
    start_id=0,
    eos_id=1,
    pad_id=0,
  )
  jax.block_until_ready(tokens)
  jax.effects_barrier()
  assert steps_taken == [0]
  assert tokens.tolist() == [[1] + [0] * 8] * 2


def frequencies(config, n=20_000):
  config = dataclasses.replace(config, max_decode_length=1)
  tokens, _ = run(config, batch_size=n, key=jax.random.key(1))
  return np.bincount(np.asarray(tokens)[:, 0], minlength=V) / n


def test_sampling_has_the_right_distribution():
  expected = jax.nn.softmax(TABLE[0] / 0.7)
  got = frequencies(DecodingConfig(temperature=0.7))
  np.testing.assert_allclose(got, expected, atol=0.02)


def test_top_k():
  top = np.argsort(-np.asarray(TABLE[0]))[:2]
  p = np.zeros(V)
  p[top] = np.asarray(jax.nn.softmax(TABLE[0][top]))
  got = frequencies(DecodingConfig(temperature=1.0, top_k=2))
  np.testing.assert_allclose(got, p, atol=0.02)


def test_top_p_keeps_the_smallest_sufficient_set():
  probs = np.asarray(jax.nn.softmax(TABLE[0]))
  order = np.argsort(-probs)
  for top_p in (0.01, 0.5, 0.9):
    size = int(np.argmax(np.cumsum(probs[order]) >= top_p)) + 1
    p = np.zeros(V)
    p[order[:size]] = probs[order[:size]] / probs[order[:size]].sum()
    got = frequencies(DecodingConfig(temperature=1.0, top_p=top_p))
    np.testing.assert_allclose(got, p, atol=0.02)


def test_score_is_the_sequences_log_probability():
  """Probabilities of all sequences of two tokens add up to 1."""
  total = 0.0
  for a, b in itertools.product(range(1, V), repeat=2):
    if a == 1 and b != 1:
      continue
    prompt = jnp.asarray([[a, b if a != 1 else 0]], jnp.int32)
    _, scores = run(DecodingConfig(max_decode_length=2), batch_size=1, prompt_BP=prompt)
    total += math.exp(float(scores[0]))
  assert abs(total - 1.0) < 1e-4
