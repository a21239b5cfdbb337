"""Greedy decoding and sampling over any step(tokens_B, cache).

Knows no model. The whole loop is one `lax.while_loop`, so it runs inside jit
and stops as soon as every row has ended.

Legend: B batch, L decoded length, V vocabulary, P prompt length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.decoding.config import DecodingConfig

StepFn = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def _choose(logits_BV, key, config: DecodingConfig):
  """Returns tokens_B."""
  if config.temperature == 0.0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / config.temperature
  if config.top_k:
    k = min(config.top_k, logits_BV.shape[-1])
    kth_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if config.top_p < 1.0:
    logits_BV = _nucleus(logits_BV, config.top_p)
  return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def _nucleus(logits_BV, top_p: float):
  """Hides tokens outside the smallest set whose probability reaches top_p."""
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
  # A token stays if what is likelier than it has not reached top_p yet, so the
  # likeliest always stays.
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
  least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """The loop's state.

  Attributes:
    position: int32, tokens decoded so far.
    last_B: the token fed next.
    tokens_BL: decoded so far; pad_id after the end.
    scores_B: sum of the log-probabilities of the decoded tokens.
    ended_B: rows that have produced eos_id.
    cache: the model's.
  """

  position: jax.Array
  last_B: jax.Array
  tokens_BL: jax.Array
  scores_B: jax.Array
  ended_B: jax.Array
  cache: Any


def decode(
  step: StepFn,
  cache: Any,
  *,
  batch_size: int,
  config: DecodingConfig,
  start_id: int,
  eos_id: int,
  pad_id: int,
  key: jax.Array | None = None,
  prompt_BP: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Decodes greedily or by sampling.

  Args:
    step: feeds one token a row; returns float32 logits of the next.
    cache: what step needs; must hold config.max_decode_length positions.
    batch_size: B.
    config: how tokens are chosen.
    start_id: fed first.
    eos_id: ends a row; it is part of the output.
    pad_id: fills a row after its end.
    key: random key; needed when the temperature is not 0.
    prompt_BP: tokens the output must begin with, padded with pad_id; they
      count towards the length and the score.

  Returns:
    tokens_BL, with L = max_decode_length, and scores_B: the log-probability of
    each row's tokens, eos_id included.
  """
  L = config.max_decode_length
  if key is None:
    if config.temperature != 0.0:
      raise ValueError('Sampling needs a key.')
    key = jax.random.key(0)

  def body(s: _State) -> _State:
    logits_BV, cache = step(s.last_B, s.cache)
    next_B = _choose(logits_BV, jax.random.fold_in(key, s.position), config)
    if prompt_BP is not None:
      P = prompt_BP.shape[1]
      forced_B = jax.lax.dynamic_index_in_dim(
        prompt_BP, jnp.minimum(s.position, P - 1), axis=1, keepdims=False
      )
      forced = (s.position < P) & (forced_B != pad_id)
      next_B = jnp.where(forced, forced_B, next_B)
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    score_B = jnp.take_along_axis(log_probs_BV, next_B[:, None], axis=1)[:, 0]
    next_B = jnp.where(s.ended_B, pad_id, next_B)
    return _State(
      position=s.position + 1,
      last_B=next_B,
      tokens_BL=jax.lax.dynamic_update_slice(s.tokens_BL, next_B[:, None], (0, s.position)),
      scores_B=s.scores_B + jnp.where(s.ended_B, 0.0, score_B),
      ended_B=s.ended_B | (next_B == eos_id),
      cache=cache,
    )

  def going(s: _State) -> jax.Array:
    return (s.position < L) & ~jnp.all(s.ended_B)

  state = jax.lax.while_loop(
    going,
    body,
    _State(
      position=jnp.zeros((), jnp.int32),
      last_B=jnp.full((batch_size,), start_id, jnp.int32),
      tokens_BL=jnp.full((batch_size, L), pad_id, jnp.int32),
      scores_B=jnp.zeros((batch_size,), jnp.float32),
      ended_B=jnp.zeros((batch_size,), bool),
      cache=cache,
    ),
  )
  return state.tokens_BL, state.scores_B
