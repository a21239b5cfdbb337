"""Pairs of input and target text from what a user has: files, rows, frames.

Columns are found by their names, or named, or put into a template. Every row is checked when it is
read, and a bad one is told with its file and line.
"""

import dataclasses
import hashlib
import itertools
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from t5x_lite.data import records, text_files
from t5x_lite.data.text_files import Bad
from t5x_lite.errors import UsageError, refusing

# Pairs are held in memory, several times over while they are read.
MAX_BYTES = 4 << 30

Paths = str | Sequence[str]
Placed = Iterator[tuple[str, records.Row]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
  """Which fields of a row are the input and the target."""

  input: str = ''  # name, or number from 0 where there is no header; '' to find it
  target: str = ''  # likewise
  template: str = ''  # instead makes the input of several fields, 'summarize: {article}'
  prefix: str = ''  # put before every input, with its space
  skip_bad_rows: bool = False  # leave out rows without input or target, do not refuse them

  def __post_init__(self):
    if self.template and self.input:
      raise UsageError('give the column of the input or a template, not both')
    if self.template and not self.template_fields:
      fix = "write one in braces, as in 'summarize: {article}'"
      raise UsageError(f'the template {self.template!r} names no field; {fix}')

  @property
  def template_fields(self) -> list[str]:
    """Names of the fields in the template."""
    with refusing(f'the template {self.template!r}', ValueError):
      parts = list(string.Formatter().parse(self.template))
    if any(spec or conversion for _, _, spec, conversion in parts):
      raise UsageError(f'the template {self.template!r} has a format; a field is only {{name}}')
    return [name for _, name, _, _ in parts if name is not None]

  @property
  def named(self) -> list[str | int]:
    """The fields that are named, numbers as such."""
    return [field(name) for name in (*self.template_fields, self.input, self.target) if name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
  """Inputs and targets, as many of one as of the other."""

  inputs: list[str]  # prefix and template applied
  targets: list[str]
  places: list[str]  # where each stands, as FILE:LINE
  fields: tuple[str, str]  # names of the input's and the target's columns, for the record
  skipped: int = 0  # bad rows that were left out

  def __len__(self) -> int:
    return len(self.inputs)

  def fingerprint(self) -> str:
    """Returns a short name of the content and its order."""
    sha256 = hashlib.sha256()
    for text in (*self.inputs, *self.targets):
      data = text.encode('utf-8', 'surrogatepass')
      sha256.update(len(data).to_bytes(8, 'little') + data)
    return sha256.hexdigest()[:16]

  def take(self, chosen: Sequence[int]) -> 'Pairs':
    """Returns some of the pairs, in the order given."""
    names = 'inputs', 'targets', 'places'
    return dataclasses.replace(self, **{x: [getattr(self, x)[i] for i in chosen] for x in names})

  def hold_out(self, count: int) -> tuple['Pairs', 'Pairs']:
    """Splits off about `count` pairs: the same ones whatever the order.

    By a hash of the input, so that what occurs twice is never on both sides.
    """
    keys = [hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest() for text in self.inputs]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
      raise UsageError('all inputs are equal: there is nothing to hold out; give a validation file')
    share = min(max(1, count), len(distinct) - 1)
    held = set(distinct[: max(1, round(share * len(distinct) / len(keys)))])
    rest = [i for i, key in enumerate(keys) if key not in held]
    return self.take(rest), self.take([i for i, key in enumerate(keys) if key in held])


def field(name: str) -> str | int:
  """Returns a column's name, or its number if that is what it says."""
  return int(name) if re.fullmatch(r'\d{1,9}', name) else name


def read(
  source: Any, columns: Columns | None = None, *, targets: Paths = (), what: str = 'train'
) -> Pairs:
  """Reads pairs from files, or takes them from memory.

  The source is a path or glob pattern or several: JSONL, JSON, CSV, TSV, Parquet, TFRecord, text of
  input TAB target, plain or compressed, or a folder that `datasets.save_to_disk` wrote. Or what is
  in memory: a list of pairs or of dicts, a dict of lists, a pandas DataFrame, a `datasets.Dataset`.
  Targets may be text files beside it, line by line; then it has inputs alone. Columns are found by
  their names by default. UsageError names file and line of the first fault, or `what` it is in.
  """
  columns = columns or Columns()
  if targets and not is_paths(source):
    raise UsageError('targets in files beside need inputs in files')
  skipped: list[UsageError] = []
  bad = skipped.append if columns.skip_bad_rows else text_files.refuse
  in_files = is_paths(source)
  rows = _of_files(source, columns, targets, bad, what) if in_files else _of_memory(source, what)
  found: list[tuple[str, str, str]] = []
  names: tuple[str, str] | None = None
  for place, row in rows:
    names = names or _choose(row, columns, place)
    try:
      one = _input(row, columns, names[0], place)
      found.append((columns.prefix + one, _filled(row, names[1], place), place))
    except UsageError as error:
      bad(error)
  if names is None or not found:
    raise UsageError(f'{repr(source) if in_files else what} holds no rows')
  inputs, targets, places = map(list, zip(*found, strict=True))
  return Pairs(inputs=inputs, targets=targets, places=places, fields=names, skipped=len(skipped))


def read_inputs(
  path: str, columns: Columns | None = None, *, file_format: str = '', bad: Bad = text_files.refuse
) -> Iterator[str]:
  """Yields the input of every row of a file; of a text file every line is one, blank ones too.

  The column is found by its name by default, or the only one; the format, of records.FORMATS, by
  the file's name. UsageError names file and line, or `bad` is told and the row left out.
  """
  columns = columns or Columns()
  if records.format_of(path, file_format) == 'text':
    if columns.named:
      what = f'{path} is text, a line an input, without a field {columns.named[0]!r}'
      raise UsageError(f'{what}: leave field and template out, or say its format, such as tsv')
    for _, line in text_files.lines(path, bad=bad):
      yield columns.prefix + line
    return
  name = ''
  for number, row in records.read(path, columns.named, file_format, bad=bad):
    place = f'{path}:{number}'
    if not (name or columns.template):
      alone = str(next(iter(row))) if len(row) == 1 else ''
      name = columns.input or alone or _known(row, records.INPUT_NAMES, '')
      if not name:
        raise _unclear('input', row, place, '--field')
    try:
      text = _input(row, columns, name, place, empty=True)  # an empty input has an output too
    except UsageError as error:
      bad(error)
    else:
      yield columns.prefix + text


def split_of(source: Any, split: str) -> str:
  """Returns the folder of a split that a saved DatasetDict has, else ''."""
  paths = [source] if isinstance(source, str | os.PathLike) else source
  if not is_paths(source) or len(paths) != 1:
    return ''
  return records.dataset_splits(os.fspath(paths[0])).get(split, '')


def is_paths(source: Any) -> bool:
  """Whether a source names files, and is not rows itself."""
  several = isinstance(source, Sequence) and not isinstance(source, str) and bool(source)
  return all(isinstance(one, str | os.PathLike) for one in (source if several else [source]))


# ---- Rows of files and of memory ---------------------------------------------


def _of_files(source: Any, columns: Columns, targets: Paths, bad: Bad, split: str) -> Placed:
  paths = text_files.expand(source)
  files = [path for path in paths if not text_files.is_dataset_folder(path)]
  if (size := text_files.total_bytes(files)) > MAX_BYTES:
    what = f'{len(paths)} files of {size / 1e9:.1f} GB are more than is held in memory'
    fix = 'fine-tune on a part, or write a task with a streaming source and use `t5x-lite train`'
    raise UsageError(f'{what} ({MAX_BYTES >> 30} GiB): {fix}')
  if targets:
    yield from _parallel(paths, text_files.expand(targets))
    return
  for path in paths:
    parts = records.dataset_splits(path)
    part = parts.get(split, next(iter(parts.values())) if len(parts) == 1 else path)
    for number, row in records.read(part, columns.named, bad=bad):
      yield f'{path}:{number}', row


def _parallel(paths: Sequence[str], others: Sequence[str]) -> Placed:
  """Yields rows of two files that have as many lines."""
  if len(paths) != len(others):
    raise UsageError(f'there are {len(paths)} files of inputs and {len(others)} of targets')
  for path, other in zip(paths, others, strict=True):
    both = itertools.zip_longest(text_files.lines(path), text_files.lines(other))
    for count, (one, two) in enumerate(both):
      if one is None or two is None:
        short, long = (path, other) if one is None else (other, path)
        raise UsageError(f'{short} has {count} lines, {long} has more')
      if one[1].strip() or two[1].strip():
        yield f'{path}:{one[0]}', {'input': one[1], 'target': two[1]}


def _of_memory(source: Any, what: str) -> Placed:
  """Yields rows of a list, a dict of columns, a DataFrame or a Dataset."""
  labels, narrow = dict[str, list[str]](), list[str]()
  if hasattr(source, 'to_dict') and hasattr(source, 'columns'):  # pandas
    narrow = [str(k) for k, kind in source.dtypes.items() if kind == 'float32']
    source = {str(k): list(v) for k, v in source.to_dict('list').items()}
  elif hasattr(source, 'column_names') and hasattr(source, 'features'):
    if isinstance(source, Mapping):  # a DatasetDict
      raise UsageError(f'{what} is a DatasetDict of {", ".join(source)}: give one split of it')
    kinds = source.features.items()
    narrow = [name for name, kind in kinds if getattr(kind, 'dtype', '') == 'float32']
    found = {name: getattr(kind, 'names', None) for name, kind in kinds}
    labels = {name: names for name, names in found.items() if isinstance(names, list)}
    source = source.to_dict()
  if isinstance(source, Mapping):
    lengths = {name: len(values) for name, values in source.items()}
    if len(set(lengths.values())) > 1:
      raise UsageError(f'the columns of {what} differ in length: {lengths}')
    values = zip(*source.values(), strict=True)
    rows: Iterable[Any] = (dict(zip(source, row, strict=True)) for row in values)
  elif isinstance(source, Sequence):
    rows = source
  else:
    known = 'a path, a list of (input, target) pairs or of dicts, a DataFrame or a datasets.Dataset'
    raise UsageError(f'{what} is a {type(source).__name__}; give {known}')
  for number, row in enumerate(rows, start=1):
    place = f'{what}:{number}'
    if isinstance(row, Mapping):
      yield place, records.with_labels(row, labels, narrow)
    elif isinstance(row, Sequence) and len(row) == 2 and not isinstance(row, str | bytes):
      yield place, {'input': row[0], 'target': row[1]}
    else:
      raise UsageError(f'{place} is {row!r:.60}: neither an (input, target) pair nor a dict')


# ---- Columns -----------------------------------------------------------------


def _choose(row: records.Row, columns: Columns, place: str) -> tuple[str, str]:
  """Returns the names of the input's and the target's column, or asks for them."""
  numbered = all(isinstance(name, int) for name in row)
  found = ('0', '1')
  if not numbered or len(row) != 2:
    found = (
      _known(row, records.INPUT_NAMES, columns.target),
      _known(row, records.TARGET_NAMES, columns.input),
    )
  one = columns.input or ('' if columns.template else found[0])
  other = columns.target or found[1]
  if not columns.template and not one:
    raise _unclear('input', row, place)
  if not other or other == one:
    raise _unclear('target', row, place)
  second = _known(row, records.SECOND_INPUT_NAMES, one)
  if not (columns.input or columns.template or numbered or second in ('', other)):
    fix = f"Say --input_column {one}, or --template '{{{second}}} {{{one}}}'"
    raise UsageError(f'{place}: is the input {one!r} alone, or {second!r} too? {fix}')
  return one or columns.template, other


def _known(row: records.Row, names: Sequence[str], taken: str) -> str:
  lower = {str(name).strip().lower(): str(name) for name in row}
  return next((lower[name] for name in names if lower.get(name, taken) != taken), '')


def _unclear(which: str, row: records.Row, place: str, flag: str = '') -> UsageError:
  shown, flag = ', '.join(map(repr, row)), flag or f'--{which}_column'
  return UsageError(f'{place}: which of the columns {shown} is the {which}? Say {flag}')


def _input(
  row: records.Row, columns: Columns, name: str, place: str, *, empty: bool = False
) -> str:
  if not columns.template:
    return _filled(row, name, place, empty=empty)
  # Not str.format: that would read 'a.b' and numbers in its own way.
  return ''.join(
    text if name is None else text + _filled(row, name, place, empty=empty)
    for text, name, _, _ in string.Formatter().parse(columns.template)
  )


def _filled(row: records.Row, name: str, place: str, *, empty: bool = False) -> str:
  text = records.as_text(row, name if name in row else field(name), place)
  if not empty and not text.strip():
    fix = 'fill it, or leave such rows out with --skip_bad_rows'
    raise UsageError(f'{place}: the field {name!r} is empty; {fix}')
  return text
