"""The file that infer writes: whole after a kill, continued, and made a table at the end.

A line of JSON is appended for each input. Of JSONL that is the output itself; CSV, Parquet and .npy
are made of OUTPUT.partial.jsonl once every line is there, and appear by one rename.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from t5x_lite.data import pairs
from t5x_lite.data.pairs import Columns
from t5x_lite.errors import UsageError
from t5x_lite.runs import files

Entry = dict[str, Any]
# Of `prediction`, what a table of no rows has; Arrow's types are in _schema.
_COLUMNS = ('input', 'prediction', 'score', 'truncated')
_ROWS_AT_A_TIME = 1024


class OutputFile:
  """Of predictions, or of embeddings of some width, 0 where each position has its own."""

  def __init__(self, path: str, *, key: str, width: int = 0):
    """Checks the name; `key` is 'prediction' or 'embedding'."""
    ending = os.path.splitext(path)[1].lower()
    self.path, self._key, self._width = path, key, width
    self._write = {'.csv': _write_csv, '.parquet': _write_parquet, '.npy': _write_npy}.get(ending)
    self.lines = path if self._write is None else f'{path}.partial.jsonl'
    problem = ''
    if ending in ('.gz', '.zst'):
      problem = 'would not be compressed: name a .jsonl, .csv or .parquet file'
    elif ending == '.npy' and not width:
      problem = 'takes one vector an input: give output_kind=embeddings and a pooling'
    elif ending == '.csv' and key == 'embedding':
      problem = 'takes no vectors: name a .npy, .parquet or .jsonl file'
    if problem:
      raise UsageError(f'the output {path} {problem}')

  def holds_something(self) -> bool:
    """Whether there are predictions already."""
    places = map(epath.Path, {self.path, self.lines})
    return any(place.exists() and place.stat().length for place in places)

  def is_whole(self, inputs: Iterator[str]) -> bool:
    """Whether a table was made; UsageError if it is not of these inputs."""
    if self._write is None or epath.Path(self.lines).exists() or not epath.Path(self.path).exists():
      return False
    if self.path.lower().endswith('.npy'):
      with epath.Path(self.path).open('rb') as file:
        np.lib.format.read_magic(file)
        same = np.lib.format.read_array_header_1_0(file)[0][0] == sum(1 for _ in inputs)
    else:
      written = pairs.read_inputs(self.path, Columns(input='input'))
      same = all(a == b for a, b in itertools.zip_longest(written, inputs))
    if not same:
      raise UsageError(f'{self.path} is whole, but of other inputs: start over with --overwrite')
    return True

  def resume(self, inputs: Iterator[str], window: int) -> int:
    """Cuts what is written to whole windows, so that the rest is decoded as ever.

    Returns the number of lines that stay. Raises UsageError if they are of another input.
    """
    path = epath.Path(self.lines)
    if not path.exists():
      return 0
    over = 'give --overwrite instead of --resume to start over'
    ends = [0]  # byte offset after each good line
    with path.open('rb') as file:
      for line in file:
        try:
          entry = json.loads(line) if line.endswith(b'\n') else {}
          written = entry['input']
        except (ValueError, KeyError, TypeError):  # no JSON, no UTF-8
          break
        where, text = f'{path}:{len(ends)}', next(inputs, None)
        if text is None:
          raise UsageError(f'{path} goes on after the {len(ends) - 1} lines of this input: {over}')
        if written != text or self._key not in entry:
          raise UsageError(
            f'{where} is not the {self._key} of line {len(ends)} of this input: {over}'
          )
        ends.append(ends[-1] + len(line))
    kept = len(ends) - 1
    if next(inputs, None) is not None:
      kept = kept // window * window
    if '://' in self.lines:
      path.write_bytes(path.read_bytes()[: ends[kept]])
    else:
      os.truncate(self.lines, ends[kept])
    return kept

  @contextlib.contextmanager
  def open(self, *, append: bool) -> Iterator[Callable[[Entry], None]]:
    """Yields a function that writes one object, at once."""
    opened: Any = contextlib.nullcontext(sys.stdout)
    if self.path != '-':
      path = epath.Path(self.lines)
      try:
        opened = files.retried(path, lambda: path.open('a' if append else 'w'))
      except OSError as error:
        raise UsageError(f'cannot write {path}: {error.strerror}') from error
    with opened as file:

      def write(entry: Entry) -> None:
        try:
          file.write(json.dumps(entry, ensure_ascii=False) + '\n')
          files.retried(self.lines, file.flush)
        except OSError as error:
          why = f'{error.strerror}; make room, and continue with --resume'
          raise UsageError(f'cannot write {self.lines}: {why}') from error

      yield write

  def finish(self, num_lines: int) -> None:
    """Makes the table of all lines, if the output is one."""
    if self._write is None:
      return
    lines, path = epath.Path(self.lines), epath.Path(self.path)
    temporary = path.parent / f'{path.name}.tmp'
    with lines.open('rb') as source, temporary.open('wb') as target:
      self._write(target, map(json.loads, source), self._key, (num_lines, self._width))
    temporary.replace(path)
    lines.unlink()


def _chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
  while chunk := list(itertools.islice(entries, _ROWS_AT_A_TIME)):
    for entry in chunk:
      entry.setdefault('truncated', False)
    yield chunk


def _write_csv(target: Any, entries: Iterator[Entry], key: str, shape: tuple[int, int]) -> None:
  del key, shape
  text = io.TextIOWrapper(target, 'utf-8', newline='')
  writer = None
  for chunk in _chunks(entries):
    if writer is None:
      writer = csv.DictWriter(text, list(chunk[0]))
      writer.writeheader()
    for entry in chunk:
      best = {k: json.dumps(v, ensure_ascii=False) for k, v in entry.items() if k == 'n_best'}
      writer.writerow({**entry, **best})
  if writer is None:
    csv.writer(text).writerow(_COLUMNS)
  text.flush()
  text.detach()


def _write_parquet(target: Any, entries: Iterator[Entry], key: str, shape: tuple[int, int]) -> None:
  import pyarrow as pa
  from pyarrow import parquet

  vector = pa.list_(pa.float32(), shape[1] or -1)
  one = [('prediction', pa.string()), ('score', pa.float64())]
  kinds = {
    **dict([('input', pa.string()), *one]),
    'n_best': pa.list_(pa.struct(one)),
    'normalization': pa.string(),
    'truncated': pa.bool_(),
    'embedding': vector if shape[1] else pa.list_(vector),
  }
  empty = _COLUMNS if key == 'prediction' else ('input', 'embedding', 'truncated')
  chunks = _chunks(entries)
  first = next(chunks, [])
  schema = pa.schema([(name, kinds[name]) for name in (first[0] if first else empty)])
  with parquet.ParquetWriter(target, schema) as writer:
    for chunk in itertools.chain([first], chunks):
      writer.write_table(pa.Table.from_pylist(chunk, schema))


def _write_npy(target: Any, entries: Iterator[Entry], key: str, shape: tuple[int, int]) -> None:
  header = {'descr': '<f4', 'fortran_order': False, 'shape': shape}
  np.lib.format.write_array_header_1_0(target, header)
  for entry in entries:
    target.write(np.asarray(entry[key], '<f4').tobytes())
