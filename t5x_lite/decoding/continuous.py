"""Continuous batching: rows that have ended give their place to waiting ones.

A fixed number of slots decodes in one compiled loop, `chunk` tokens at a time. Between chunks the
host reads what is there, empties slots that have ended and puts waiting inputs into them, so that a
short output does not wait for a long one (Yu et al. 2022, Orca, section 4). A row gets what it
would get alone: its temperature, bounds and random numbers are its own, and depend on no neighbour.

Legend: S slots, B rows put in at once, M encoder length, L decoded length, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite.decoding import prediction
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.blocks import Cache
from t5x_lite.models.config import T5Config
from t5x_lite.parallel.placement import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One input, and how its output is chosen.

  Attributes:
    tokens: of the input, EOS included if the model expects it.
    max_new_tokens: EOS included; None for as many as there is room for.
    temperature: 0 is greedy.
    top_k: sample among the k likeliest tokens; 0 means all.
    top_p: sample among the fewest tokens whose probability reaches p, after top_k; 1 means all.
    seed: of this row's sampling.
  """

  tokens: Sequence[int]
  max_new_tokens: int | None = None
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Output:
  """What a slot has decoded so far.

  Attributes:
    tokens: ids, without EOS.
    log_probs: natural logarithm of each token's probability, that of EOS last if the row ended with
      it.
    ended: 'eos', 'length', or '' while it goes on.
  """

  tokens: list[int]
  log_probs: list[float]
  ended: str = ''


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
  """All slots' state; `length_S` is how many tokens a slot has decoded."""

  last_S: jax.Array
  length_S: jax.Array
  tokens_SL: jax.Array
  log_probs_SL: jax.Array
  going_S: jax.Array  # holds a row that has not ended
  limit_S: jax.Array
  temperature_S: jax.Array
  top_k_S: jax.Array
  top_p_S: jax.Array
  seed_S: jax.Array
  cache: Cache


