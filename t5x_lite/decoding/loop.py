"""What greedy search, sampling and beam search share: prompts, results, the loop.

Knows no model. The whole loop runs inside jit and stops as soon as every row has ended. It goes in
stages: the cache has few slots at first and grows, so that short outputs do not pay for the longest
that are allowed.

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
  """What was decoded: n outputs for each input, best first where they are ranked.

  Attributes:
    tokens_BnL: ids, eos_id included; pad_id after it.
    scores_Bn: as `DecodingConfig.normalization` says; None if not asked for.
    log_probs_BnL: of each token, 0 after the end; None likewise. What the model gives without
      processors and temperature, but with beams after processors.
  """

  tokens_BnL: jax.Array
  scores_Bn: jax.Array | None
  log_probs_BnL: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the decoder has read before the first new token, in one pass.

  Attributes:
    tokens_RP: the start token, then the prefix, then padding.
    lengths_R: how many of them are not padding.
    logits_RV: of the first new token.
  """

  tokens_RP: jax.Array
  lengths_R: jax.Array
  logits_RV: jax.Array


def processed(
  chain: Sequence[Processor], logits_RV, prompt: Prompt | None, start_id: int, tokens_RL, new
) -> jax.Array:
  """Returns logits after all processors of the chain."""
  if chain:
    read = history(prompt, start_id, tokens_RL, new)
    for processor in chain:
      logits_RV = processor(logits_RV, read)
  return logits_RV


def history(prompt: Prompt | None, start_id: int, tokens_RL: jax.Array, new) -> History:
  """Returns what the decoder has read, for processors."""
  R, L = tokens_RL.shape
  if prompt is None:
    start_R1 = jnp.full((R, 1), start_id, jnp.int32)
    read_RT = jnp.concatenate([start_R1, tokens_RL], axis=1)
    return History(read_RT, jnp.ones((R,), jnp.int32), new)
  read_RT = jnp.pad(prompt.tokens_RP, ((0, 0), (0, L)))
  at_RL = prompt.lengths_R[:, None] + jnp.arange(L)[None, :]
  read_RT = read_RT.at[jnp.arange(R)[:, None], at_RL].set(tokens_RL)
  return History(read_RT, prompt.lengths_R, new)


def stages(length: int) -> list[int]:
  """Returns how many positions each stage ends at."""
  ends = [FIRST_STAGE]
  while ends[-1] < length:
    ends.append(ends[-1] * GROWTH)
  return [*ends[:-1], length]


def run(
  state: Any,
  *,
  length: int,
  going: Callable[[Any], jax.Array],
  advance: Callable[[Any], Any],
  result: Callable[[Any], Any],
  grow: Callable[[Any, int], Any] | None,
) -> Any:
  """Advances a state (with position and cache) while it is going; returns its result.

  Args:
    state: its position is how many tokens are written.
    length: no position is written at or after this one.
    going: whether there is anything left to do.
    advance: writes one position.
    result: what is wanted of the last state, without the cache.
    grow: returns the cache with room for so many new tokens; None if it has room.
  """
  ends = [length] if grow is None else stages(length)

  def stage(i: int, state: Any) -> Any:
    if grow is not None:
      state = dataclasses.replace(state, cache=grow(state.cache, ends[i]))
    state = jax.lax.while_loop(lambda s: (s.position < ends[i]) & going(s), advance, state)
    if i == len(ends) - 1:
      return result(state)
    return jax.lax.cond(going(state), lambda s: stage(i + 1, s), result, state)

  return stage(0, state)
