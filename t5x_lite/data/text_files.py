"""Reads text, TSV and JSONL files, plain or gzip, and loses no row silently.

No TensorFlow here: the vocabulary trainer and file inference read the same
formats through this module.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

from etils import epath

from t5x_lite.errors import UsageError

Format = Literal['text', 'tsv', 'jsonl']
FORMATS = ('text', 'tsv', 'jsonl')


def expand(patterns: str | os.PathLike | Sequence[str]) -> list[str]:
  """Returns the files of a path, of a glob pattern or of several, sorted.

  Raises:
    UsageError: if a path or pattern names no file.
  """
  if isinstance(patterns, str | os.PathLike):
    patterns = [os.fspath(patterns)]
  files = []
  for pattern in patterns:
    if wildcard := re.search(r'[*?[]', pattern):
      if '**' in pattern:
        raise UsageError(f"{pattern!r} has '**'; name each folder with '*'")
      # The folder before the first wildcard, and the rest.
      start = wildcard.start()
      root, slash, _ = pattern[:start].rpartition('/')
      found = epath.Path(root + slash).glob(pattern[len(root + slash) :])
      found = sorted(os.fspath(path) for path in found if not path.is_dir())
    else:
      path = epath.Path(pattern)
      found = [pattern] if path.exists() and not path.is_dir() else []
    if not found:
      raise UsageError(f'There is no file {pattern!r}')
    files.extend(found)
  return files


def total_bytes(files: Sequence[str]) -> int:
  """Returns the size of files, compressed ones as they will be in memory.

  The factor 4 is what gzip gains on text, near enough.
  """
  return sum(
    epath.Path(file).stat().length * (4 if file.endswith('.gz') else 1)
    for file in files
  )


def format_of(path: str, file_format: str = '') -> Format:
  """Returns the format of a file: as said, else from its name.

  Raises:
    UsageError: if `file_format` is unknown.
  """
  if file_format:
    if file_format not in FORMATS:
      raise UsageError(
        f'The file format is {file_format!r}; it must be one of '
        f'{", ".join(FORMATS)}'
      )
    return file_format
  name = path.removesuffix('.gz')
  for ending, known in (
    ('.tsv', 'tsv'),
    ('.jsonl', 'jsonl'),
    ('.json', 'jsonl'),
  ):
    if name.endswith(ending):
      return known
  return 'text'


def lines(path: str) -> Iterator[tuple[int, str]]:
  r"""Yields (line number from 1, line without its end), blank lines too.

  Only `\n` and `\r\n` end a line: str.splitlines would also cut at U+2028 and
  other characters that occur inside text.

  Raises:
    UsageError: if the file is missing, or not UTF-8, or not whole gzip.
  """
  number = 0
  try:
    with epath.Path(path).open('rb') as raw:
      binary = gzip.open(raw) if path.endswith('.gz') else raw
      # Binary files split at b'\n' alone.
      for number, line in enumerate(binary, start=1):
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')
        line = line.removesuffix(b'\n').removesuffix(b'\r')
        yield number, line.decode('utf-8')
  except UnicodeDecodeError as error:
    raise UsageError(
      f'{path}:{number} is not UTF-8 ({error.reason} at byte {error.start}); '
      'convert the file with iconv'
    ) from error
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise UsageError(
      f'{path} is not a whole gzip file after line {number}: {error}'
    ) from error
  except OSError as error:
    raise UsageError(f'Cannot read {path!r}: {error.strerror}') from error


def rows(
  path: str,
  fields: Sequence[str | int],
  file_format: str = '',
) -> Iterator[tuple[str, ...]]:
  """Yields the named fields of every row.

  Args:
    path: the file.
    fields: JSONL keys; or TSV columns, by number from 0 or by a name that the
      first line holds (then it is a header). Not used for text, where a row is
      a line.
    file_format: 'text', 'tsv' or 'jsonl'; empty to tell from the name.

  Raises:
    UsageError: naming file and line, if a row lacks a field. Blank lines are
      skipped: they hold no row.
  """
  file_format = format_of(path, file_format)
  if file_format == 'text':
    for _, line in lines(path):
      if line.strip():
        yield (line,)
  elif file_format == 'tsv':
    yield from _tsv_rows(path, fields)
  else:
    yield from _jsonl_rows(path, fields)


def texts(
  path: str, fields: Sequence[str | int] = (), file_format: str = ''
) -> Iterator[str]:
  """Yields every text of a file: the fields of `rows`, or all there are.

  Without fields, that is every column of a TSV file, and every value of a JSONL
  file that is text.
  """
  file_format = format_of(path, file_format)
  if fields or file_format == 'text':
    for row in rows(path, fields, file_format):
      yield from row
  elif file_format == 'tsv':
    for _, line in lines(path):
      yield from filter(str.strip, line.split('\t'))
  else:
    for _, entry in _jsonl_entries(path):
      yield from (v for v in entry.values() if isinstance(v, str) and v.strip())


def _tsv_rows(
  path: str, fields: Sequence[str | int]
) -> Iterator[tuple[str, ...]]:
  """Yields columns; quotes are characters like any other, not CSV."""
  columns: list[int] | None = None
  width = 0
  for number, line in lines(path):
    if not line.strip(' '):
      continue
    cells = line.split('\t')
    if columns is None:
      columns, is_header = _tsv_columns(path, cells, fields)
      width = len(cells)
      if is_header:
        continue
    if len(cells) != width:
      raise UsageError(
        f'{path}:{number} has {len(cells)} columns, the first line {width}; '
        'write a tab inside a field as a space'
      )
    yield tuple(cells[column] for column in columns)


def _tsv_columns(
  path: str, cells: Sequence[str], fields: Sequence[str | int]
) -> tuple[list[int], bool]:
  """Returns the column numbers, and whether the first line is a header."""
  named = [field for field in fields if isinstance(field, str)]
  columns = []
  for field in fields:
    if isinstance(field, str):
      if field not in cells:
        raise UsageError(
          f'{path} has no column {field!r} in its first line, which reads '
          f'{", ".join(map(repr, cells))}; name one of these, or give column '
          'numbers from 0 if there is no header'
        )
      columns.append(cells.index(field))
    else:
      if not 0 <= field < len(cells):
        raise UsageError(
          f'{path} has {len(cells)} columns; there is no column {field} '
          '(counted from 0)'
        )
      columns.append(field)
  return columns, bool(named)


def _jsonl_rows(
  path: str, fields: Sequence[str | int]
) -> Iterator[tuple[str, ...]]:
  for number, entry in _jsonl_entries(path):
    row = []
    for field in fields:
      value = entry.get(str(field))
      if isinstance(value, bool) or not isinstance(value, str | int | float):
        found = type(value).__name__ if field in entry else 'not there'
        raise UsageError(
          f'{path}:{number}: the field {field!r} must be text or a number; it '
          f'is {found}. The keys are {", ".join(map(repr, entry))}'
        )
      row.append(str(value))
    yield tuple(row)


def _jsonl_entries(path: str) -> Iterator[tuple[int, dict[str, object]]]:
  for number, line in lines(path):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
    except json.JSONDecodeError as error:
      raise UsageError(f'{path}:{number} is not JSON: {error}') from error
    if not isinstance(entry, dict):
      raise UsageError(
        f'{path}:{number} is not a JSON object but {type(entry).__name__}'
      )
    yield number, entry
