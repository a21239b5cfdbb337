"""Reads rows with named fields from any file: JSONL, CSV, Parquet, and others.

A row comes with the line that it stands on, so that every mistake in a file can
be told with its place. No row is lost in silence, and no TensorFlow loads.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from t5x_lite.data import text_files
from t5x_lite.errors import UsageError

Format = Literal['text', 'tsv', 'csv', 'jsonl', 'json', 'parquet', 'datasets']
FORMATS = ('text', 'tsv', 'csv', 'jsonl', 'json', 'parquet', 'datasets')
_ENDINGS: Mapping[str, Format] = {
  '.tsv': 'tsv',
  '.csv': 'csv',
  '.jsonl': 'jsonl',
  '.ndjson': 'jsonl',
  '.json': 'json',
  '.parquet': 'parquet',
}

# Columns that are found by themselves, the likeliest first.
INPUT_NAMES = (
  'input inputs source src text question sentence prompt instruction document '
  'article dialogue passage query word en'
).split()
# Beside one of those they are a second half of the input.
SECOND_INPUT_NAMES = 'instruction context passage hypothesis sentence2'.split()
TARGET_NAMES = (
  'target targets output outputs label labels tgt summary highlights answer '
  'answers translation completion response reference category class'
).split()

Row = Mapping[str | int, Any]


def format_of(path: str, file_format: str = '') -> Format:
  """Returns the format of a file or folder: as said, else from its name.

  Raises:
    UsageError: if `file_format` is unknown.
  """
  if file_format:
    if file_format not in FORMATS:
      raise UsageError(
        f'The file format is {file_format!r}; it must be one of {", ".join(FORMATS)}'
      )
    return file_format
  if text_files.is_dataset_folder(path):
    return 'datasets'
  name = path.removesuffix('.gz').lower()
  for ending, known in _ENDINGS.items():
    if name.endswith(ending):
      return known
  return 'text'


def dataset_splits(path: str) -> dict[str, str]:
  """Returns the folders of a saved DatasetDict by split; else nothing."""
  root = epath.Path(path)
  if not (root / text_files.DATASET_SPLITS_FILE).exists():
    return {}
  names = _listed(root / text_files.DATASET_SPLITS_FILE, 'splits')
  return {str(name): os.fspath(root / _inside(root, name)) for name in names}


# ---- Rows --------------------------------------------------------------------


def rows(
  path: str, fields: Sequence[str | int], file_format: str = ''
) -> Iterator[tuple[str, ...]]:
  """Yields the named fields of every row, as text.

  Args:
    path: the file.
    fields: names; or, of TSV and CSV, columns by number from 0 or by a name
      that the first line holds (then it is a header). Not used for text, where
      a row is a line.
    file_format: one of FORMATS; empty to tell from the name.

  Raises:
    UsageError: naming file and line, if a row lacks a field. Blank lines are
      skipped: they hold no row.
  """
  if format_of(path, file_format) == 'text':
    for _, line in text_files.lines(path):
      if line.strip():
        yield (line,)
    return
  for number, row in read(path, fields, file_format):
    yield tuple(as_text(row, field, f'{path}:{number}') for field in fields)


def texts(path: str, fields: Sequence[str | int] = (), file_format: str = '') -> Iterator[str]:
  """Yields every text of a file: the fields of `rows`, or all there are.

  Without fields, that is every column of a TSV or CSV file, its first line
  included, and every value of the others that is text.
  """
  kind = format_of(path, file_format)
  if fields or kind == 'text':
    for row in rows(path, fields, kind):
      yield from row
  elif kind in ('tsv', 'csv'):
    for _, cells in _cells(path, kind):
      yield from filter(str.strip, cells)
  else:
    for number, row in read(path, (), kind):
      for name, value in row.items():
        if isinstance(value, str) and value.strip():
          yield as_text(row, name, f'{path}:{number}')


def read(
  path: str, fields: Sequence[str | int] = (), file_format: str = ''
) -> Iterator[tuple[int, Row]]:
  """Yields (line, or number of the row, from 1; the row by its fields' names).

  Args:
    path: a file, or a folder that `datasets.save_to_disk` wrote.
    fields: those that will be asked for. Of TSV and CSV they tell whether the
      first line is a header: with names it is, with numbers it is not, and
      without either its looks decide.
    file_format: one of FORMATS but 'text'; empty to tell from the name.

  Raises:
    UsageError: naming file and line, if something cannot be read.
  """
  kind = format_of(path, file_format)
  if kind in ('tsv', 'csv', 'text'):
    yield from _delimited(path, 'tsv' if kind == 'text' else kind, fields)
  elif kind == 'jsonl':
    yield from _jsonl(path)
  elif kind == 'json':
    yield from _json(path)
  elif kind == 'parquet':
    yield from _parquet(path)
  else:
    yield from _dataset(path)


def as_text(row: Row, field: str | int, place: str) -> str:
  """Returns a field as text; 'a.b' is b of the object a, '' is not a number.

  Raises:
    UsageError: if it is not there, neither text nor a number, or no Unicode.
  """
  value: Any = row.get(field)
  found = field in row
  if not found and isinstance(field, str):
    value, found = row, True
    for part in field.split('.'):
      if not isinstance(value, Mapping) or part not in value:
        value, found = None, False
        break
      value = value[part]
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    what = type(value).__name__ if found else 'not there'
    raise UsageError(
      f'{place}: the field {field!r} must be text or a number; it is {what}. '
      f'The fields are {", ".join(map(repr, row))}'
    )
  if value != value:  # NaN, with which tables mark what is missing
    return ''
  text = str(value)
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    half = f'{text[error.start]!a} at character {error.start}'
    raise UsageError(
      f'{place}: the field {field!r} is no Unicode: it has {half}, half of a surrogate pair'
    ) from error
  return text


# ---- TSV and CSV -------------------------------------------------------------


def _cells(path: str, kind: str) -> Iterator[tuple[int, list[str]]]:
  """Yields the cells of every line that is not blank, and its number."""
  if kind == 'tsv':
    # Quotes are characters like any other, not CSV.
    for number, line in text_files.lines(path):
      if line.strip(' '):
        yield number, line.split('\t')
    return
  # With their ends: between quotes these are part of the text.
  lines = (line for _, line in text_files.lines(path, keep_ends=True))
  first = next(lines, '')
  csv.field_size_limit(2**31 - 1)  # 131,072 characters otherwise
  reader = csv.reader(
    _chain(first, lines),
    # What spreadsheets write where the comma is in the numbers.
    delimiter=next((one for one in ',;\t' if one in first), ','),
    strict=True,
  )
  start = 1
  try:
    for cells in reader:
      if any(map(str.strip, cells)):
        yield start, cells
      start = reader.line_num + 1
  except csv.Error as error:
    raise UsageError(f'{path}:{start} is not CSV: {error}') from error


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
  if first:
    yield first
  yield from rest


def _delimited(path: str, kind: str, fields: Sequence[str | int]) -> Iterator[tuple[int, Row]]:
  names: Sequence[str | int] | None = None
  for number, cells in _cells(path, kind):
    if names is None:
      names = _column_names(path, cells, fields)
      if isinstance(names[0], str):
        continue
    if len(cells) != len(names):
      raise UsageError(
        f'{path}:{number} has {len(cells)} columns, the first line '
        f'{len(names)}; '
        + (
          'write a tab inside a field as a space'
          if kind == 'tsv'
          else 'put a field that holds a comma in double quotes'
        )
      )
    yield number, dict(zip(names, cells, strict=True))


def _column_names(
  path: str, cells: Sequence[str], fields: Sequence[str | int]
) -> Sequence[str | int]:
  """Returns the header, or column numbers if the first line is none."""
  named = [field for field in fields if isinstance(field, str)]
  for field in named:
    if field not in cells:
      raise UsageError(
        f'{path} has no column {field!r} in its first line, which reads '
        f'{", ".join(map(repr, cells))}; name one of these, or give column '
        'numbers from 0 if there is no header'
      )
  for field in fields:
    if isinstance(field, int) and not 0 <= field < len(cells):
      raise UsageError(
        f'{path} has {len(cells)} columns; there is no column {field} (counted from 0)'
      )
  if named or (not fields and _is_header(path, cells)):
    for name in cells:
      if cells.count(name) > 1:
        raise UsageError(f'{path} names the column {name!r} twice in its first line')
    if named and len(named) < len(fields):  # a number beside a name
      return [i if i in fields else name for i, name in enumerate(cells)]
    return list(cells)
  return range(len(cells))


def _is_header(path: str, cells: Sequence[str]) -> bool:
  """Tells a header by its looks.

  Raises:
    UsageError: if it could be either; a header must not become an example, nor
      an example a header.
  """
  names = {cell.strip().lower() for cell in cells}
  known = [bool(names & set(one)) for one in (INPUT_NAMES, TARGET_NAMES)]
  like_names = all(cell.strip().isidentifier() for cell in cells)
  if all(known) or (any(known) and like_names):
    return True
  if like_names:
    raise UsageError(
      f'{path} begins with {", ".join(map(repr, cells))}: a header or an '
      'example? Say which columns are meant, by name or, if there is no '
      'header, by number from 0'
    )
  return False


# ---- JSON --------------------------------------------------------------------


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  entry = dict(pairs)
  if len(entry) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'the key {twice!r} is there twice')
  return entry


def _loads(text: str, place: str) -> Any:
  try:
    return json.loads(text, object_pairs_hook=_no_duplicates)
  except ValueError as error:
    raise UsageError(f'{place} is not JSON: {error}') from error
  except RecursionError:
    raise UsageError(f'{place} is JSON nested too deeply') from None


def _jsonl(path: str) -> Iterator[tuple[int, Row]]:
  for number, line in text_files.lines(path):
    if line.strip():
      yield number, _object(_loads(line, f'{path}:{number}'), path, number)


def _object(entry: Any, path: str, number: int) -> Row:
  if not isinstance(entry, dict):
    raise UsageError(f'{path}:{number} is not a JSON object but {type(entry).__name__}')
  return entry


def _json(path: str) -> Iterator[tuple[int, Row]]:
  """Yields rows of a list of objects, alone or in an object, or of lines."""
  lines = text_files.lines(path)
  first = next((line.strip() for _, line in lines if line.strip()), '')
  if first.startswith('{') and first.endswith('}') and len(first) > 2:
    try:
      alone = json.loads(first)
    except (ValueError, RecursionError):
      alone = {}
    if alone and _list_in(alone) is None:
      yield from _jsonl(path)
      return
  text = '\n'.join(line for _, line in text_files.lines(path))
  entry = _loads(text, path) if text.strip() else []
  listed = entry if isinstance(entry, list) else _list_in(entry)
  if listed is None:
    raise UsageError(
      f'{path} holds no list of objects; write [{{...}}, {{...}}], or one '
      'object a line in a .jsonl file'
    )
  for number, item in enumerate(listed, start=1):
    yield number, _object(item, path, number)


def _list_in(entry: Any) -> list[Any] | None:
  """Returns the one list of objects in an object, as {"data": [...]}."""
  if not isinstance(entry, dict):
    return None
  lists = [
    value
    for value in entry.values()
    if isinstance(value, list) and value and isinstance(value[0], dict)
  ]
  return lists[0] if len(lists) == 1 else None


def _listed(path: epath.Path, key: str) -> list[Any]:
  """Returns the list that a JSON object in a file has under a key."""
  try:
    entry = _loads(path.read_text(encoding='utf-8'), os.fspath(path))
  except (OSError, UnicodeDecodeError) as error:
    raise UsageError(f'{path} cannot be read: {_reason(error)}') from error
  listed = entry.get(key) if isinstance(entry, dict) else None
  if not isinstance(listed, list):
    raise UsageError(f'{path} is not a JSON object with a list {key!r}')
  return listed


# ---- Arrow: Parquet and saved datasets ---------------------------------------


def _reason(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)


def _arrow_errors() -> tuple[type[Exception], ...]:
  """What reading a damaged file, or a value that Python lacks, raises."""
  import pyarrow

  return (pyarrow.ArrowException, OSError, ValueError, OverflowError)


def _rows_of_batches(batches: Iterable[Any], schema: Any, path: Any) -> Iterator[Row]:
  """Yields the rows of Arrow's record batches."""
  labels = _label_names(schema)
  for name in schema.names:
    if schema.names.count(name) > 1:
      raise UsageError(f'{path} names the column {name!r} twice')
  for batch in batches:
    # Arrow takes lengths and offsets in a file at their word unless asked.
    batch.validate(full=True)
    for row in batch.to_pylist():
      yield _with_labels(row, labels)


def _parquet(path: str) -> Iterator[tuple[int, Row]]:
  from pyarrow import parquet

  number = 0
  try:
    with epath.Path(path).open('rb') as raw, parquet.ParquetFile(raw) as file:
      batches = file.iter_batches(batch_size=1024)
      for row in _rows_of_batches(batches, file.schema_arrow, path):
        number += 1
        yield number, row
  except UsageError:
    raise
  except _arrow_errors() as error:
    raise UsageError(
      f'{path} is not a whole Parquet file after row {number}: {_reason(error)}'
    ) from error


def _dataset(path: str) -> Iterator[tuple[int, Row]]:
  """Yields rows of one split as `datasets.save_to_disk` writes it."""
  import pyarrow

  root = epath.Path(path)
  if splits := dataset_splits(path):
    raise UsageError(f'{path} holds the splits {", ".join(splits)}: name one of its folders')
  number = 0
  for entry in _listed(root / text_files.DATASET_FILE, '_data_files'):
    name = entry.get('filename') if isinstance(entry, dict) else entry
    file = root / _inside(root, name)
    try:
      with file.open('rb') as raw, pyarrow.ipc.open_stream(raw) as stream:
        for row in _rows_of_batches(stream, stream.schema, file):
          number += 1
          yield number, row
    except UsageError:
      raise
    except _arrow_errors() as error:
      raise UsageError(f'{file} cannot be read after row {number}: {_reason(error)}') from error


def _inside(root: epath.Path, name: Any) -> str:
  """Returns a file name that cannot lead out of its folder."""
  alone = isinstance(name, str) and os.path.basename(name) == name
  if not alone or name in ('', '.', '..') or '\0' in name:
    raise UsageError(f'{root} names the file {name!r}, which is not in it')
  return name


def _label_names(schema: Any) -> dict[str, list[str]]:
  """Returns the names of labels that `datasets` keeps as numbers."""
  kept = (schema.metadata or {}).get(b'huggingface', b'{}')
  try:
    features = dict(json.loads(kept)['info']['features'])
  except (ValueError, KeyError, TypeError, RecursionError):
    return {}
  return {
    name: feature['names']
    for name, feature in features.items()
    if isinstance(feature, dict)
    and feature.get('_type') == 'ClassLabel'
    and isinstance(feature.get('names'), list)
  }


def _with_labels(row: dict[Any, Any], names: Mapping[str, list[str]]) -> Row:
  for column, labels in names.items():
    value = row.get(column)
    if isinstance(value, int) and 0 <= value < len(labels):
      row[column] = labels[value]
  return row
