"""Reads rows with named fields from any file: JSONL, CSV, Parquet, TFRecord, and others.

A row comes with the line that it stands on, so that every mistake in a file can
be told with its place. No row is lost in silence, and TensorFlow loads for TFRecords alone.
"""

import collections
import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from etils import epath

from t5x_lite.data import text_files
from t5x_lite.data.text_files import Bad, refuse
from t5x_lite.errors import UsageError, first_line, refusing

Format = Literal['text', 'tsv', 'csv', 'jsonl', 'json', 'parquet', 'tfrecord', 'datasets']
FORMATS: tuple[Format, ...] = get_args(Format)

# Columns that are found by themselves, the likeliest first.
INPUT_NAMES = (
  'input inputs source src text question sentence prompt instruction document article dialogue '
  'passage query word en'
).split()
# Beside one of those they are a second half of the input.
SECOND_INPUT_NAMES = 'instruction context passage hypothesis sentence2'.split()
TARGET_NAMES = (
  'target targets output outputs label labels tgt summary highlights answer answers translation '
  'completion response reference category class'
).split()

Row = Mapping[str | int, Any]
Fields = Sequence[str | int]
_MISSING = object()


def format_of(path: str, file_format: str = '') -> Format:
  """Returns a file's or folder's format: as said, else by its name; UsageError if unknown."""
  if file_format in FORMATS:
    return file_format
  if file_format:
    raise UsageError(f'The file format is {file_format!r}; it must be one of {", ".join(FORMATS)}')
  if text_files.is_dataset_folder(path):
    return 'datasets'
  bare = path.removesuffix('.gz').removesuffix('.zst').lower()
  ending = os.path.splitext(bare)[1].removeprefix('.')
  ending = 'jsonl' if ending == 'ndjson' else ending
  ending = 'tfrecord' if ending.startswith('tfrecord') else ending  # .tfrecord-00000-of-00008
  return next((f for f in FORMATS if f == ending and f != 'datasets'), 'text')


def dataset_splits(path: str) -> dict[str, str]:
  """Returns the folders of a saved DatasetDict by split; else nothing."""
  root = epath.Path(path)
  file = root / text_files.DATASET_SPLITS_FILE
  names = _listed(file, 'splits') if file.exists() else ()
  return {str(name): os.fspath(root / _inside(root, name)) for name in names}


# ---- Rows --------------------------------------------------------------------


def rows(path: str, fields: Fields, file_format: str = '') -> Iterator[tuple[str, ...]]:
  """Yields the named fields (see `read`) of every row that is not blank, as text.

  Of text a row is a line, whatever the fields. UsageError with file and line, if it lacks one.
  """
  if format_of(path, file_format) == 'text':
    yield from ((line,) for _, line in text_files.lines(path) if line.strip())
    return
  for number, row in read(path, fields, file_format):
    yield tuple(as_text(row, field, f'{path}:{number}') for field in fields)


def texts(path: str, fields: Fields = (), file_format: str = '') -> Iterator[str]:
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
  path: str, fields: Fields = (), file_format: str = '', *, bad: Bad = refuse
) -> Iterator[tuple[int, Row]]:
  """Yields (line, or number of the row, from 1; the row by its fields' names).

  The path is a file's, or a folder's that `datasets.save_to_disk` wrote, and its format one of
  FORMATS but 'text', told by the name if empty. Fields are those that will be asked for: names; or,
  of TSV and CSV, columns by number from 0. There the first line is a header with names, none with
  numbers, and without either its looks decide. UsageError naming file and line, if something cannot
  be read; rows of which `bad` is told instead are left out.
  """
  kind = format_of(path, file_format)
  if kind in ('tsv', 'csv', 'text'):
    return _delimited(path, 'csv' if kind == 'csv' else 'tsv', fields, bad)
  if kind in ('parquet', 'datasets'):
    return _arrow([epath.Path(path)], is_parquet=True) if kind == 'parquet' else _dataset(path)
  if kind == 'tfrecord':
    with refusing(f'{path}: TFRecords need TensorFlow, which is missing', ImportError):
      from t5x_lite.data import tfrecords
    return tfrecords.read(path, bad)
  return (_jsonl if kind == 'jsonl' else _json)(path, bad)


def as_text(row: Row, field: str | int, place: str) -> str:
  """Returns a field as text; 'a.b' is b of the object a, '' is not a number.

  UsageError if it is not there, neither text nor a number, or no Unicode.
  """
  value: Any = row
  for part in field.split('.') if isinstance(field, str) and field not in row else [field]:
    value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    what = 'not there' if value is _MISSING else type(value).__name__
    found = f'{what}. The fields are {", ".join(map(repr, row))}'
    raise UsageError(f'{place}: the field {field!r} must be text or a number; it is {found}')
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


