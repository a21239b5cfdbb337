"""Packing: several short examples share one row of fixed length. numpy only.

A row holds, for each feature, the concatenated values of its examples, zeros to the end, and two
int32 arrays: `<feature>_segment_ids` (1, 2, ... for the examples of the row, 0 for padding) and
`<feature>_positions` (0, 1, ... inside each example), as SeqIO's trim_and_pack_dataset has them.

What SeqIO's loses (seqio/utils.py:1014-1130) is kept: lengths are counted, never guessed from
non-zero values, so id 0 may stand inside a sequence; the segment id is the example's number in the
row, the same for every feature, so that an empty one shifts no neighbours; values keep their dtype.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite.errors import UsageError, check_positive


class Ragged(NamedTuple):
  """Sequences of different lengths, end to end."""

  values: np.ndarray  # all elements, example after example, [total]
  lengths: np.ndarray  # elements of each example, [num_examples]

  @classmethod
  def from_arrays(cls, arrays, dtype=None) -> 'Ragged':
    """Joins a list of 1-D arrays."""
    arrays = [np.asarray(array, dtype) for array in arrays]
    lengths = np.array([len(array) for array in arrays], np.int64)
    values = np.concatenate(arrays) if arrays else np.zeros(0, dtype or np.int32)
    return cls(values, lengths)


Examples = Mapping[str, Ragged]
Rows = dict[str, np.ndarray]


def _starts(lengths: np.ndarray) -> np.ndarray:
  return np.cumsum(lengths) - lengths


def ramp(lengths: np.ndarray) -> np.ndarray:
  """Returns 0, 1, ..., n-1 for every length n, end to end."""
  return np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)


def take(ragged: Ragged, index: np.ndarray) -> Ragged:
  """Returns the examples at `index`, in that order."""
  lengths = ragged.lengths[index]
  start = np.repeat(_starts(ragged.lengths)[index], lengths)
  return Ragged(ragged.values[start + ramp(lengths)], lengths)


def concatenate(first: Ragged, second: Ragged) -> Ragged:
  """Returns the examples of `first`, then those of `second`."""
  return Ragged(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))


def interleave(first: Ragged, second: Ragged) -> Ragged:
  """Returns one example per pair: the first's values, then the second's."""
  num = len(first.lengths)
  order = np.arange(2 * num).reshape(2, num).T.reshape(-1)
  return Ragged(take(concatenate(first, second), order).values, first.lengths + second.lengths)


def _scatter(
  examples: Examples,
  row: np.ndarray,
  num_rows: int,
  lengths: Mapping[str, int],
  aligned: Mapping[str, str],
) -> Rows:
  """Writes examples into rows; `row` is that of each example, non-decreasing."""
  rows: Rows = {}
  where: dict[str, np.ndarray] = {}  # each value's index in the flat rows
  segment = np.arange(len(row)) - np.searchsorted(row, row) + 1

  def write(values, index, length):
    flat = np.zeros(num_rows * length, values.dtype)
    flat[index] = values
    return flat.reshape(num_rows, length)

  for name, length in lengths.items():
    sizes = examples[name].lengths
    used = np.bincount(row, weights=sizes, minlength=num_rows).astype(np.int64)
    start = row * length + _starts(sizes) - _starts(used)[row]
    positions = ramp(sizes)
    where[name] = np.repeat(start, sizes) + positions
    segments = np.repeat(segment.astype(np.int32), sizes)
    rows[name] = write(examples[name].values, where[name], length)
    rows[f'{name}_segment_ids'] = write(segments, where[name], length)
    rows[f'{name}_positions'] = write(positions.astype(np.int32), where[name], length)
  for name, leader in aligned.items():
    rows[name] = write(examples[name].values, where[leader], lengths[leader])
  return rows


def _check(examples: Examples, lengths: Mapping[str, int]) -> None:
  for name, length in lengths.items():
    longest = examples[name].lengths.max(initial=0)
    if longest > length:
      fix = f'trim it first or raise task_feature_lengths[{name!r}]'
      raise UsageError(f'an example has {longest} values in {name!r}, a row holds {length}: {fix}')


def pad(
  examples: Examples, lengths: Mapping[str, int], aligned: Mapping[str, str] | None = None
) -> Rows:
  """Returns one example a row, with the arrays of packed rows; UsageError if one is longer."""
  _check(examples, lengths)
  num_rows = len(examples[next(iter(lengths))].lengths)
  return _scatter(examples, np.arange(num_rows), num_rows, lengths, aligned or {})


@dataclasses.dataclass
class Packer:
  """Packs a stream of examples first-fit into rows, a window at a time.

  Each example goes into the oldest open row that has room for all its features. If there is none a
  new row is opened, and when `num_open_rows` are open the oldest is closed for it: an example never
  waits for more than that many rows, and rows leave in the order in which they were opened. The
  result depends on the stream alone, not on how it is cut into windows.

  The choice is a loop over examples with a vectorised test of the open rows (3-5 microseconds an
  example), the writing is one scatter per feature.
  """

  lengths: Mapping[str, int]  # feature -> row length
  # Feature -> the one of `lengths` that it follows value by value, with no segment ids of its own.
  aligned: Mapping[str, str] = dataclasses.field(default_factory=dict)
  num_open_rows: int = 64  # how many rows are filled at a time

  def __post_init__(self):
    check_positive('num_open_rows', self.num_open_rows)
    self._pending: dict[str, Ragged] = {}
    self._pending_row = np.zeros(0, np.int64)  # row number of each, ascending
    self._next_row = 0

  def add(self, examples: Examples) -> Rows:
    """Returns the rows that more examples closed (maybe none); UsageError if one is longer."""
    _check(examples, self.lengths)
    row = np.concatenate([self._pending_row, self._assign(examples)])
    for name, pending in self._pending.items():
      examples = {**examples, name: concatenate(pending, examples[name])}
    return self._emit(examples, row, max(self._next_row - self.num_open_rows, 0))

  def flush(self) -> Rows:
    """Closes all open rows and returns them; {} if there never was one."""
    if not self._pending:
      return {}
    return self._emit(self._pending, self._pending_row, self._next_row)

  def _free(self) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the room left per feature and the row number of each slot.

    Row r lives in slot r % num_open_rows; a slot not yet used has no room.
    """
    row_of_slot = np.full(self.num_open_rows, -1)
    open_rows = np.arange(max(self._next_row - self.num_open_rows, 0), self._next_row)
    row_of_slot[open_rows % self.num_open_rows] = open_rows
    free = []
    for name, length in self.lengths.items():
      room = np.where(row_of_slot >= 0, length, -1)
      if self._pending:
        slots = self._pending_row % self.num_open_rows
        np.subtract.at(room, slots, self._pending[name].lengths)
      free.append(room)
    return free, row_of_slot

  def _assign(self, examples: Examples) -> np.ndarray:
    """Returns a row number for each example, first-fit."""
    free, row_of_slot = self._free()
    size, next_row = self.num_open_rows, self._next_row
    full = list(self.lengths.values())
    needs = [examples[name].lengths.tolist() for name in self.lengths]
    rows = np.empty(len(needs[0]), np.int64)
    features = range(len(full))
    for i, need in enumerate(zip(*needs, strict=True)):
      fits = free[0] >= need[0]
      for f in features[1:]:
        fits &= free[f] >= need[f]
      oldest = next_row % size
      slot = oldest + int(fits[oldest:].argmax())
      if not fits[slot] and oldest:
        slot = int(fits[:oldest].argmax())
      if not fits[slot]:
        slot = oldest
        row_of_slot[slot] = next_row
        next_row += 1
        for f in features:
          free[f][slot] = full[f]
      rows[i] = row_of_slot[slot]
      for f in features:
        free[f][slot] -= need[f]
    self._next_row = next_row
    return rows

  def _emit(self, examples: Examples, row: np.ndarray, end: int) -> Rows:
    """Writes out the rows before `end` and keeps the rest."""
    order = np.argsort(row, kind='stable')
    closed = order[: np.searchsorted(row[order], end)]
    rest = order[len(closed) :]
    # Every opened row holds an example, so the smallest number is the first.
    first = int(row.min(initial=end))
    ready = {name: take(ragged, closed) for name, ragged in examples.items()}
    self._pending = {name: take(ragged, rest) for name, ragged in examples.items()}
    self._pending_row = row[rest]
    return _scatter(ready, row[closed] - first, end - first, self.lengths, self.aligned)

  def state(self) -> dict[str, Any]:
    """Returns all that later rows depend on, as arrays and dicts of arrays."""
    values = {name: ragged.values for name, ragged in self._pending.items()}
    lengths = {name: ragged.lengths for name, ragged in self._pending.items()}
    numbers = {'next_row': np.array(self._next_row), 'row': self._pending_row}
    return {**numbers, 'values': values, 'lengths': lengths}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues from what `state` returned, less empty dicts."""
    self._next_row, self._pending_row = int(state['next_row']), np.asarray(state['row'])
    values = state.get('values', {})
    self._pending = {name: Ragged(values[name], state['lengths'][name]) for name in values}


class RowBuffer:
  """Rows in order, pushed in chunks and popped in batches."""

  def __init__(self):
    self._chunks: list[Rows] = []

  @property
  def num_rows(self) -> int:
    """Rows that are there."""
    return sum(map(_count, self._chunks))

  def push(self, rows: Rows) -> None:
    """Adds rows at the end; {} adds none."""
    if _count(rows):
      self._chunks.append(rows)

  def peek(self) -> Rows:
    """Returns all rows and keeps them."""
    return _joined(self._chunks)

  def pop(self, num: int) -> Rows:
    """Removes and returns the first `num` rows (or all, if fewer)."""
    chunks = int(np.searchsorted(np.cumsum([*map(_count, self._chunks)]), num)) + 1
    rows = _joined(self._chunks[:chunks])
    rest = {name: values[num:] for name, values in rows.items()}
    self._chunks[:chunks] = [rest] if _count(rest) else []
    return {name: values[:num] for name, values in rows.items()}


def _joined(chunks: Sequence[Rows]) -> Rows:
  names = chunks[0] if chunks else ()
  return {name: np.concatenate([rows[name] for rows in chunks]) for name in names}


def _count(rows: Rows) -> int:
  return len(next(iter(rows.values()), ()))


def fill(rows: Rows, num: int) -> Rows:
  """Adds rows of padding up to `num`."""
  missing = num - _count(rows)
  return {k: np.pad(v, ((0, missing), (0, 0))) for k, v in rows.items()} if missing else rows


def host_rows(rows: Rows, index: int, count: int) -> Rows:
  """Returns one host's part of a global batch."""
  size = _count(rows) // count
  return {k: v[index * size : (index + 1) * size] for k, v in rows.items()}
