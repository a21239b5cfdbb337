"""What changes the logits of the next token: a list of small pure functions.

Each takes (logits_RV, history) and returns logits_RV, with order and meaning of transformers'
(generation/logits_process.py), its reference. A user's own is put between the two groups.

Legend: R rows (inputs times beams or samples), V vocabulary, T decoder tokens, S sequences of n.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.decoding.automaton import Automaton
from t5x_lite.decoding.config import DecodingConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """What the decoder has read so far."""

  tokens_RT: jax.Array  # the start token, the prefix, the new tokens, then anything
  given_R: jax.Array  # how many of them were given: the start token and the prefix
  new: jax.Array  # how many tokens have been written after these, a scalar
  limit_R: jax.Array  # how many may be

  @property
  def length_R(self) -> jax.Array:  # noqa: N802
    """How many tokens there are in all."""
    return self.given_R + self.new


Processor = Callable[[jax.Array, History], jax.Array]


def make_processors(config: DecodingConfig, eos_id: int) -> list[Processor]:
  """Returns what greedy search, sampling and beam search share, in order."""
  found: list[Processor] = []

  def add(function: Callable[..., jax.Array], **settings) -> None:
    found.append(functools.partial(function, **settings))

  if config.repetition_penalty != 1.0:
    add(repetition_penalty, penalty=config.repetition_penalty)
  if config.frequency_penalty:
    add(frequency_penalty, penalty=config.frequency_penalty)
  if config.no_repeat_ngram_size:
    add(no_repeat_ngram, size=config.no_repeat_ngram_size)
  # Not the end of sequence, as transformers: min_new_tokens is for that.
  if single := tuple(i[0] for i in config.forbidden_tokens if len(i) == 1 and i != (eos_id,)):
    add(hide, tokens=single)
  for sequence in (i for i in config.forbidden_tokens if len(i) > 1):
    add(forbid, sequence=sequence)
  if config.min_new_tokens:
    add(hide_before, token=eos_id, position=config.min_new_tokens)
  if config.allowed_outputs:
    add(allow_only, outputs=tuple((*row, eos_id) for row in config.allowed_outputs))
  if config.automaton is not None:
    add(follow, automaton=config.automaton, eos_id=eos_id)
  for token, last in ((config.forced_bos_id, False), (config.forced_eos_id, True)):
    if token is not None:
      add(force, token=token, last=last)
  return found


def _hide(logits, hidden) -> jax.Array:
  return jnp.where(hidden, -jnp.inf, logits)


def filtered(logits_RV, temperature_R, config: DecodingConfig) -> jax.Array:
  """Returns what rows are sampled by, if their temperature is not 0: what no filter hides."""
  logits_RV = logits_RV / jnp.where(temperature_R > 0, temperature_R, 1.0)[:, None]
  filters: tuple[Any, ...] = (
    (top_k, config.top_k, 0),
    (top_p, config.top_p, 1.0),
    (min_p, config.min_p, 0.0),
    (typical, config.typical_p, 1.0),
    (epsilon, config.epsilon_cutoff, 0.0),
    (eta, config.eta_cutoff, 0.0),
  )
  for keep, value, off in filters:
    logits_RV = logits_RV if value == off else keep(logits_RV, value=value)
  return logits_RV


# ---- By what has been written ------------------------------------------------


def _rows(logits_RV) -> jax.Array:
  return jnp.arange(len(logits_RV))[:, None]


def _counts(logits_RV, history: History, first_R) -> jax.Array:
  """Returns how often each token stands at position first or later, [R, V]."""
  t_1T = jnp.arange(history.tokens_RT.shape[1])[None, :]
  valid_RT = (t_1T >= first_R[:, None]) & (t_1T < history.length_R[:, None])
  zeros_RV = jnp.zeros(logits_RV.shape, jnp.int32)
  return zeros_RV.at[_rows(logits_RV), history.tokens_RT].add(valid_RT.astype(jnp.int32))


def repetition_penalty(logits_RV, history: History, *, penalty: float) -> jax.Array:
  """Makes every token that was read less likely (Keskar et al. 2019)."""
  seen_RV = _counts(logits_RV, history, jnp.zeros_like(history.given_R)) > 0
  less_RV = jnp.where(logits_RV < 0, logits_RV * penalty, logits_RV / penalty)
  return jnp.where(seen_RV, less_RV, logits_RV)


def frequency_penalty(logits_RV, history: History, *, penalty: float) -> jax.Array:
  """Takes `penalty` from a logit for each time its token was written (OpenAI's)."""
  return logits_RV - penalty * _counts(logits_RV, history, history.given_R)


def no_repeat_ngram(logits_RV, history: History, *, size: int) -> jax.Array:
  """Hides what would complete an n-gram that was read already."""
  T = history.tokens_RT.shape[1]
  if size > T:
    return logits_RV
  length_R1 = history.length_R[:, None]
  match_RW = jnp.arange(size - 1, T)[None, :] < length_R1  # windows that are read whole
  for i in range(size - 1):
    at_R1 = jnp.maximum(length_R1 - (size - 1) + i, 0)
    last_R1 = jnp.take_along_axis(history.tokens_RT, at_R1, axis=1)
    match_RW &= history.tokens_RT[:, i : T - (size - 1) + i] == last_R1
  free_RV = jnp.zeros(logits_RV.shape, bool)
  banned_RV = free_RV.at[_rows(logits_RV), history.tokens_RT[:, size - 1 :]].max(match_RW)
  return _hide(logits_RV, banned_RV)


def hide(logits_RV, history: History, *, tokens: tuple[int, ...]) -> jax.Array:
  """Hides tokens everywhere."""
  return logits_RV.at[:, np.asarray(tokens)].set(-jnp.inf)


def forbid(logits_RV, history: History, *, sequence: tuple[int, ...]) -> jax.Array:
  """Hides the last token of a sequence where the others have been read."""
  *before, last = sequence
  n = len(before)
  start_R = history.length_R - n
  at_Rn = jnp.maximum(start_R[:, None] + jnp.arange(n)[None, :], 0)
  read_Rn = jnp.take_along_axis(history.tokens_RT, at_Rn, axis=1)
  follows_R = jnp.all(read_Rn == np.asarray([before], np.int32), axis=1) & (start_R >= 0)
  return logits_RV.at[:, last].set(_hide(logits_RV[:, last], follows_R))


def hide_before(logits_RV, history: History, *, token: int, position: int) -> jax.Array:
  """Hides a token until `position` new tokens are written."""
  return logits_RV.at[:, token].set(_hide(logits_RV[:, token], history.new < position))


def force(logits_RV, history: History, *, token: int, last: bool) -> jax.Array:
  """Leaves one token, for sure, as the first new one, or the last that may be."""
  forced_V = jnp.full(logits_RV.shape[1:], -jnp.inf).at[token].set(0.0)
  is_R = history.new == (history.limit_R - 1 if last else jnp.zeros_like(history.limit_R))
  return jnp.where(is_R[:, None], forced_V[None, :], logits_RV)


def allow_only(logits_RV, history: History, *, outputs: tuple[tuple[int, ...], ...]) -> jax.Array:
  """Leaves the tokens that continue one of the outputs: a trie, as one table."""
  n = max(map(len, outputs))
  # One column more: nothing continues an output that is whole.
  table_Sn = np.asarray([(*row, *[-1] * (n + 1 - len(row))) for row in outputs], np.int32)
  T = history.tokens_RT.shape[1]
  at_Rn = jnp.minimum(history.given_R[:, None] + jnp.arange(n)[None, :], T - 1)
  written_Rn = jnp.take_along_axis(history.tokens_RT, at_Rn, axis=1)
  later_n = jnp.arange(n) >= history.new
  same_RSn = (written_Rn[:, None] == table_Sn[None, :, :n]) | later_n[None, None, :]
  next_S = jnp.take(jnp.asarray(table_Sn), jnp.minimum(history.new, n), axis=1)
  open_RS = jnp.all(same_RSn, axis=-1) & (next_S >= 0)[None, :]
  allowed_RV = jnp.zeros(logits_RV.shape, bool).at[:, next_S].max(open_RS)
  # Rows whose output is whole already are over; leave them finite.
  return _hide(logits_RV, ~allowed_RV & jnp.any(open_RS, axis=1, keepdims=True))


def follow(logits_RV, history: History, *, automaton: Automaton, eos_id: int):
  """Leaves the tokens after which an automaton can still end within the limit, EOS too.

  The state is read anew from what was written: a few numbers a token, which no beam has to carry.
  """
  next_SC, left_S = jnp.asarray(automaton.next_SC), jnp.asarray(automaton.left_S)
  class_V = np.pad(automaton.class_V, (0, logits_RV.shape[1] - len(automaton.class_V)))

  def read(i, state_R):
    token_R1 = history.tokens_RT[_rows(logits_RV), (history.given_R + i)[:, None]]
    return next_SC[state_R, jnp.asarray(class_V)[token_R1[:, 0]]]

  state_R = jax.lax.fori_loop(0, history.new, read, jnp.zeros_like(history.given_R))
  allowed_RC = left_S[next_SC[state_R]] + history.new + 2 <= history.limit_R[:, None]
  allowed_RV = allowed_RC[:, class_V].at[:, eos_id].set(left_S[state_R] == 0)
  # Rows that have ended are over; leave them finite.
  return _hide(logits_RV, ~allowed_RV & jnp.any(allowed_RV, axis=1, keepdims=True))


def read_on(automaton: Automaton, state_R, token_R) -> jax.Array:
  """Returns the states of an automaton after one more token."""
  # An embedding may have more rows than the vocabulary ids.
  class_R = jnp.asarray(automaton.class_V).at[token_R].get(mode='fill', fill_value=0)
  return jnp.asarray(automaton.next_SC)[state_R, class_R]


def read_until(automaton: Automaton, tokens_RL, length_R) -> tuple[jax.Array, jax.Array]:
  """Returns how many of length_R tokens are read until an automaton ends, and the last state."""

  def read(i, carry):
    state_R, count_R = carry
    more_R = (i < length_R) & (jnp.asarray(automaton.left_S)[state_R] > 0)
    after_R = read_on(automaton, state_R, tokens_RL[:, i])
    return jnp.where(more_R, after_R, state_R), count_R + more_R

  zeros_R = jnp.zeros(tokens_RL.shape[:1], jnp.int32)
  state_R, count_R = jax.lax.fori_loop(0, jnp.max(length_R), read, (zeros_R, zeros_R))
  return count_R, state_R


# ---- By how likely it is: for sampling ---------------------------------------


def top_k(logits_RV, *, value: int) -> jax.Array:
  """Keeps the k likeliest tokens."""
  k = min(value, logits_RV.shape[-1])
  return _hide(logits_RV, logits_RV < jax.lax.top_k(logits_RV, k)[0][:, -1:])


def top_p(logits_RV, *, value: float) -> jax.Array:
  """Keeps the smallest set of likeliest tokens whose probability reaches p."""
  sorted_RV = jnp.sort(logits_RV, axis=-1, descending=True)
  probs_RV = jax.nn.softmax(sorted_RV, axis=-1)
  # A token stays if what is likelier than it has not reached p yet, so the likeliest always stays.
  before_RV = jnp.cumsum(probs_RV, axis=-1) - probs_RV
  least_R1 = jnp.min(jnp.where(before_RV < value, sorted_RV, jnp.inf), axis=-1, keepdims=True)
  return _hide(logits_RV, logits_RV < least_R1)


def min_p(logits_RV, *, value: float) -> jax.Array:
  """Keeps tokens of at least `value` times the largest probability."""
  least_R1 = jnp.max(logits_RV, axis=-1, keepdims=True) + np.log(value)
  return _hide(logits_RV, logits_RV < least_R1)


def _surprise(logits_RV) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns probabilities, their negative logarithms, and the entropy [R, 1]."""
  log_RV = jax.nn.log_softmax(logits_RV, axis=-1)
  probs_RV = jnp.exp(log_RV)
  terms_RV = jnp.where(probs_RV > 0, -probs_RV * log_RV, 0.0)
  return probs_RV, -log_RV, jnp.sum(terms_RV, axis=-1, keepdims=True)


def typical(logits_RV, *, value: float) -> jax.Array:
  """Keeps the smallest set of tokens nearest to the entropy that reaches p."""
  probs_RV, surprise_RV, entropy_R1 = _surprise(logits_RV)
  odd_RV = jnp.abs(surprise_RV - entropy_R1)
  order_RV = jnp.argsort(odd_RV, axis=-1)
  total_RV = jnp.cumsum(jnp.take_along_axis(probs_RV, order_RV, axis=-1), axis=-1)
  count_R1 = jnp.sum(total_RV < value, axis=-1, keepdims=True)
  last_R1 = jnp.take_along_axis(order_RV, jnp.minimum(count_R1, total_RV.shape[-1] - 1), axis=-1)
  return _hide(logits_RV, odd_RV > jnp.take_along_axis(odd_RV, last_R1, axis=-1))


def _hide_unlikely(logits_RV, probs_RV, least) -> jax.Array:
  likeliest_RV = logits_RV >= jnp.max(logits_RV, axis=-1, keepdims=True)
  return _hide(logits_RV, (probs_RV < least) & ~likeliest_RV)


def epsilon(logits_RV, *, value: float) -> jax.Array:
  """Keeps tokens of at least this probability, and the likeliest."""
  return _hide_unlikely(logits_RV, jax.nn.softmax(logits_RV, axis=-1), value)


def eta(logits_RV, *, value: float) -> jax.Array:
  """Likewise, with min(value, sqrt(value) * exp(-entropy))."""
  probs_RV, _, entropy_R1 = _surprise(logits_RV)
  least_R1 = jnp.minimum(value, np.sqrt(value) * jnp.exp(-entropy_R1))
  return _hide_unlikely(logits_RV, probs_RV, least_R1)
