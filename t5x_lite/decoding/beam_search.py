"""Beam search over any step(tokens_R, cache), with the semantics of transformers.

The running beams of an input go on until its finished ones cannot be bettered; twice as many
continuations as beams are looked at, so that enough of them have not ended. With brevity_alpha and
early_stopping='never' the rule to stop is T5X's (t5x/decoding.py:1131), which alone differs in that
it returns a hypothesis cut at the length limit only where none has ended. Nothing of the cache is
moved: `reorder` is told which row each beam continues.

Groups of beams (Vijayakumar et al. 2016) are searches of their own, but for a penalty on what the
groups before wrote at this position (transformers' HammingDiversityLogitsProcessor).

Legend: I inputs of G groups, B = I G, K beams, C = 2 K candidates, R = B K rows, L tokens, V ids.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.decoding import loop, processors
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.loop import Decoded, Prompt, StepFn, pick

# Of what is no candidate; finite, so that sums and comparisons stay defined.
WORST = -1e9
# Scores whose maximum is looked at first.
SEGMENT = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Hypotheses:
  """k hypotheses of each input."""

  tokens_BkL: jax.Array  # ids, then pad_id
  log_probs_BkL: jax.Array  # of each token; 0 where there is none
  scores_Bk: jax.Array  # sums of log-probabilities while running, normalised once finished


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """The loop's state, see `loop.run`; hypotheses are K for each input, best first."""

  position: jax.Array
  last_R: jax.Array
  running: _Hypotheses
  finished: _Hypotheses
  full_BK: jax.Array  # whether there is a finished one
  open_B: jax.Array  # inputs whose finished hypotheses can still be bettered
  cache: Any


