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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite.decoding import loop, prediction, processors
from t5x_lite.decoding.automaton import Automaton
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.prediction import Output
from t5x_lite.errors import UsageError, check_positive
from t5x_lite.models import t5
from t5x_lite.models.blocks import Cache
from t5x_lite.models.config import T5Config
from t5x_lite.parallel.placement import Placement

WINDOW = 8  # batches whose rows should be decoded together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One input, and how its output is chosen."""

  tokens: Sequence[int]  # of the input, EOS included if the model expects it
  max_new_tokens: int | None = None  # EOS included; None for as many as there is room for
  temperature: float = 0.0  # 0 is greedy
  top_k: int = 0  # sample among the k likeliest tokens; 0 means all
  # Sample among the fewest tokens whose probability reaches p, after top_k; 1 means all.
  top_p: float = 1.0
  seed: int = 0  # of this row's sampling, folded into the batch's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
  """All slots' state."""

  last_S: jax.Array
  length_S: jax.Array  # tokens decoded
  tokens_SL: jax.Array
  log_probs_SL: jax.Array
  going_S: jax.Array  # holds a row that has not ended
  stop_S: jax.Array  # where the stopper is
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
    seed: int = 0,
    fixed: bool = False,
    stopper: Automaton | None = None,
  ):
    """Compiles nothing yet.

    The model has an encoder and a decoder; parameters, which may be given later, are on the
    placement, as `model_sharding.inference_params` says. num_slots rows decode at a time, `chunk`
    tokens between two looks at them; fixed says that there are always so many, and fewer compiles.
    The stopper is a `DecodingConfig`'s.
    """
    if model.architecture != 'encoder_decoder':
      what = f'architecture={model.architecture!r} cannot be decoded continuously'
      raise UsageError(f"{what}; it takes 'encoder_decoder'")
    check_positive('num_slots', num_slots)
    check_positive('max_decode_length', max_decode_length)
    self.model, self.params, self.placement = model, params, placement
    self.max_decode_length, self._num_slots = max_decode_length, num_slots
    self._key = jax.random.key(seed % 2**32)
    self._least = num_slots if fixed else 1
    self._width, self._tickets = prediction.SHORTEST, itertools.count()
    self._rows: list[int | None] = [None]  # the ticket of the request in each row
    graphdef, _, _ = t5.abstract_params(model)
    self._insert = jax.jit(functools.partial(_insert, graphdef), donate_argnums=1)
    self._advance = jax.jit(functools.partial(_advance, graphdef, chunk, stopper), donate_argnums=1)
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
    size = prediction.padded_length(num_rows, shortest=self._least)
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
      wide = self._slots.cache.widened(width + (self.model.prompt_length or 0))
      self._slots, self._width = dataclasses.replace(self._slots, cache=wide), width
    # Rows past the last repeat the first: it is written twice, with the same.
    size = prediction.padded_length(len(requests), shortest=-(-self._least // 4))
    missing = size - len(requests)
    rows = [*requests, *[requests[0]] * missing]
    tokens, pad_id = [r.tokens for r in rows], self.model.pad_id
    tokens_BM = prediction.pad_rows(tokens, batch_size=size, length=width, pad_id=pad_id)
    most, V = self.max_decode_length, self.model.vocab_size
    with self.placement.active():
      self._slots = self._insert(
        self.params,
        self._slots,
        np.asarray([*free, *[free[0]] * missing], np.int32),
        tokens_BM,
        limit_S=np.asarray([min(r.max_new_tokens or most, most) for r in rows], np.int32),
        temperature_S=np.asarray([r.temperature for r in rows], np.float32),
        top_k_S=np.asarray([min(r.top_k or V, V) for r in rows], np.int32),
        top_p_S=np.asarray([r.top_p for r in rows], np.float32),
        seed_S=np.asarray([r.seed % 2**32 for r in rows], np.uint32),
      )
    tickets = [next(self._tickets) for _ in free]
    for row, ticket in zip(free, tickets, strict=True):
      self._rows[row] = ticket
    return tickets

  def advance(self) -> dict[int, Output]:
    """Decodes a chunk; returns what every request has so far by ticket, and frees the ended."""
    self._resize(self._num_held)
    with self.placement.active():
      self._slots = self._advance(self.params, self._slots, self._key)
    s = self._slots
    fields = s.tokens_SL, s.log_probs_SL, s.going_S, s.length_S
    tokens_SL, log_probs_SL, going_S, length_S = jax.device_get(fields)
    outputs = {}
    for row, ticket in enumerate(self._rows):
      if ticket is None:
        continue
      tokens, log_probs = (x[row, : length_S[row]].tolist() for x in (tokens_SL, log_probs_SL))
      ended = '' if going_S[row] else 'length'
      if tokens and tokens[-1] == self.model.eos_id:
        tokens.pop()
        ended = 'eos'
      while ended == 'length' and tokens and tokens[-1] == self.model.pad_id:
        tokens.pop()  # as a Predictor's
      outputs[ticket] = Output(tokens, sum(log_probs), log_probs, ended)
      if ended:
        self._rows[row] = None
    return outputs

  def reset(self) -> None:
    """Frees all slots, whatever state an error left them in."""
    self._rows = [None]
    self._slots = _empty(self.model, 1, self._width, self.max_decode_length)

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
      most = self.num_free if 4 * self.num_free >= self._num_slots else 0  # few at once pay little
      if new := list(itertools.islice(waiting, most)):
        indices, added = zip(*new, strict=True)
        running.update(zip(self.add(added), indices, strict=True))
      if not running:
        return
      for ticket, output in self.advance().items():
        if output.ended:
          yield running.pop(ticket), output


def _empty(cfg: T5Config, S: int, M: int, L: int) -> _Slots:
  """Returns slots that hold nothing."""
  M += cfg.prompt_length or 0
  shape, K = (cfg.num_decoder_layers, S, cfg.num_heads), cfg.head_dim
  # Arrays of their own: they are donated.
  arrays = (jnp.zeros((*shape, rest, K), cfg.dtype) for rest in (L, L, M, M))
  k, v, cross_k, cross_v = (t5.per_layer(cfg, x) for x in arrays)
  # An empty slot decodes along, and needs a key to look at.
  cross_mask = jnp.broadcast_to(jnp.arange(M) == 0, (S, 1, 1, M))
  seen, index = jnp.zeros((S,), jnp.int32), jnp.zeros((), jnp.int32)
  numbers = {'last': 0, 'length': 0, 'going': False, 'stop': 0, 'limit': 1}
  numbers |= {'temperature': 0.0, 'top_k': 1, 'top_p': 1.0}
  return _Slots(
    **{f'{name}_S': jnp.full((S,), value) for name, value in numbers.items()},
    tokens_SL=jnp.full((S, L), cfg.pad_id, jnp.int32),
    log_probs_SL=jnp.zeros((S, L), jnp.float32),
    seed_S=jnp.zeros((S,), jnp.uint32),
    cache=Cache(k, v, cross_k, cross_v, cross_mask, index, seen_B=seen),
  )


@jax.jit
def _taken(slots: _Slots, order_S, count) -> _Slots:
  """Returns the rows of order_S, of which the first `count` go on."""

  def take(path, x):
    if x.ndim == 0:  # the index of the ring, which all share
      return x
    name = next(key.name for key in reversed(path) if hasattr(key, 'name'))
    dims = name.split('_')[-1].removeprefix('N')  # layers may be a list
    return jnp.take(x, order_S, axis=x.ndim - len(dims))

  taken = jax.tree_util.tree_map_with_path(take, slots)
  going_S = taken.going_S & (jnp.arange(len(order_S)) < count)
  return dataclasses.replace(taken, going_S=going_S)


def _insert(graphdef, params, slots, slots_B, tokens_BM, **settings_B) -> _Slots:
  """Encodes inputs and makes slots_B theirs; the settings are fields of _Slots."""
  model, old = nnx.merge(graphdef, params), slots.cache
  encoded_BMD, sizes = model.encode(tokens_BM), {'batch_size': len(slots_B), 'max_decode_length': 1}
  new = model.init_cache(encoded_BMD, tokens_BM, **sizes).widened(old.cross_mask_B11M.shape[-1])

  def put(name: str):
    each = getattr(old, name), getattr(new, name)
    return jax.tree.map(lambda x, y: x.at[..., slots_B, :, :, :].set(y), *each)

  cache = dataclasses.replace(
    old,
    **{name: put(name) for name in ('cross_key_NBHMK', 'cross_value_NBHMK', 'cross_mask_B11M')},
    seen_B=old.seen_B.at[slots_B].set(0),  # what was decoded before is never seen
  )
  rows = {
    'last_S': model.cfg.decoder_start_id,
    'length_S': 0,
    'tokens_SL': model.cfg.pad_id,
    'log_probs_SL': 0.0,
    'going_S': True,
    'stop_S': 0,
    **settings_B,
  }
  fields = {name: getattr(slots, name).at[slots_B].set(value) for name, value in rows.items()}
  return _Slots(**fields, cache=cache)


def _advance(graphdef, chunk: int, stopper: Automaton | None, params, slots: _Slots, key) -> _Slots:
  """Decodes at most `chunk` tokens of every slot that goes on."""
  model = nnx.merge(graphdef, params)
  rows_S = jnp.arange(slots.last_S.shape[0])

  def body(carry):
    i, s = carry
    logits_SV, cache = model.decode_step(s.last_S, s.cache)
    next_S = _choose(logits_SV, s, key)
    log_prob_S = loop.log_prob(logits_SV, next_S)
    length_S = jnp.where(s.going_S, s.length_S + 1, s.length_S)
    # Out of bounds for slots that have ended, which drops the write.
    at_S = jnp.where(s.going_S, s.length_S, s.tokens_SL.shape[1])
    going_S = s.going_S & (next_S != model.cfg.eos_id) & (length_S < s.limit_S)
    stop_S = s.stop_S
    if stopper is not None:
      stop_S = processors.read_on(stopper, stop_S, next_S)
      going_S &= jnp.asarray(stopper.left_S)[stop_S] > 0
    return i + 1, dataclasses.replace(
      s,
      last_S=jnp.where(s.going_S, next_S, s.last_S),
      length_S=length_S,
      tokens_SL=s.tokens_SL.at[rows_S, at_S].set(next_S, mode='drop'),
      log_probs_SL=s.log_probs_SL.at[rows_S, at_S].set(log_prob_S, mode='drop'),
      going_S=going_S,
      stop_S=stop_S,
      cache=cache,
    )

  first = (jnp.zeros((), jnp.int32), slots)
  return jax.lax.while_loop(lambda c: (c[0] < chunk) & jnp.any(c[1].going_S), body, first)[1]


def _choose(logits_SV, s: _Slots, key) -> jax.Array:
  """Returns each slot's next token by its own settings; what is drawn, a Predictor would draw."""
  greedy_S = loop.likeliest(logits_SV)

  def sample(_):
    scaled_SV = logits_SV / jnp.where(s.temperature_S > 0, s.temperature_S, 1.0)[:, None]
    sorted_SV = jnp.sort(scaled_SV, axis=-1, descending=True)
    kept_SV = sorted_SV >= jnp.take_along_axis(sorted_SV, s.top_k_S[:, None] - 1, axis=-1)
    probs_SV = jax.nn.softmax(jnp.where(kept_SV, sorted_SV, -jnp.inf), axis=-1)
    before_SV, p_S1 = jnp.cumsum(probs_SV, axis=-1) - probs_SV, s.top_p_S[:, None]
    kept_SV &= (before_SV < p_S1) | (p_S1 == 1)  # sums of all round to more than 1
    least_S1 = jnp.min(jnp.where(kept_SV, sorted_SV, jnp.inf), axis=-1, keepdims=True)
    # Seed and position alone: no neighbour changes what is drawn. The 0 is of the first sample.
    of_row = jax.vmap(jax.random.fold_in, (None, 0))(key, s.seed_S)
    of_row = jax.vmap(jax.random.fold_in, (0, None))(of_row, 0)
    keys_S = jax.vmap(jax.random.fold_in)(of_row, s.length_S)
    filtered_SV = jnp.where(scaled_SV < least_S1, -jnp.inf, scaled_SV)
    drawn_S = jax.vmap(jax.random.categorical)(keys_S, filtered_SV).astype(jnp.int32)
    return jnp.where(s.temperature_S > 0, drawn_S, greedy_S)

  return jax.lax.cond(jnp.any((s.temperature_S > 0) & s.going_S), sample, lambda _: greedy_S, None)


def in_batches(
  call: Callable[[Sequence[int]], Sequence[Any]], rows: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[int, Any]]:
  """Yields (index, result) of each row, where `call` returns those of at most `size` indices.

  Rows of about one length go together, padded little; the longest first, if memory is short.
  """
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
  for start in range(0, len(order), size):
    part = order[start : start + size]
    yield from zip(part, call(part), strict=True)


class RowDecoder:
  """Decodes any number of inputs by a predictor, in batches or in slots: a row gets the same."""

  def __init__(
    self, predictor: prediction.Predictor, *, continuous: bool = False, prefix: Sequence[int] = ()
  ):
    """Compiles nothing yet. Raises UsageError if continuous batching cannot do what is wanted.

    The prefix is what all outputs begin with, as of `Predictor.predict_all`. Slots are not cut over
    a mesh's data axes as batches are: every part decodes all of them.
    """
    self.predictor, self.prefix, self._batch, how = predictor, prefix, None, predictor.decoding
    if not continuous:
      return
    names = 'max_decode_length stop_strings stopper temperature top_k top_p draft_tokens'.split()
    simple = DecodingConfig(**{name: getattr(how, name) for name in names}) == how
    if not (simple and predictor.plain) or prefix:
      what = 'greedy search or one sample by temperature, top_k and top_p'
      raise UsageError(f'continuous batching is for {what}, without a draft and a prefix')
    if jax.process_count() > 1:
      raise UsageError('continuous batching is for one process')
    self._batch = ContinuousBatch(
      predictor.model,
      None,
      placement=predictor.placement,
      num_slots=predictor.batch_size,
      max_decode_length=how.length,
      seed=predictor.seed,
      fixed=True,
      stopper=how.stopper,
    )

  def __call__(
    self, params: Any, rows: Sequence[Sequence[int]], *, seeds: Sequence[int]
  ) -> Iterator[tuple[int, list[Output]]]:
    """Yields (index, outputs) of each input, in the order in which they end.

    Params, rows and seeds are as of `Predictor.predict_all`, but of any number.
    """
    predictor, how, batch = self.predictor, self.predictor.decoding, self._batch
    if batch is None:

      def call(part: Sequence[int]) -> list[list[Output]]:
        given: dict[str, Any] = {'seeds': [seeds[i] for i in part]}
        if self.prefix:
          given['prefixes'] = [self.prefix] * len(part)
        return predictor.predict_all(params, [rows[i] for i in part], **given)

      yield from in_batches(call, rows, predictor.batch_size)
      return
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # the cache grows with the longest
    settings = {name: getattr(how, name) for name in ('temperature', 'top_k', 'top_p')}
    batch.params = params
    try:
      for i, one in batch.run(Request(tokens=rows[i], seed=seeds[i], **settings) for i in order):
        yield order[i], [one]
    finally:  # neither caches nor parameters stay
      batch.reset()
      batch.params = None
