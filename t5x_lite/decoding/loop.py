"""What greedy search, sampling and beam search share: prompts, results, the loop.

The whole loop runs inside jit and stops when every row has ended. It goes in stages: the cache has
few slots at first and grows, so that short outputs do not pay for the longest that are allowed.

Legend: B inputs, R rows, L new tokens, P tokens of a prompt, T of both, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite.decoding.processors import History, Processor

# Positions of the first stage, and how much longer the next one is.
FIRST_STAGE = 32
GROWTH = 4

StepFn = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


class Decoded(NamedTuple):
  """What was decoded: n outputs for each input, best first where they are ranked."""

  tokens_BnL: jax.Array  # ids, eos_id included; pad_id after it
  scores_Bn: jax.Array | None  # as `DecodingConfig.normalization` says; None if not asked for
  # Of each token, 0 after the end; None likewise. What the model gives without processors and
  # temperature, but with beams after processors.
  log_probs_BnL: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the decoder has read before the first new token, in one pass."""

  tokens_RP: jax.Array  # the start token, then the prefix, then padding
  lengths_R: jax.Array  # how many of them are not padding
  logits_RV: jax.Array  # of the first new token


def likeliest(logits_RV) -> jax.Array:
  """Returns the first of the largest, as argmax, which XLA:CPU is six times slower at."""
  V = logits_RV.shape[-1]
  is_max_RV = logits_RV == jnp.max(logits_RV, axis=-1, keepdims=True)
  first_R = jnp.min(jnp.where(is_max_RV, jnp.arange(V, dtype=jnp.int32)[None, :], V), axis=-1)
  return jnp.minimum(first_R, V - 1)  # not a number is no maximum


def log_prob(logits_RV, tokens_R) -> jax.Array:
  """Returns the natural logarithm of each row's token's probability."""
  chosen_R = jnp.take_along_axis(logits_RV, tokens_R[:, None], axis=1)[:, 0]
  return chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)


def pick(tree: Any, at_Bk: jax.Array) -> Any:
  """Returns what arrays [B, ., ...] have at given places of each input."""

  def pick_one(x):
    index = at_Bk.reshape(at_Bk.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)

  return jax.tree.map(pick_one, tree)


def processed(
  chain: Sequence[Processor],
  logits_RV,
  prompt: Prompt | None,
  start_id: int,
  tokens_RL,
  new,
  limit_R,
) -> jax.Array:
  """Returns logits after all processors of the chain."""
  if chain:
    read = history(prompt, start_id, tokens_RL, new, limit_R)
    for processor in chain:
      logits_RV = processor(logits_RV, read)
  return logits_RV


def history(prompt: Prompt | None, start_id: int, tokens_RL: jax.Array, new, limit_R) -> History:
  """Returns what the decoder has read, for processors."""
  R, L = tokens_RL.shape
  if prompt is None:
    read_RT = jnp.pad(tokens_RL, ((0, 0), (1, 0)), constant_values=start_id)
    return History(read_RT, jnp.ones((R,), jnp.int32), new, limit_R)
  read_RT = jnp.pad(prompt.tokens_RP, ((0, 0), (0, L)))
  at_RL = prompt.lengths_R[:, None] + jnp.arange(L)[None, :]
  read_RT = read_RT.at[jnp.arange(R)[:, None], at_RL].set(tokens_RL)
  return History(read_RT, prompt.lengths_R, new, limit_R)


def stages(length: int) -> list[int]:
  """Returns how many positions each stage ends at."""
  ends = [FIRST_STAGE]
  while ends[-1] < length:
    ends.append(ends[-1] * GROWTH)
  return [*ends[:-1], length]


def run(
  state: Any,
  choose: Callable[[Any, jax.Array], Any],
  step: StepFn,
  length: int,
  prompt: Prompt | None,
  grow: Callable[[Any, int], Any] | None,
  *,
  going: Callable[[Any], jax.Array],
  result: Callable[[Any], Any],
) -> Any:
  """Advances a state while it is going and below `length`; returns its result, without the cache.

  A state has position (how many tokens are written), last_R (the token fed next) and cache, which
  holds the prompt already. step feeds one token a row and returns float32 logits of the next;
  choose(state, logits_RV) returns the state with one position more written; grow returns the cache
  with room for so many new tokens, and is None if it has room.
  """
  ends = [length] if grow is None else stages(length)
  if prompt is not None:
    state = choose(state, prompt.logits_RV)

  def advance(state: Any) -> Any:
    logits_RV, cache = step(state.last_R, state.cache)
    return choose(dataclasses.replace(state, cache=cache), logits_RV)

  def stage(i: int, state: Any) -> Any:
    if grow is not None:
      state = dataclasses.replace(state, cache=grow(state.cache, ends[i]))
    state = jax.lax.while_loop(lambda s: (s.position < ends[i]) & going(s), advance, state)
    if i == len(ends) - 1:
      return result(state)
    return jax.lax.cond(going(state), lambda s: stage(i + 1, s), result, state)

  return stage(0, state)