class ContinuousBatch:
  """Slots that decode together, each for a request of its own."""

  def __init__(
    self,
    model: T5Config,
    params: Any,
    *,
    placement: Placement,
    num_slots: int = 8,
    max_decode_length: int = 256,
    chunk: int = 8,
  ):
    """Compiles nothing yet.

    Args:
      model: must have an encoder and a decoder.
      params: on the placement; see `model_sharding.inference_params`.
      placement: where it runs; one process.
      num_slots: S, rows decoded at a time.
      max_decode_length: most tokens an output.
      chunk: tokens decoded between two looks at the slots.
    """
    if model.architecture != 'encoder_decoder':
      raise UsageError(
        f'architecture={model.architecture!r} cannot be decoded continuously; it takes '
        "'encoder_decoder'"
      )
    for name, value in (('num_slots', num_slots), ('max_decode_length', max_decode_length)):
      if value < 1:
        raise UsageError(f'{name} is {value}; it must be at least 1')
    self.model, self.params, self.placement = model, params, placement
    self.max_decode_length, self._num_slots = max_decode_length, num_slots
    self._width = prediction.SHORTEST
    self._tickets = itertools.count()
    self._rows: list[int | None] = [None]  # the ticket of the request in each row
    graphdef, _, _ = t5.abstract_params(model)
    self._insert = jax.jit(functools.partial(_insert, graphdef), donate_argnums=1)
    self._advance = jax.jit(functools.partial(_advance, graphdef, chunk), donate_argnums=1)
    self._slots = _empty(model, 1, self._width, max_decode_length)

  @property
  def num_free(self) -> int:
    """Requests that there is room for."""
    return self._num_slots - self._num_held

  @property
  def _num_held(self) -> int:
    return len(self._rows) - self._rows.count(None)

  def _resize(self, num_rows: int) -> None:
    """Makes room for so many rows, or gives up room: an empty row costs as much as a full one."""
    size = prediction.padded_length(max(num_rows, 1), shortest=1)
    if size == len(self._rows):
      return
    kept = [row for row, ticket in enumerate(self._rows) if ticket is not None]
    order = np.asarray(kept + [0] * (size - len(kept)), np.int32)
    with self.placement.active():
      self._slots = _taken(self._slots, order, len(kept))
    self._rows = [*(self._rows[row] for row in kept), *[None] * (size - len(kept))]

  def add(self, requests: Sequence[Request]) -> list[int]:
    """Puts requests into free slots and returns a ticket for each; see `num_free`."""
    assert 0 < len(requests) <= self.num_free, (len(requests), self.num_free)
    self._resize(self._num_held + len(requests))
    free = [row for row, ticket in enumerate(self._rows) if ticket is None][: len(requests)]
    width = prediction.padded_length(max(len(r.tokens) for r in requests))
    if width > self._width:
      wide = _widened(self._slots.cache, width + (self.model.prompt_length or 0))
      self._slots = dataclasses.replace(self._slots, cache=wide)
      self._width = width
    # Rows past the last repeat the first: it is written twice, with the same.
    size = prediction.padded_length(len(requests), shortest=1)
    rows = [*requests, *[requests[0]] * (size - len(requests))]
    tokens_BM = prediction.pad_rows(
      [r.tokens for r in rows], batch_size=size, length=width, pad_id=self.model.pad_id
    )
    most = self.max_decode_length
    with self.placement.active():
      self._slots = self._insert(
        self.params,
        self._slots,
        np.asarray([*free, *[free[0]] * (size - len(free))], np.int32),
        tokens_BM,
        np.asarray([min(r.max_new_tokens or most, most) for r in rows], np.int32),
        np.asarray([r.temperature for r in rows], np.float32),
        np.asarray([r.top_k or self.model.vocab_size for r in rows], np.int32),
        np.asarray([r.top_p for r in rows], np.float32),
        np.asarray([r.seed % 2**32 for r in rows], np.uint32),
      )
    tickets = [next(self._tickets) for _ in free]
    for row, ticket in zip(free, tickets, strict=True):
      self._rows[row] = ticket
    return tickets

  def advance(self) -> dict[int, Output]:
    """Decodes a chunk; returns every request's output by ticket, and frees the ended."""
    self._resize(self._num_held)
    with self.placement.active():
      self._slots = self._advance(self.params, self._slots)
    s = self._slots
    tokens_SL, log_probs_SL, going_S, length_S = jax.device_get(
      (s.tokens_SL, s.log_probs_SL, s.going_S, s.length_S)
    )
    outputs = {}
    for row, ticket in enumerate(self._rows):
      if ticket is None:
        continue
      tokens = tokens_SL[row, : length_S[row]].tolist()
      log_probs = log_probs_SL[row, : length_S[row]].tolist()
      ended = '' if going_S[row] else 'length'
      if tokens and tokens[-1] == self.model.eos_id:
        tokens.pop()
        ended = 'eos'
      outputs[ticket] = Output(tokens, log_probs, ended)
      if ended:
        self._rows[row] = None
    return outputs

  def drop(self, tickets: Iterable[int]) -> None:
    """Frees the slots of requests whose outputs nobody waits for any more."""
    for ticket in tickets:
      row = self._rows.index(ticket)
      self._rows[row] = None
      going_S = self._slots.going_S.at[row].set(False)
      self._slots = dataclasses.replace(self._slots, going_S=going_S)

  def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
    """Yields (index, output) of every request, in the order in which they end."""
    waiting = enumerate(requests)
    running: dict[int, int] = {}
    while True:
      new = list(itertools.islice(waiting, self.num_free))
      if new:
        tickets = self.add([request for _, request in new])
        running.update(zip(tickets, (index for index, _ in new), strict=True))
      if not running:
        return
      for ticket, output in self.advance().items():
        if output.ended:
          yield running.pop(ticket), output


