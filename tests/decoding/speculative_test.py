"""Drafts change how fast tokens come, never which: beside the large model alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_lite
from t5x_lite.decoding import loop, sampling
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from tests.models import tiny

V, L = 5, 3
# Logits of the next token by the last one: of the large model, and of one that is often wrong.
LARGE, SMALL = (2.0 * jax.random.normal(jax.random.key(seed), (V, V)) for seed in (0, 1))


@jax.tree_util.register_static
class Cache:
  """Remembers nothing: the next token depends on the last alone."""

  def rewound(self, _):
    return self


CACHE = Cache()


def decode(config, keys_R, *, small=SMALL, **arguments):
  return sampling.decode(
    lambda tokens, cache: (small[tokens], cache),
    (CACHE, CACHE),
    read=lambda tokens, cache: (LARGE[tokens], cache),
    num_rows=len(keys_R) * config.rows_per_input,
    config=config,
    start_id=0,
    eos_id=1,
    pad_id=0,
    keys_R=keys_R,
    **arguments,
  )


def outcomes(table):
  """Returns the probability of each output, padded, by its tokens."""
  probs = np.asarray(jax.nn.softmax(table, axis=-1), np.float64)
  found = {}
  for tokens in itertools.product(range(V), repeat=L):
    end = tokens.index(1) + 1 if 1 in tokens else L
    path = (0, *tokens[:end])
    p = np.prod([probs[a, b] for a, b in itertools.pairwise(path)])
    found[(*tokens[:end], *[0] * (L - end))] = found.get((*tokens[:end], *[0] * (L - end)), 0) + (
      p if tokens[end:] == (0,) * (L - end) else 0
    )
  return found


@pytest.mark.parametrize(
  ('settings', 'draft_tokens', 'small'), [({}, 2, SMALL), ({}, 2, LARGE), ({'top_k': 3}, 1, SMALL)]
)
def test_samples_are_distributed_as_the_large_models(settings, draft_tokens, small):
  n, temperature = 40_000, 0.8
  settings = {**settings, 'draft_tokens': draft_tokens}
  config = DecodingConfig(max_decode_length=L, temperature=temperature, **settings)
  keys_R = jax.random.split(jax.random.key(7), n)
  run = jax.jit(lambda keys: decode(config, keys, small=small))
  found = run(keys_R)
  table = LARGE / temperature
  if 'top_k' in settings:
    least = jnp.sort(table, axis=-1)[:, -settings['top_k'], None]
    table = jnp.where(table < least, -jnp.inf, table)
  expected = outcomes(table)
  assert abs(sum(expected.values()) - 1.0) < 1e-6
  drawn, counts = np.unique(np.asarray(found.tokens_BnL[:, 0]), axis=0, return_counts=True)
  counts = dict(zip(map(tuple, drawn.tolist()), counts.tolist(), strict=True))
  assert all(expected[tokens] > 0 for tokens in counts)
  # Chi-square; what is expected less than 5 times counts as one outcome.
  pairs = [(counts.get(tokens, 0), n * p) for tokens, p in expected.items() if p > 0]
  rare = [pair for pair in pairs if pair[1] < 5]
  pairs = [pair for pair in pairs if pair[1] >= 5] + [tuple(map(sum, zip(*rare, strict=True)))] * (
    len(rare) > 0
  )
  statistic = sum((seen - mean) ** 2 / mean for seen, mean in pairs)
  freedom = len(pairs) - 1
  assert statistic < freedom + 3.1 * np.sqrt(2 * freedom) + 3, (statistic, freedom)  # p < 0.001
  log_p = jax.nn.log_softmax(LARGE, axis=-1)  # scores are the model's own
  tokens = np.asarray(found.tokens_BnL[:50, 0])
  for row, scores in zip(tokens, found.log_probs_BnL[:50, 0], strict=True):
    end = row.tolist().index(1) + 1 if 1 in row else L
    by_hand = [log_p[a, b] for a, b in itertools.pairwise([0, *row[:end]])]
    np.testing.assert_allclose(scores, [*by_hand, *[0.0] * (L - end)], atol=1e-5)


def test_a_prompts_last_token_is_read_again():
  prompt = loop.Prompt(jnp.asarray([[0, 2], [0, 0]]), jnp.asarray([2, 1]), jnp.zeros((2, V)))
  config = DecodingConfig(max_decode_length=L)
  found = decode(config, jax.random.split(jax.random.key(0), 2), prompt=prompt)
  for row, last in enumerate((2, 0)):
    expected = []
    while len(expected) < L and last != 1:
      last = int(np.argmax(LARGE[last]))
      expected.append(last)
    assert found.tokens_BnL[row, 0].tolist() == expected + [0] * (L - len(expected))


def models(**fields):
  """Returns a large model, one like it with some noise, and one that has nothing to do with it."""
  cfg = tiny.config(**fields)
  params, rng = tiny.params(cfg), np.random.default_rng(1)
  near = jax.tree.map(lambda x: (x + 0.03 * rng.standard_normal(x.shape)).astype(x.dtype), params)
  small = cfg.replace(num_decoder_layers=1, num_encoder_layers=1, emb_dim=8, num_heads=2)
  other = t5x_lite.Model(small, tiny.params(small, seed=5))
  return t5x_lite.Model(cfg, params), t5x_lite.api.Model(cfg, near), other


ROWS = [[5, 9, 11, 1], [7, 1], [33, 34, 35, 36, 37, 38, 1]]


@pytest.mark.parametrize(
  'fields',
  [{'relpos_per_layer': True}, {'architecture': 'decoder'}],
  ids=['encoder-decoder', 'decoder'],
)
def test_greedy_outputs_are_those_of_the_model_alone(fields):
  large, near, other = models(**fields)
  settings = {'max_new_tokens': 40, 'return_scores': True, 'return_log_probs': True}
  if fields.get('architecture') != 'decoder':
    settings['prefix'] = [[], [12, 13], [14]]
  alone, scores, log_probs = large.generate(ROWS, **settings)
  for draft, draft_tokens in ((near, 3), (other, 4)):
    found = large.generate(ROWS, draft=draft, draft_tokens=draft_tokens, **settings)
    assert found[0] == alone
    np.testing.assert_allclose(found[1], scores, atol=1e-3)
    for a, b in zip(found[2], log_probs, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-3)


def test_processors_count_from_each_rows_own_position():
  large, near, _ = models()
  allowed = [[9, 4, 5, 4, 5, 6, 7], [9, 4, 8, 9, 4, 6, 9, 4], [9, *range(20, 40)]]
  hiding = {'no_repeat_ngram_size': 2, 'min_new_tokens': 5, 'forced_bos_id': 9, 'forced_eos_id': 1}
  for more in (hiding | {'processors': [_only_even]}, {'allowed_outputs': allowed}):
    settings = {'max_new_tokens': 24, 'repetition_penalty': 1.3, **more}
    alone = large.generate(ROWS, **settings)
    assert large.generate(ROWS, draft=near, draft_tokens=3, **settings) == alone


def _only_even(logits_RV, history):
  odd_V = jnp.arange(logits_RV.shape[1]) % 2 == 1
  return jnp.where(odd_V & (history.new < 3), -jnp.inf, logits_RV)


def test_a_sample_depends_on_its_seed_alone():
  large, near, _ = models()
  settings = {'max_new_tokens': 12, 'temperature': 1.0, 'draft': near}
  together = large.generate(ROWS, seed=[3, 4, 5], **settings)
  assert together[1] == large.generate([ROWS[1]], seed=[4], **settings)[0]


def test_a_draft_of_another_kind_is_refused():
  large, near, _ = models()
  wide = tiny.config(vocab_size=65)
  other = t5x_lite.Model(wide, tiny.params(wide))
  with pytest.raises(UsageError, match='vocab_size=65, the model 64'):
    large.generate(ROWS, draft=other)
  with pytest.raises(UsageError, match='num_beams is 2'):
    large.generate(ROWS, draft=near, num_beams=2)
  with pytest.raises(UsageError, match='draft_tokens is 0'):
    large.generate(ROWS, draft=near, draft_tokens=0)
  cfg = tiny.config(vocab_size=384)
  byte, letters = (
    t5x_lite.Model(cfg, tiny.params(cfg), t5x_lite.VocabularyConfig(kind='byte', extra_ids=n))
    for n in (125, 100)
  )
  with pytest.raises(UsageError, match='another vocabulary'):
    byte.generate(ROWS, draft=letters)