def _cells(path: str, kind: str, bad: Bad = refuse) -> Iterator[tuple[int, list[str]]]:
  """Yields the cells of every line that is not blank, and its number."""
  if kind == 'tsv':
    # Quotes are characters like any other, not CSV.
    for number, line in text_files.lines(path, bad=bad):
      if line.strip(' '):
        yield number, line.split('\t')
    return
  # With their ends: between quotes these are part of the text.
  lines = (line for _, line in text_files.lines(path, keep_ends=True, bad=bad))
  first = next(lines, '')
  # What spreadsheets write where the comma is in the numbers.
  delimiter = next((one for one in ',;\t' if one in first), ',')
  csv.field_size_limit(2**31 - 1)  # 131,072 characters otherwise
  reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
  start = 1
  while True:
    try:
      cells = next(reader, None)
    except csv.Error as error:
      to = f' (to line {reader.line_num})' if reader.line_num > start else ''
      wrong = UsageError(f'{path}:{start} is not CSV: {error}{to}')
      if 'end of data' in str(error):  # a quote was left open, and all that follows is in it
        raise wrong from error
      bad(wrong)
    else:
      if cells is None:
        return
      if any(map(str.strip, cells)):
        yield start, cells
    start = reader.line_num + 1


def _delimited(path: str, kind: str, fields: Fields, bad: Bad) -> Iterator[tuple[int, Row]]:
  names: Fields = ()
  for number, cells in _cells(path, kind, bad):
    if not names:
      names = _column_names(path, cells, fields)
      if isinstance(names[0], str):
        continue
    if len(cells) != len(names):
      mend = 'put a field that holds a comma in double quotes'
      if kind == 'tsv':
        mend = 'write a tab inside a field as a space'
      what = f'{path}:{number} has {len(cells)} columns, the first line {len(names)}; {mend}'
      bad(UsageError(what))
      continue
    yield number, dict(zip(names, cells, strict=True))


def _column_names(path: str, cells: Sequence[str], fields: Fields) -> Fields:
  """Returns the header, or column numbers if the first line is none."""
  named = [field for field in fields if isinstance(field, str)]
  for field in fields:
    if isinstance(field, str) and field not in cells:
      raise UsageError(
        f'{path} has no column {field!r} in its first line, which reads '
        f'{", ".join(map(repr, cells))}; name one of these, or give column numbers from 0 if there '
        'is no header'
      )
    if isinstance(field, int) and not 0 <= field < len(cells):
      counted = f'there is no column {field} (counted from 0)'
      raise UsageError(f'{path} has {len(cells)} columns; {counted}')
  if named or (not fields and _is_header(path, cells)):
    for name in cells:
      if cells.count(name) > 1:
        raise UsageError(f'{path} names the column {name!r} twice in its first line')
    if named and len(named) < len(fields):  # a number beside a name
      return [i if i in fields else name for i, name in enumerate(cells)]
    return list(cells)
  return range(len(cells))


def _is_header(path: str, cells: Sequence[str]) -> bool:
  """Tells a header by its looks; refuses what may be an example too."""
  names = {cell.strip().lower() for cell in cells}
  known = [bool(names & set(one)) for one in (INPUT_NAMES, TARGET_NAMES)]
  like_names = all(cell.strip().isidentifier() for cell in cells)
  if all(known) or (any(known) and like_names):
    return True
  if like_names:
    raise UsageError(
      f'{path} begins with {", ".join(map(repr, cells))}: a header or an example? Say which '
      'columns are meant, by name or, if there is no header, by number from 0'
    )
  return False