def _best(scores_BKV, count: int):
  """Returns the largest of all K V scores of an input: scores, beams, tokens.

  Only the segments with the largest maxima are searched: a sixth of the time of one top_k on a CPU
  (docs/lab_notes.md), as T5X's top_k_two_stage on a TPU.
  """
  B, K, V = scores_BKV.shape
  num = K * V // SEGMENT
  flat_BF = scores_BKV.reshape(B, K * V)
  if V % SEGMENT or num < 2 * count:
    best_BC, at_BC = jax.lax.top_k(flat_BF, count)
  else:
    segments_BGS = flat_BF.reshape(B, num, SEGMENT)
    _, which_BC = jax.lax.top_k(jnp.max(segments_BGS, axis=-1), count)
    few_BF = pick(segments_BGS, which_BC).reshape(B, count * SEGMENT)
    best_BC, at_BC = jax.lax.top_k(few_BF, count)
    at_BC = pick(which_BC, at_BC // SEGMENT) * SEGMENT + at_BC % SEGMENT
  return best_BC, at_BC // V, at_BC % V


def search(
  step: StepFn,
  cache: Any,
  *,
  num_rows: int,
  config: DecodingConfig,
  start_id: int,
  eos_id: int,
  pad_id: int,
  reorder: Callable[[Any, jax.Array], Any],
  limit_R: jax.Array | None = None,
  prompt: Prompt | None = None,
  extra: Sequence[processors.Processor] = (),
  grow: Callable[[Any, int], Any] | None = None,
) -> Decoded:
  """Returns the num_return_sequences best hypotheses, best first.

  Arguments are those of `sampling.decode`, and reorder: (cache, parents_BK) -> cache, where beam k
  of a group goes on from what its row parents_BK[k] has read.
  """
  L, G = config.length, config.num_beam_groups
  K = config.num_beams // G
  B = num_rows // K
  if limit_R is None:
    limit_R = jnp.full((num_rows,), L)
  limit_B1 = limit_R.reshape(B, K)[:, :1]
  chain = [*processors.make_processors(config, eos_id), *extra]
  stop = config.early_stopping
  alpha = config.length_penalty if config.brevity_alpha is None else config.brevity_alpha

  def choose(s: _State, logits_RV) -> _State:
    V, used_BV, new = logits_RV.shape[-1], None, s
    # Each pass makes one group more right, since it depends on those before alone.
    for _ in range(G):
      new = extend(s, logits_RV, used_BV)
      over_B = ~s.open_B | (jnp.all(s.full_BK, axis=1) & (stop is True))  # and pads from now on
      written_BK = jnp.where(over_B[:, None], pad_id, new.last_R.reshape(B, K))
      counts_IGV = jnp.sum(jax.nn.one_hot(written_BK, V), axis=1).reshape(-1, G, V)
      used_BV = (jnp.cumsum(counts_IGV, axis=1) - counts_IGV).reshape(B, V)
    return new

  def extend(s: _State, logits_RV, used_BV) -> _State:
    """Writes a position, where groups before have used tokens so often."""
    new_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    if used_BV is not None:
      new_RV -= config.diversity_penalty * jnp.repeat(used_BV, K, axis=0)
    tokens_RL = s.running.tokens_BkL.reshape(num_rows, L)
    new_RV = loop.processed(chain, new_RV, prompt, start_id, tokens_RL, s.position, limit_R)
    sums_BKV = new_RV.reshape(B, K, -1) + s.running.scores_Bk[:, :, None]
    sum_BC, beam_BC, token_BC = _best(sums_BKV, 2 * K)
    parents = pick(s.running, beam_BC)
    candidates = _Hypotheses(
      parents.tokens_BkL.at[:, :, s.position].set(token_BC),
      parents.log_probs_BkL.at[:, :, s.position].set(sum_BC - parents.scores_Bk),
      sum_BC,
    )
    length = (s.position + 1).astype(jnp.float32)
    ended_BC = (token_BC == eos_id) | (s.position + 1 >= limit_B1)

    running_BC = jnp.where(ended_BC, sum_BC + WORST, sum_BC)
    running_BK, at_BK = jax.lax.top_k(running_BC, K)
    running = dataclasses.replace(pick(candidates, at_BK), scores_Bk=running_BK)

    # Candidates after the best K are there to go on alone, not to finish.
    may_BC = (jnp.arange(2 * K) < K)[None, :]
    if config.brevity_alpha is not None:  # T5X lets all that have ended in
      may_BC |= token_BC == eos_id
    finished_BC = ended_BC & may_BC & s.open_B[:, None]
    if stop is True:
      finished_BC &= ~jnp.all(s.full_BK, axis=1, keepdims=True)
    ranked_BC = jnp.where(finished_BC, config.normalized(sum_BC, length), WORST)
    ranked = dataclasses.replace(candidates, scores_Bk=ranked_BC)
    merged = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), s.finished, ranked)
    _, best_BK = jax.lax.top_k(merged.scores_Bk, K)
    finished = pick(merged, best_BK)
    full_BK = pick(jnp.concatenate([s.full_BK, finished_BC], axis=1), best_BK)

    best_length = limit_B1.astype(float) if stop == 'never' and alpha > 0.0 else length
    # The rule of groups is that of transformers' older searches: an end is a hope too.
    hope_BK = config.normalized((running_BK if G == 1 else sum_BC)[:, :1], best_length)
    worst_BK = jnp.where(full_BK, jnp.min(finished.scores_Bk, axis=1, keepdims=True), WORST)
    open_B = s.open_B & jnp.any(hope_BK > worst_BK, axis=1) & (s.position + 1 < limit_B1[:, 0])
    last_R = pick(token_BC, at_BK).reshape(num_rows)
    cache = reorder(s.cache, pick(beam_BC, at_BK))
    return _State(s.position + 1, last_R, running, finished, full_BK, open_B, cache)

  def going(s: _State) -> jax.Array:
    more = jnp.any(s.open_B)
    return more & ~jnp.all(s.full_BK) if stop is True else more

  none = _Hypotheses(
    jnp.full((B, K, L), pad_id, jnp.int32),
    jnp.zeros((B, K, L), jnp.float32),
    jnp.full((B, K), WORST, jnp.float32),
  )
  state = _State(
    position=jnp.zeros((), jnp.int32),
    last_R=jnp.full((num_rows,), start_id, jnp.int32),
    # One beam at first, or all would be the same.
    running=dataclasses.replace(none, scores_Bk=none.scores_Bk.at[:, 0].set(0.0)),
    finished=none,
    full_BK=jnp.zeros((B, K), bool),
    open_B=jnp.ones((B,), bool),
    cache=cache,
  )
  found = loop.run(state, choose, step, L, prompt, grow, going=going, result=lambda s: s.finished)
  found = jax.tree.map(lambda x: x.reshape(-1, G * K, *x.shape[2:]), found)
  best = pick(found, jax.lax.top_k(found.scores_Bk, config.num_return_sequences)[1])
  return Decoded(best.tokens_BkL, best.scores_Bk, best.log_probs_BkL)