def _empty(cfg: T5Config, S: int, M: int, L: int) -> _Slots:
  """Returns slots that hold nothing."""
  N, heads = cfg.num_decoder_layers, (cfg.num_heads, cfg.head_dim)
  M += cfg.prompt_length or 0

  def zeros(length):  # of their own: they are donated
    return jnp.zeros((N, S, length, *heads), cfg.dtype)

  # An empty slot decodes along, and needs a key to look at.
  cross_mask = jnp.broadcast_to(jnp.arange(M) == 0, (S, 1, 1, M))
  return _Slots(
    last_S=jnp.zeros((S,), jnp.int32),
    length_S=jnp.zeros((S,), jnp.int32),
    tokens_SL=jnp.full((S, L), cfg.pad_id, jnp.int32),
    log_probs_SL=jnp.zeros((S, L), jnp.float32),
    going_S=jnp.zeros((S,), bool),
    limit_S=jnp.ones((S,), jnp.int32),
    temperature_S=jnp.zeros((S,), jnp.float32),
    top_k_S=jnp.ones((S,), jnp.int32),
    top_p_S=jnp.ones((S,), jnp.float32),
    seed_S=jnp.zeros((S,), jnp.uint32),
    cache=Cache(
      zeros(L),
      zeros(L),
      zeros(M),
      zeros(M),
      cross_mask,
      index=jnp.zeros((), jnp.int32),
      seen_B=jnp.zeros((S,), jnp.int32),
    ),
  )


@jax.jit
def _taken(slots: _Slots, order_S, count) -> _Slots:
  """Returns the rows of order_S, of which the first `count` go on."""

  def take(path, x):
    if x.ndim == 0:  # the index of the ring, which all share
      return x
    return jnp.take(x, order_S, axis=1 if path[-1].name.split('_')[-1].startswith('NB') else 0)

  taken = jax.tree_util.tree_map_with_path(take, slots)
  going_S = taken.going_S & (jnp.arange(len(order_S)) < count)
  return dataclasses.replace(taken, going_S=going_S)


def _widened(cache: Cache, M: int) -> Cache:
  """Returns the cache with room for inputs of M tokens."""
  assert cache.cross_key_NBMHK is not None and cache.cross_value_NBMHK is not None
  assert cache.cross_mask_B11M is not None
  more = M - cache.cross_key_NBMHK.shape[2]
  pad = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
  return dataclasses.replace(
    cache,
    cross_key_NBMHK=jnp.pad(cache.cross_key_NBMHK, pad),
    cross_value_NBMHK=jnp.pad(cache.cross_value_NBMHK, pad),
    cross_mask_B11M=jnp.pad(cache.cross_mask_B11M, ((0, 0), (0, 0), (0, 0), (0, more))),
  )


def _insert(
  graphdef, params, slots, slots_B, tokens_BM, limit_B, temperature_B, top_k_B, top_p_B, seed_B
) -> _Slots:
  """Encodes inputs and makes slots_B theirs."""
  model = nnx.merge(graphdef, params)
  new = model.init_cache(
    model.encode(tokens_BM), tokens_BM, batch_size=tokens_BM.shape[0], max_decode_length=1
  )
  old = slots.cache
  more = old.cross_key_NBMHK.shape[2] - new.cross_key_NBMHK.shape[2]
  pad = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
  cache = dataclasses.replace(
    old,
    cross_key_NBMHK=old.cross_key_NBMHK.at[:, slots_B].set(jnp.pad(new.cross_key_NBMHK, pad)),
    cross_value_NBMHK=old.cross_value_NBMHK.at[:, slots_B].set(jnp.pad(new.cross_value_NBMHK, pad)),
    cross_mask_B11M=old.cross_mask_B11M.at[slots_B].set(
      jnp.pad(new.cross_mask_B11M, ((0, 0), (0, 0), (0, 0), (0, more)))
    ),
    seen_B=old.seen_B.at[slots_B].set(0),  # what was decoded before is never seen
  )
  return _Slots(
    last_S=slots.last_S.at[slots_B].set(model.cfg.decoder_start_id),
    length_S=slots.length_S.at[slots_B].set(0),
    tokens_SL=slots.tokens_SL.at[slots_B].set(model.cfg.pad_id),
    log_probs_SL=slots.log_probs_SL.at[slots_B].set(0.0),
    going_S=slots.going_S.at[slots_B].set(True),
    limit_S=slots.limit_S.at[slots_B].set(limit_B),
    temperature_S=slots.temperature_S.at[slots_B].set(temperature_B),
    top_k_S=slots.top_k_S.at[slots_B].set(top_k_B),
    top_p_S=slots.top_p_S.at[slots_B].set(top_p_B),
    seed_S=slots.seed_S.at[slots_B].set(seed_B),
    cache=cache,
  )


