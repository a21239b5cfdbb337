"""Beam search over any step(tokens_R, cache), with the semantics of transformers.

The running beams of an input go on until its finished ones cannot be bettered; twice as many
continuations as beams are looked at, so that enough of them have not ended. Candidates are ranked
by `DecodingConfig.normalized`; with brevity_alpha and early_stopping='never' the rule to stop is
T5X's (t5x/decoding.py:1131), which alone differs in that it returns a hypothesis cut at the length
limit only where none has ended.

Nothing of the cache is moved: `reorder` is told which row each beam continues.

Legend: B inputs, K beams, C = 2 K candidates, R = B K rows, L new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.decoding import loop, processors
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.loop import Decoded, Prompt, StepFn

# Of what is no candidate; finite, so that sums and comparisons stay defined.
WORST = -1e9
# Scores whose maximum is looked at first.
SEGMENT = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Hypotheses:
  """Some hypotheses of each input; k of them.

  Attributes:
    tokens_BkL: ids, then pad_id.
    log_probs_BkL: of each token; 0 where there is none.
    scores_Bk: sums of log-probabilities while running, normalised once finished.
  """

  tokens_BkL: jax.Array
  log_probs_BkL: jax.Array
  scores_Bk: jax.Array

  def pick(self, at_Bk) -> '_Hypotheses':
    """Returns those at the given places."""
    return jax.tree.map(lambda x: _pick(x, at_Bk), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """The loop's state.

  Attributes:
    position: int32, tokens decoded so far.
    last_R: the token fed next.
    running: K hypotheses, best first.
    finished: K hypotheses, best first.
    full_BK: whether there is a finished one.
    open_B: inputs whose finished hypotheses can still be bettered.
    cache: the model's.
  """

  position: jax.Array
  last_R: jax.Array
  running: _Hypotheses
  finished: _Hypotheses
  full_BK: jax.Array
  open_B: jax.Array
  cache: Any


def _pick(x, at_Bk):
  index = at_Bk.reshape(at_Bk.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


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
    few_BF = _pick(segments_BGS, which_BC).reshape(B, count * SEGMENT)
    best_BC, at_BC = jax.lax.top_k(few_BF, count)
    segment_BC = jnp.take_along_axis(which_BC, at_BC // SEGMENT, axis=1)
    at_BC = segment_BC * SEGMENT + at_BC % SEGMENT
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
  prompt: Prompt | None = None,
  extra: Sequence[processors.Processor] = (),
  grow: Callable[[Any, int], Any] | None = None,
) -> Decoded:
  """Returns the num_return_sequences best hypotheses, best first.

  Args:
    step: feeds one token a row; returns float32 logits of the next.
    cache: what step needs.
    num_rows: R, the beams of an input together.
    config: how tokens are chosen and hypotheses ranked.
    start_id: fed first.
    eos_id: ends a hypothesis; it is part of the output.
    pad_id: fills an output after its end.
    reorder: (cache, parents_BK) -> cache, where beam k of an input goes on from what its row
      parents_BK[k] has read.
    prompt: what the cache holds already.
    extra: processors that are applied after the config's.
    grow: see `loop.run`.
  """
  L, K = config.length, config.num_beams
  B = num_rows // K
  chain = [*processors.make_processors(config, eos_id), *extra]
  stop = config.early_stopping
  favours_length = (config.brevity_alpha or 0.0) > 0.0 or (
    config.brevity_alpha is None and config.length_penalty > 0.0
  )

  def choose(s: _State, logits_RV) -> _State:
    new_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    tokens_RL = s.running.tokens_BkL.reshape(num_rows, L)
    new_RV = loop.processed(chain, new_RV, prompt, start_id, tokens_RL, s.position)
    sums_BKV = new_RV.reshape(B, K, -1) + s.running.scores_Bk[:, :, None]
    sum_BC, beam_BC, token_BC = _best(sums_BKV, 2 * K)
    parents = s.running.pick(beam_BC)
    candidates = _Hypotheses(
      parents.tokens_BkL.at[:, :, s.position].set(token_BC),
      parents.log_probs_BkL.at[:, :, s.position].set(sum_BC - parents.scores_Bk),
      sum_BC,
    )
    length = (s.position + 1).astype(jnp.float32)
    ended_BC = (token_BC == eos_id) | (s.position + 1 >= L)

    running_BC = jnp.where(ended_BC, sum_BC + WORST, sum_BC)
    running_BK, at_BK = jax.lax.top_k(running_BC, K)
    running = dataclasses.replace(candidates.pick(at_BK), scores_Bk=running_BK)

    # Candidates after the best K are there to go on alone, not to finish.
    finished_BC = ended_BC & (jnp.arange(2 * K) < K)[None, :] & s.open_B[:, None]
    if stop is True:
      finished_BC &= ~jnp.all(s.full_BK, axis=1, keepdims=True)
    ranked_BC = jnp.where(finished_BC, config.normalized(sum_BC, length), WORST)
    merged = jax.tree.map(
      lambda a, b: jnp.concatenate([a, b], axis=1),
      s.finished,
      dataclasses.replace(candidates, scores_Bk=ranked_BC),
    )
    _, best_BK = jax.lax.top_k(merged.scores_Bk, K)
    finished = merged.pick(best_BK)
    full_BK = _pick(jnp.concatenate([s.full_BK, finished_BC], axis=1), best_BK)

    best_length = float(L) if stop == 'never' and favours_length else length
    hope_BK = config.normalized(running_BK[:, :1], best_length)
    worst_BK = jnp.where(full_BK, jnp.min(finished.scores_Bk, axis=1, keepdims=True), WORST)
    open_B = s.open_B & jnp.any(hope_BK > worst_BK, axis=1)
    return _State(
      position=s.position + 1,
      last_R=_pick(token_BC, at_BK).reshape(num_rows),
      running=running,
      finished=finished,
      full_BK=full_BK,
      open_B=open_B,
      cache=reorder(s.cache, _pick(beam_BC, at_BK)),
    )

  def advance(s: _State) -> _State:
    logits_RV, cache = step(s.last_R, s.cache)
    return choose(dataclasses.replace(s, cache=cache), logits_RV)

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
  if prompt is not None:
    state = choose(state, prompt.logits_RV)
  found = loop.run(
    state, length=L, going=going, advance=advance, result=lambda s: s.finished, grow=grow
  )
  best = jax.tree.map(lambda x: x[:, : config.num_return_sequences], found)
  return Decoded(best.tokens_BkL, best.scores_Bk, best.log_probs_BkL)
