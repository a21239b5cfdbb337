"""Greedy decoding and sampling over any step(tokens_R, cache).

Knows no model; see loop.py for what goes around.

Legend: R rows, L new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.decoding import loop, processors, speculative
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.loop import Decoded, Prompt, StepFn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """The loop's state; see `loop.run`."""

  position: jax.Array
  last_R: jax.Array
  tokens_RL: jax.Array  # decoded so far; pad_id after the end
  log_probs_RL: jax.Array | None  # None if no score is wanted
  ended_R: jax.Array  # rows that have produced eos_id, or a stop string
  stop_R: jax.Array  # where the config's stopper is
  cache: Any


def decode(
  step: StepFn,
  cache: Any,
  *,
  num_rows: int,
  config: DecodingConfig,
  start_id: int,
  eos_id: int,
  pad_id: int,
  keys_R: jax.Array | None = None,
  temperature_R: jax.Array | None = None,
  limit_R: jax.Array | None = None,
  prompt: Prompt | None = None,
  extra: Sequence[processors.Processor] = (),
  scored: bool = True,
  grow: Callable[[Any, int], Any] | None = None,
  read: StepFn | None = None,
) -> Decoded:
  """Decodes greedily or by sampling, from start_id on, or after the prompt that the cache holds.

  R = num_rows is inputs times config.rows_per_input, the rows of an input together. step and grow
  are those of `loop.run`; read feeds several tokens a row, where step is a draft's and the cache a
  pair (see `speculative`). The random keys are needed when the temperature is not 0; temperature_R
  and limit_R, how many tokens each row may have, go before the config's. Extra processors come
  after the config's. scored says whether scores and log-probabilities are wanted. Of a row, eos_id
  is a part, and pad_id fills what is after it.
  """
  L, n = config.length, config.rows_per_input
  sampled = config.temperature != 0.0 or temperature_R is not None
  if sampled and keys_R is None:
    raise ValueError('Sampling needs keys.')
  if temperature_R is None:
    temperature_R = jnp.full((num_rows,), config.temperature)
  if limit_R is None:
    limit_R = jnp.full((num_rows,), L)
  chain = [*processors.make_processors(config, eos_id), *extra]
  scored |= bool(config.best_of)

  def choose(s: _State, logits_RV) -> _State:
    new = s.tokens_RL, s.position, limit_R
    seen_RV = loop.processed(chain, logits_RV, prompt, start_id, *new)
    next_R = loop.likeliest(seen_RV)
    if sampled and keys_R is not None:
      keys = jax.vmap(jax.random.fold_in, (0, None))(keys_R, s.position)
      filtered_RV = processors.filtered(seen_RV, temperature_R, config)
      drawn_R = jax.vmap(jax.random.categorical)(keys, filtered_RV)
      next_R = jnp.where(temperature_R > 0, drawn_R, next_R)
    next_R = jnp.where(s.ended_R, pad_id, next_R.astype(jnp.int32))
    log_probs_RL = s.log_probs_RL
    if log_probs_RL is not None:
      log_prob_R = jnp.where(s.ended_R, 0.0, loop.log_prob(logits_RV, next_R))
      at = (0, s.position)
      log_probs_RL = jax.lax.dynamic_update_slice(log_probs_RL, log_prob_R[:, None], at)
    ended_R = s.ended_R | (next_R == eos_id) | (s.position + 1 >= limit_R)
    stop_R = s.stop_R
    if config.stopper is not None:
      stop_R = processors.read_on(config.stopper, stop_R, next_R)
      ended_R |= jnp.asarray(config.stopper.left_S)[stop_R] == 0
    return dataclasses.replace(
      s,
      position=s.position + 1,
      last_R=next_R,
      tokens_RL=jax.lax.dynamic_update_slice(s.tokens_RL, next_R[:, None], (0, s.position)),
      log_probs_RL=log_probs_RL,
      ended_R=ended_R,
      stop_R=stop_R,
    )

  state = _State(
    position=jnp.zeros((), jnp.int32),
    last_R=jnp.full((num_rows,), start_id, jnp.int32),
    tokens_RL=jnp.full((num_rows, L), pad_id, jnp.int32),
    log_probs_RL=jnp.zeros((num_rows, L), jnp.float32) if scored else None,
    ended_R=jnp.zeros((num_rows,), bool),
    stop_R=jnp.zeros((num_rows,), jnp.int32),
    cache=cache,
  )
  if read is None:
    tokens_RL, log_probs_RL = loop.run(
      *(state, choose, step, L, prompt, grow),
      going=lambda s: ~jnp.all(s.ended_R),
      result=lambda s: (s.tokens_RL, s.log_probs_RL),
    )
  else:
    random = {'keys_R': keys_R, 'temperature_R': temperature_R} if sampled else {}
    more: dict[str, Any] = {'start_id': start_id, 'eos_id': eos_id, 'limit_R': limit_R, **random}
    state = speculative.run(read, step, state, chain, prompt, config, **more)
    tokens_RL, log_probs_RL = state.tokens_RL, state.log_probs_RL
  length_R = limit_R
  if config.stopper is not None:
    length_R, _ = processors.read_until(config.stopper, tokens_RL, length_R)
  # A draft may have written more than the end.
  kept_BnL = (jnp.arange(L)[None, :] < length_R[:, None]).reshape(-1, n, L)
  tokens_BnL = jnp.where(kept_BnL, tokens_RL.reshape(-1, n, L), pad_id)
  if log_probs_RL is None:
    return Decoded(tokens_BnL, None, None)
  log_probs_BnL = jnp.where(kept_BnL, log_probs_RL.reshape(-1, n, L), 0.0)
  scores_Bn = jnp.sum(log_probs_BnL, axis=-1)
  if not config.best_of:
    return Decoded(tokens_BnL, scores_Bn, log_probs_BnL)
  is_end_BnL = tokens_BnL == eos_id
  end_Bn = jnp.argmax(is_end_BnL, -1) + 1
  length_Bn = jnp.where(jnp.any(is_end_BnL, -1), end_Bn, length_R.reshape(-1, n))
  scores_Bn = config.normalized(scores_Bn, length_Bn.astype(jnp.float32))
  _, best_Bn = jax.lax.top_k(scores_Bn, config.num_return_sequences)
  return loop.pick(Decoded(tokens_BnL, scores_Bn, log_probs_BnL), best_Bn)
