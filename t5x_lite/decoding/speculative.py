"""Speculative decoding: a small model drafts a few tokens, the large one reads them in one pass.

What is kept of a draft, and the token after it, is distributed as if the large model alone had
drawn every token (Leviathan et al. 2023, algorithm 1). A greedy choice is a distribution too, of
one token: then all tokens are those of the large model. Each row has a position of its own.

Legend: R rows, K tokens of a draft, J = K + 1 tokens read, L new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.decoding import loop, processors
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.loop import Prompt, StepFn

# Random numbers of a position: drafting a token, keeping it, drawing another.
_DRAFT, _KEEP, _DRAW = range(3)


def run(
  read: StepFn,
  step: StepFn,
  state: Any,
  chain: Sequence[processors.Processor],
  prompt: Prompt | None,
  config: DecodingConfig,
  *,
  start_id: int,
  eos_id: int,
  limit_R: jax.Array,
  keys_R: jax.Array | None = None,
  temperature_R: jax.Array | None = None,
) -> Any:
  """Returns the last state of `sampling.decode`, of which `state` is the first.

  `read` feeds the large model tokens_RJ and returns float32 logits_RJV of what follows each; `step`
  feeds the small one a token a row. The state's cache is a pair, of both, with room for L tokens
  and `rewound`. Without a temperature all is greedy.
  """
  L, K, R = config.length, config.draft_tokens, len(state.last_R)
  rows_R, at_1J = jnp.arange(R), jnp.arange(K + 1)[None, :]

  def row_processed(logits_V, given, tokens_L, position, limit):
    given = jax.tree.map(lambda x: x[None], given)
    row = tokens_L[None], position, limit[None]
    return loop.processed(chain, logits_V[None], given, start_id, *row)[0]

  def distribution(logits_RV, tokens_RL, position_R):
    if chain:  # a row alone, since each has a position of its own
      logits_RV = jax.vmap(row_processed)(logits_RV, prompt, tokens_RL, position_R, limit_R)
    greedy_RV = jax.nn.one_hot(loop.likeliest(logits_RV), logits_RV.shape[1])
    if temperature_R is None:
      return greedy_RV
    probs_RV = jax.nn.softmax(processors.filtered(logits_RV, temperature_R, config), axis=-1)
    return jnp.where(temperature_R[:, None] > 0, probs_RV, greedy_RV)

  def random(draw: Callable[..., jax.Array], purpose: int, position_R, *args):
    assert keys_R is not None, 'sampling needs keys'
    return jax.vmap(draw)(jax.vmap(jax.random.fold_in)(keys_R, 3 * position_R + purpose), *args)

  def draw(probs_RV, purpose: int, position_R):
    if temperature_R is None:
      return loop.likeliest(probs_RV)
    return random(jax.random.categorical, purpose, position_R, jnp.log(probs_RV)).astype(jnp.int32)

  def propose(s, _):
    logits_RV, cache = step(s.last_R, s.cache)
    probs_RV = distribution(logits_RV, s.tokens_RL, s.position)
    next_R = draw(probs_RV, _DRAFT, s.position)
    tokens_RL = s.tokens_RL.at[rows_R, s.position].set(next_R, mode='drop')
    new = {'position': s.position + 1, 'last_R': next_R, 'tokens_RL': tokens_RL, 'cache': cache}
    return dataclasses.replace(s, **new), (next_R, probs_RV)

  def advance(s):
    own = dataclasses.replace(s, cache=s.cache[1], log_probs_RL=None)
    drafted, (drafts_KR, q_KRV) = jax.lax.scan(propose, own, None, K)
    # The draft reads its last token too; only its cache is wanted.
    _, small_cache = step(drafted.last_R, drafted.cache)
    drafts_RK = drafts_KR.T
    logits_RJV, cache = read(jnp.concatenate([s.last_R[:, None], drafts_RK], axis=1), s.cache[0])
    at_RJ = s.position[:, None] + at_1J
    p_JRV = jax.vmap(distribution, (1, None, 1))(logits_RJV, drafted.tokens_RL, at_RJ)

    # ---- Keep with probability p / q; the first that is not is drawn anew from p - q ----
    p_KR, q_KR = (
      jnp.take_along_axis(x, drafts_KR[..., None], -1)[..., 0] for x in (p_JRV[:K], q_KRV)
    )
    kept_KR = p_KR > 0
    if temperature_R is not None:
      keep = jax.vmap(lambda position_R: random(jax.random.uniform, _KEEP, position_R))
      kept_KR = keep(at_RJ.T[:K]) * q_KR < p_KR
    count_R = jnp.sum(jnp.cumprod(kept_KR.astype(jnp.int32), axis=0), axis=0)
    q_JRV = jnp.pad(q_KRV, ((0, 1), (0, 0), (0, 0)))  # nothing was drafted after the last
    p_RV, q_RV = (x[count_R, rows_R] for x in (p_JRV, q_JRV))
    left_RV = jnp.where(jnp.any(p_RV > q_RV, axis=-1, keepdims=True), p_RV - q_RV, p_RV)  # rounding
    next_R = draw(jnp.maximum(left_RV, 0.0), _DRAW, s.position + count_R)

    # ---- Write it, up to the end ----
    drafts_RJ = jnp.pad(drafts_RK, ((0, 0), (0, 1)))
    new_RJ = jnp.where(at_1J < count_R[:, None], drafts_RJ, next_R[:, None])
    is_end_RJ = new_RJ == eos_id
    valid_RJ = (at_1J <= count_R[:, None]) & (at_RJ < limit_R[:, None]) & ~s.ended_R[:, None]
    valid_RJ &= jnp.cumsum(is_end_RJ, axis=1) == is_end_RJ
    where = rows_R[:, None], jnp.where(valid_RJ, at_RJ, L)
    n_R = jnp.sum(valid_RJ, axis=1)
    log_probs_RL = s.log_probs_RL
    if log_probs_RL is not None:
      log_probs_RJ = jax.vmap(loop.log_prob, 1, 1)(logits_RJV, new_RJ)
      log_probs_RL = log_probs_RL.at[where].set(log_probs_RJ, mode='drop')
    position_R = s.position + n_R
    tokens_RL = s.tokens_RL.at[where].set(new_RJ, mode='drop')
    ended_R = s.ended_R | jnp.any(valid_RJ & is_end_RJ, axis=1) | (position_R >= limit_R)
    if config.stopper is not None:
      _, stop_R = processors.read_until(config.stopper, tokens_RL, position_R)
      ended_R |= jnp.asarray(config.stopper.left_S)[stop_R] == 0
    return dataclasses.replace(
      s,
      position=position_R,
      last_R=jnp.where(n_R > 0, new_RJ[rows_R, n_R - 1], s.last_R),
      tokens_RL=tokens_RL,
      log_probs_RL=log_probs_RL,
      ended_R=ended_R,
      cache=tuple(x.rewound(base_R + position_R) for x in (cache, small_cache)),
    )

  base_R, last_R = jnp.zeros((R,), jnp.int32), state.last_R
  if prompt is not None:  # its last token is read again
    base_R = prompt.lengths_R - 1
    last_R = prompt.tokens_RP[rows_R, base_R]
  first = {'position': jnp.zeros((R,), jnp.int32), 'last_R': last_R}
  first['cache'] = tuple(x.rewound(base_R) for x in state.cache)
  state = dataclasses.replace(state, **first)
  return jax.lax.while_loop(lambda s: ~jnp.all(s.ended_R), advance, state)
