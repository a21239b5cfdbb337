"""A queue of rows between packing and batches, and how batches are shared."""

from collections.abc import Sequence

import numpy as np

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import packing
from t5x_lite.errors import UsageError


class RowBuffer:
  """Rows in order, pushed in chunks and popped in batches."""

  def __init__(self):
    self._chunks: list[packing.Rows] = []

  @property
  def num_rows(self) -> int:
    """Rows that are there."""
    return sum(map(_count, self._chunks))

  def push(self, rows: packing.Rows) -> None:
    """Adds rows at the end; {} adds none."""
    if _count(rows):
      self._chunks.append(rows)

  def peek(self) -> packing.Rows:
    """Returns all rows and keeps them."""
    return _joined(self._chunks)

  def pop(self, num: int) -> packing.Rows:
    """Removes and returns the first `num` rows (or all, if fewer)."""
    chunks = int(np.searchsorted(np.cumsum([*map(_count, self._chunks)]), num)) + 1
    rows = _joined(self._chunks[:chunks])
    rest = {name: values[num:] for name, values in rows.items()}
    self._chunks[:chunks] = [rest] if _count(rest) else []
    return {name: values[:num] for name, values in rows.items()}


def _joined(chunks: Sequence[packing.Rows]) -> packing.Rows:
  names = chunks[0] if chunks else ()
  return {name: np.concatenate([rows[name] for rows in chunks]) for name in names}


def _count(rows: packing.Rows) -> int:
  return len(next(iter(rows.values()), ()))


def fill(rows: packing.Rows, num: int) -> packing.Rows:
  """Adds rows of padding up to `num`."""
  missing = num - _count(rows)
  return {k: np.pad(v, ((0, missing), (0, 0))) for k, v in rows.items()} if missing else rows


def host_rows(rows: packing.Rows, index: int, count: int) -> packing.Rows:
  """Returns one host's part of a global batch."""
  size = _count(rows) // count
  return {k: v[index * size : (index + 1) * size] for k, v in rows.items()}


def check_processes(cfg: DatasetConfig, index: int, count: int) -> None:
  """Refuses a batch that the processes cannot share equally."""
  if not 0 <= index < count:
    raise UsageError(f'process_index is {index}, must be in [0, {count})')
  if cfg.batch_size % count:
    raise UsageError(
      f'batch_size {cfg.batch_size} does not divide over {count} processes: '
      f'take a multiple of {count}'
    )