# ---- JSON --------------------------------------------------------------------


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  entry = dict(pairs)
  if len(entry) < len(pairs):
    [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
    raise ValueError(f'the key {name!r} is there twice')
  return entry


def _loads(text: str, place: str) -> Any:
  try:  # not `refusing`: this is done for every line
    return json.loads(text, object_pairs_hook=_no_duplicates)
  except ValueError as error:
    raise UsageError(f'{place} is not JSON: {error}') from error
  except RecursionError:
    raise UsageError(f'{place} is JSON nested too deeply') from None


def _jsonl(path: str, bad: Bad) -> Iterator[tuple[int, Row]]:
  for number, line in text_files.lines(path, bad=bad):
    if line.strip():
      try:
        yield number, _object(_loads(line, f'{path}:{number}'), path, number)
      except UsageError as error:
        bad(error)


def _object(entry: Any, path: str, number: int) -> Row:
  if not isinstance(entry, dict):
    raise UsageError(f'{path}:{number} is not a JSON object but {type(entry).__name__}')
  return entry


def _json(path: str, bad: Bad) -> Iterator[tuple[int, Row]]:
  """Yields rows of a list of objects, alone or in an object, or of lines."""
  lines = text_files.lines(path)
  first = next((line.strip() for _, line in lines if line.strip()), '')
  if first.startswith('{') and first.endswith('}') and len(first) > 2:
    try:
      alone = json.loads(first)
    except (ValueError, RecursionError):
      alone = {}
    if alone and _list_in(alone) is None:
      yield from _jsonl(path, bad)
      return
  text = '\n'.join(line for _, line in text_files.lines(path))
  entry = _loads(text, path) if text.strip() else []
  listed = entry if isinstance(entry, list) else _list_in(entry)
  if listed is None:
    fix = 'write [{...}, {...}], or one object a line in a .jsonl file'
    raise UsageError(f'{path} holds no list of objects; {fix}')
  for number, item in enumerate(listed, start=1):
    try:
      yield number, _object(item, path, number)
    except UsageError as error:
      bad(error)


def _list_in(entry: Any) -> list[Any] | None:
  """Returns the one list of objects in an object, as {"data": [...]}."""
  values = entry.values() if isinstance(entry, dict) else ()
  lists = [one for one in values if isinstance(one, list) and one and isinstance(one[0], dict)]
  return lists[0] if len(lists) == 1 else None


def _listed(path: epath.Path, key: str) -> list[Any]:
  """Returns the list that a JSON object in a file has under a key."""
  with refusing(f'{path} cannot be read', OSError, UnicodeDecodeError):
    entry = _loads(path.read_text(encoding='utf-8'), os.fspath(path))
  listed = entry.get(key) if isinstance(entry, dict) else None
  if not isinstance(listed, list):
    raise UsageError(f'{path} is not a JSON object with a list {key!r}')
  return listed


# ---- Arrow: Parquet and saved datasets ---------------------------------------


def _arrow(files: Sequence[epath.Path], *, is_parquet: bool) -> Iterator[tuple[int, Row]]:
  """Yields the rows of files of record batches, numbered through."""
  import pyarrow
  from pyarrow import parquet

  open_file: Any = parquet.ParquetFile if is_parquet else pyarrow.ipc.open_stream
  number = 0
  for path in files:
    try:
      with path.open('rb') as raw, open_file(raw) as file:
        schema = file.schema_arrow if is_parquet else file.schema
        labels = _label_names(schema)
        narrow = [one.name for one in schema if one.type == pyarrow.float32()]
        for name in schema.names:
          if schema.names.count(name) > 1:
            raise UsageError(f'{path} names the column {name!r} twice')
        for batch in file.iter_batches(batch_size=1024) if is_parquet else file:
          # Arrow takes lengths and offsets in a file at their word unless asked.
          batch.validate(full=True)
          for row in batch.to_pylist():
            number += 1
            yield number, with_labels(row, labels, narrow)
    except UsageError:
      raise
    # What a damaged file raises, or a value that Python lacks.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
      problem = 'is not a whole Parquet file' if is_parquet else 'cannot be read'
      raise UsageError(f'{path} {problem} after row {number}: {first_line(error)}') from error


def _dataset(path: str) -> Iterator[tuple[int, Row]]:
  """Yields rows of one split as `datasets.save_to_disk` writes it."""
  root = epath.Path(path)
  if splits := dataset_splits(path):
    raise UsageError(f'{path} holds the splits {", ".join(splits)}: name one of its folders')
  listed = _listed(root / text_files.DATASET_FILE, '_data_files')
  names = (entry.get('filename') if isinstance(entry, dict) else entry for entry in listed)
  return _arrow([root / _inside(root, name) for name in names], is_parquet=False)


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


def shortest(number: float) -> float:
  """Returns a float32 as it is written: 0.1, not 0.10000000149011612."""
  return float(str(np.float32(number)))


def with_labels(row: Row, names: Mapping[str, list[str]], narrow: Sequence[str]) -> Row:
  """Returns a row with labels for their numbers, by column in `names`, and short float32."""
  given = {x: shortest(row[x]) for x in narrow if row.get(x) is not None}
  given |= {
    column: labels[row[column]]
    for column, labels in names.items()
    if isinstance(row.get(column), int) and 0 <= row[column] < len(labels)
  }
  return {**row, **given}
