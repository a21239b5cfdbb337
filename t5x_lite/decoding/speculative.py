"""Speculative decoding: a small model drafts a few tokens, the large one reads them in one pass.

What is kept of a draft, and the token after it, is distributed as if the large model alone had
drawn every token (Leviathan et al. 2023, algorithm 1). A greedy choice is a distribution too, of
one token: then all tokens are those of the large model. Rows keep as many tokens as they like, and
so each has a position of its own.

Legend: R rows, K tokens of a draft, J = K + 1 tokens read, L new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.decoding import loop, processors, sampling
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.loop import Decoded, Prompt, StepFn

# Random numbers of a position: drafting a token, keeping it, and drawing another.
_DRAFT, _KEEP, _DRAW = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """The loop's state."""

  position_R: jax.Array  # tokens decoded
  last_R: jax.Array
  tokens_RL: jax.Array
  log_probs_RL: jax.Array | None  # None if no score is wanted
  ended_R: jax.Array
  cache: Any
  draft_cache: Any


def decode(
  read: StepFn,
  cache: Any,
  draft_step: StepFn,
  draft_cache: Any,
  *,
  draft_tokens: int,
  rewind: Callable[[Any, jax.Array], Any],
  num_rows: int,
  config: DecodingConfig,
  start_id: int,
  eos_id: int,
  pad_id: int,
  keys_R: jax.Array | None = None,
  temperature_R: jax.Array | None = None,
  prompt: Prompt | None = None,
  extra: Sequence[processors.Processor] = (),
  scored: bool = True,
) -> Decoded:
  """Decodes greedily or by sampling; arguments are those of `sampling.decode`, and these.

  Args:
    read: feeds the large model tokens_RJ; returns float32 logits_RJV of what follows each.
    cache: of the large model, with room for L tokens, as the next.
    draft_step: feeds the small model one token a row.
    draft_cache: its cache.
    draft_tokens: K, tokens drafted before the large model reads them.
    rewind: (cache, tokens_R) -> the cache as after so many tokens of each row.
    num_rows: as of `sampling.decode`.
    config: likewise.
    start_id: likewise.
    eos_id: likewise.
    pad_id: likewise.
    keys_R: likewise.
    temperature_R: likewise.
    prompt: likewise; both caches hold it, and its last token is read again.
    extra: likewise.
    scored: likewise.
  """
  L, K, R = config.length, draft_tokens, num_rows
  sampled = config.temperature != 0.0 or temperature_R is not None
  if temperature_R is None:
    temperature_R = jnp.full((R,), config.temperature)
  chain = [*processors.make_processors(config, eos_id), *extra]
  rows_R1, at_1J = jnp.arange(R)[:, None], jnp.arange(K + 1)[None, :]
  base_R = jnp.zeros((R,), jnp.int32) if prompt is None else prompt.lengths_R - 1

  # ---- What tokens are drawn with, and by ----

  def row_processed(logits_V, given, tokens_L, new):
    given = jax.tree.map(lambda x: x[None], given)
    return loop.processed(chain, logits_V[None], given, start_id, tokens_L[None], new)[0]

  def distribution(logits_RV, tokens_RL, position_R):
    if chain:  # a row alone, since each has a position of its own
      logits_RV = jax.vmap(row_processed)(logits_RV, prompt, tokens_RL, position_R)
    return sampling.probabilities(logits_RV, temperature_R if sampled else None, config)

  def keys_at(purpose: int, position_R):
    assert keys_R is not None, 'sampling needs keys'
    return jax.vmap(jax.random.fold_in)(keys_R, 3 * position_R + purpose)

  def draw(probs_RV, purpose: int, position_R):
    if not sampled:
      return sampling.likeliest(probs_RV)
    drawn_R = jax.vmap(jax.random.categorical)(keys_at(purpose, position_R), jnp.log(probs_RV))
    return drawn_R.astype(jnp.int32)

  # ---- A round: draft, read, keep ----

  def propose(s: _State, _):
    logits_RV, cache = draft_step(s.last_R, s.draft_cache)
    probs_RV = distribution(logits_RV, s.tokens_RL, s.position_R)
    next_R = draw(probs_RV, _DRAFT, s.position_R)
    tokens_RL = s.tokens_RL.at[rows_R1[:, 0], s.position_R].set(next_R, mode='drop')
    changed = {'last_R': next_R, 'tokens_RL': tokens_RL, 'draft_cache': cache}
    return dataclasses.replace(s, position_R=s.position_R + 1, **changed), (next_R, probs_RV)

  def advance(s: _State) -> _State:
    own = dataclasses.replace(s, cache=None, log_probs_RL=None)
    drafted, (drafts_KR, q_KRV) = jax.lax.scan(propose, own, None, K)
    # The draft reads its last token too; only its cache is wanted.
    _, draft_cache = draft_step(drafted.last_R, drafted.draft_cache)
    logits_RJV, cache = read(jnp.concatenate([s.last_R[:, None], drafts_KR.T], axis=1), s.cache)
    at_RJ = s.position_R[:, None] + at_1J
    each = jax.vmap(distribution, (1, None, 1))
    p_JRV = each(logits_RJV, drafted.tokens_RL, at_RJ)

    # ---- Keep a token with probability p / q; the first that is not is drawn from p - q ----
    p_KR, q_KR = (_of(x, drafts_KR) for x in (p_JRV[:K], q_KRV))
    kept_KR = p_KR >= q_KR
    if sampled:
      keep = jax.vmap(lambda position_R: jax.vmap(jax.random.uniform)(keys_at(_KEEP, position_R)))
      kept_KR = keep(at_RJ.T[:K]) * q_KR < p_KR
    count_R = jnp.sum(jnp.cumprod(kept_KR.astype(jnp.int32), axis=0), axis=0)
    q_JRV = jnp.pad(q_KRV, ((0, 1), (0, 0), (0, 0)))
    p_RV, q_RV = (x[count_R, rows_R1[:, 0]] for x in (p_JRV, q_JRV))
    left_RV = jnp.maximum(p_RV - q_RV, 0.0)
    left_RV = jnp.where(jnp.any(left_RV > 0, axis=-1, keepdims=True), left_RV, p_RV)  # rounding
    next_R = draw(left_RV, _DRAW, s.position_R + count_R)

    # ---- Write what is kept, up to the end ----
    drafts_RJ = jnp.pad(drafts_KR.T, ((0, 0), (0, 1)))
    new_RJ = jnp.where(at_1J < count_R[:, None], drafts_RJ, next_R[:, None])
    is_end_RJ = new_RJ == eos_id
    valid_RJ = (at_1J <= count_R[:, None]) & (at_RJ < L) & ~s.ended_R[:, None]
    valid_RJ &= jnp.cumsum(is_end_RJ, axis=1) == is_end_RJ
    written_RJ = jnp.where(valid_RJ, at_RJ, L)
    n_R = jnp.sum(valid_RJ, axis=1)
    log_probs_RL = s.log_probs_RL
    if log_probs_RL is not None:
      log_probs_RJ = jax.vmap(sampling.log_prob, 1, 1)(logits_RJV, new_RJ)
      log_probs_RL = log_probs_RL.at[rows_R1, written_RJ].set(log_probs_RJ, mode='drop')
    position_R = s.position_R + n_R
    last_R = new_RJ[rows_R1[:, 0], jnp.maximum(n_R - 1, 0)]
    return _State(
      position_R=position_R,
      last_R=jnp.where(n_R > 0, last_R, s.last_R),
      tokens_RL=s.tokens_RL.at[rows_R1, written_RJ].set(new_RJ, mode='drop'),
      log_probs_RL=log_probs_RL,
      ended_R=s.ended_R | jnp.any(valid_RJ & is_end_RJ, axis=1) | (position_R >= L),
      cache=rewind(cache, base_R + position_R),
      draft_cache=rewind(draft_cache, base_R + position_R),
    )

  last_R = jnp.full((R,), start_id, jnp.int32)
  if prompt is not None:
    last_R = prompt.tokens_RP[rows_R1[:, 0], base_R]
  state = _State(
    position_R=jnp.zeros((R,), jnp.int32),
    last_R=last_R,
    tokens_RL=jnp.full((R, L), pad_id, jnp.int32),
    log_probs_RL=jnp.zeros((R, L), jnp.float32) if scored or config.best_of else None,
    ended_R=jnp.zeros((R,), bool),
    cache=rewind(cache, base_R),
    draft_cache=rewind(draft_cache, base_R),
  )
  state = jax.lax.while_loop(lambda s: ~jnp.all(s.ended_R), advance, state)
  return sampling.ranked(state.tokens_RL, state.log_probs_RL, config, eos_id)


def _of(probs_KRV, tokens_KR):
  """Returns the probability of each token."""
  return jnp.take_along_axis(probs_KRV, tokens_KR[..., None], axis=-1)[..., 0]
