"""The file that infer writes: whole after a kill, continued, and made a table at the end.

A line of JSON is appended for each input. Of JSONL that is the output itself; CSV, Parquet and .npy
are made of OUTPUT.partial.jsonl once every line is there, and appear by one rename.
"""

import contextlib
import fcntl
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from t5x_lite.data import pairs
from t5x_lite.errors import UsageError, refusing
from t5x_lite.runs import files

Entry = dict[str, Any]
PARTIAL = '.partial.jsonl'  # after the name of a table: its lines until it is made
# The columns of a table that there is no row for.
_COLUMNS = {'prediction': ('input', 'prediction', 'score'), 'embedding': ('input', 'embedding')}


class OutputFile:
  """Of predictions, or of embeddings of `width` numbers, 0 where each position has its own."""

  def __init__(self, path: str, *, key: str, width: int = 0):
    """Checks that the file can hold it; `key` is 'prediction' or 'embedding'."""
    self.path, self._key, self._width = path, key, width
    self._ending = os.path.splitext(path)[1].lower()
    self.lines = path + PARTIAL if self._ending in ('.csv', '.parquet', '.npy') else path
    cannot = {'.gz': True, '.zst': True, '.csv': key == 'embedding', '.npy': not width}
    if cannot.get(self._ending):
      can = '.jsonl and .parquet can, .csv predictions, .npy embeddings that are pooled'
      raise UsageError(f'{path} cannot hold {key}s: {can}')

  def holds_something(self) -> bool:
    """Whether there are predictions already."""
    places = map(epath.Path, (self.path, self.lines))
    return any(place.exists() and place.stat().length for place in places)

  def is_whole(self, inputs: Iterator[str]) -> bool:
    """Whether a table was made; UsageError if it is not of these inputs."""
    if self.path == self.lines or epath.Path(self.lines).exists() or not self.holds_something():
      return False
    if self._ending == '.npy':
      raise UsageError(f'{self.path} is there, and says of no input: start over with --overwrite')
    written = pairs.read_inputs(self.path, pairs.Columns(input='input'))
    if any(a != b for a, b in itertools.zip_longest(written, inputs)):
      raise UsageError(f'{self.path} is whole, but of another input: start over with --overwrite')
    return True

  def resume(self, inputs: Iterator[str], window: int) -> int:
    """Cuts what is written to whole windows, so that the rest is decoded as ever.

    Returns the number of lines that stay. Raises UsageError if they are of another input.
    """
    path, ends = epath.Path(self.lines), [0]  # byte offset after each good line
    if not path.exists():
      return 0
    with _locked(self.lines), path.open('rb') as file:
      for number, line in enumerate(file, start=1):
        try:
          entry = json.loads(line) if line.endswith(b'\n') else {}
          written = entry['input']
        except (ValueError, KeyError, TypeError) as error:  # no JSON, no UTF-8
          if number == 1 and not line.startswith(b'{"input": '[: len(line)]):
            what = f'{path} holds no {self._key}s'
            raise UsageError(f'{what}: name another file, or give --overwrite') from error
          break
        if written != next(inputs, None) or self._key not in entry:
          what = f'{path}:{number} is not the {self._key} of line {number} of this input'
          raise UsageError(f'{what}: give --overwrite instead of --resume to start over')
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
    path, opened, file = epath.Path(self.lines), contextlib.ExitStack(), sys.stdout
    what = f'cannot write {path}'
    with refusing(what, OSError):
      if self.path != '-':
        opened.enter_context(_locked(self.lines))
        file = files.retried(path, lambda: opened.enter_context(path.open('a' if append else 'w')))
        what += '; make room, and continue with --resume'

    def write(entry: Entry) -> None:
      with refusing(what, OSError):
        file.write(json.dumps(entry, ensure_ascii=False) + '\n')
        files.retried(path, file.flush)

    try:
      yield write
    finally:
      with refusing(what, OSError):  # closing tries again to write what was not
        opened.close()

  def finish(self, num_lines: int) -> None:
    """Makes the table of all lines, if the output is one."""
    if self.path == self.lines:
      return
    path, lines = epath.Path(self.path), epath.Path(self.lines)
    temporary = path.parent / f'{path.name}.tmp-{os.getpid()}'
    with lines.open('rb') as source, temporary.open('wb') as target:
      entries: Iterator[Entry] = map(json.loads, source)
      if self._ending == '.npy':
        header = {'descr': '<f4', 'fortran_order': False, 'shape': (num_lines, self._width)}
        np.lib.format.write_array_header_1_0(target, header)
        for entry in entries:
          target.write(np.asarray(entry[self._key], '<f4').tobytes())
      else:
        self._write_table(target, entries)
    temporary.replace(path)
    lines.unlink()

  def _write_table(self, target: Any, entries: Iterator[Entry]) -> None:
    import pyarrow as pa
    from pyarrow import csv, parquet

    is_csv, first = self._ending == '.csv', next(entries, None)
    log = {'log_probs': pa.list_(pa.float64())} if 'log_probs' in (first or ()) else {}
    best = {'prediction': pa.string(), 'score': pa.float64(), **log}
    vector = pa.list_(pa.float32(), self._width or -1)
    kinds = {**best, 'input': pa.string(), 'normalization': pa.string(), 'truncated': pa.bool_()}
    kinds['n_best'] = pa.list_(pa.struct(best.items()))
    as_text = ('n_best', 'log_probs') if is_csv else ()  # which CSV has alone
    kinds |= dict.fromkeys(as_text, pa.string())
    kinds['embedding'] = vector if self._width else pa.list_(vector)
    names = [name for name in first or _COLUMNS[self._key] if name != 'truncated']
    schema = pa.schema([(name, kinds[name]) for name in (*names, 'truncated')])
    rows = itertools.chain([first] if first else [], entries)
    with (csv.CSVWriter if is_csv else parquet.ParquetWriter)(target, schema) as writer:
      while chunk := [{'truncated': False, **row} for row in itertools.islice(rows, 1024)]:
        for row in chunk:
          row |= {x: json.dumps(row[x], ensure_ascii=False) for x in as_text if x in row}
        writer.write_table(pa.Table.from_pylist(chunk, schema))


def _locked(path: str) -> Any:
  """Returns what holds the lock of a file, if it can have one; UsageError if another infer does."""
  if '://' in path or os.path.exists(path) > os.path.isfile(path):
    return contextlib.nullcontext()
  file, what = open(path, 'ab'), f'another infer writes {path}: wait, or name another output'
  with contextlib.suppress(OSError), refusing(what, BlockingIOError):
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  return file