def _advance(graphdef, chunk: int, params, slots: _Slots) -> _Slots:
  """Decodes at most `chunk` tokens of every slot that goes on."""
  model = nnx.merge(graphdef, params)
  rows_S = jnp.arange(slots.last_S.shape[0])

  def body(carry):
    i, s = carry
    logits_SV, cache = model.decode_step(s.last_S, s.cache)
    next_S = _choose(logits_SV, s)
    log_prob_S = jnp.take_along_axis(logits_SV, next_S[:, None], axis=1)[:, 0]
    log_prob_S -= jax.nn.logsumexp(logits_SV, axis=-1)
    length_S = jnp.where(s.going_S, s.length_S + 1, s.length_S)
    # Out of bounds for slots that have ended, which drops the write.
    at_S = jnp.where(s.going_S, s.length_S, s.tokens_SL.shape[1])
    return i + 1, dataclasses.replace(
      s,
      last_S=jnp.where(s.going_S, next_S, s.last_S),
      length_S=length_S,
      tokens_SL=s.tokens_SL.at[rows_S, at_S].set(next_S, mode='drop'),
      log_probs_SL=s.log_probs_SL.at[rows_S, at_S].set(log_prob_S, mode='drop'),
      going_S=s.going_S & (next_S != model.cfg.eos_id) & (length_S < s.limit_S),
      cache=cache,
    )

  def unfinished(carry):
    i, s = carry
    return (i < chunk) & jnp.any(s.going_S)

  return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), slots))[1]


def _choose(logits_SV, s: _Slots) -> jax.Array:
  """Returns each slot's next token by its own settings."""
  greedy_S = jnp.argmax(logits_SV, axis=-1).astype(jnp.int32)

  def sample(_):
    scaled_SV = logits_SV / jnp.where(s.temperature_S > 0, s.temperature_S, 1.0)[:, None]
    order_SV = jnp.argsort(-scaled_SV, axis=-1)
    sorted_SV = jnp.take_along_axis(scaled_SV, order_SV, axis=-1)
    rank_V = jnp.arange(sorted_SV.shape[-1])
    sorted_SV = jnp.where(rank_V[None, :] < s.top_k_S[:, None], sorted_SV, -jnp.inf)
    probs_SV = jax.nn.softmax(sorted_SV, axis=-1)
    before_SV = jnp.cumsum(probs_SV, axis=-1) - probs_SV
    sorted_SV = jnp.where(before_SV < s.top_p_S[:, None], sorted_SV, -jnp.inf)
    # Seed and position alone: no neighbour changes what is drawn.
    keys_S = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(
      s.seed_S, s.length_S
    )
    rank_S = jax.vmap(jax.random.categorical)(keys_S, sorted_SV)
    drawn_S = jnp.take_along_axis(order_SV, rank_S[:, None], axis=1)[:, 0].astype(jnp.int32)
    return jnp.where(s.temperature_S > 0, drawn_S, greedy_S)

  return jax.lax.cond(jnp.any((s.temperature_S > 0) & s.going_S), sample, lambda _: greedy_S, None)
