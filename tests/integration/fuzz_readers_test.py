"""Readers of rows and the gin front, on input that nobody meant.

Whatever the bytes are: rows, or one UsageError. Never another exception, never
a text that was not in the file.
"""

import ast
import csv
import gzip
import io
import json
import os
import pathlib
import tempfile

import hypothesis
import pytest
from hypothesis import strategies as st

from t5x_lite.data import pairs, records
from t5x_lite.errors import UsageError
from t5x_lite.gin_front import configuration

# FUZZ_SCALE=20 tries twenty times as many; without it the inputs are the same
# on every machine. docs/reliability.md counts them.
SCALE = int(os.environ.get('FUZZ_SCALE', '1'))
settings = hypothesis.settings(
  deadline=None,
  derandomize=SCALE == 1,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)

ROWS = [
  {'input': f'the {word} house', 'target': target, 'id': i}
  for i, (word, target) in enumerate(
    [('red', 'a'), ('"blue"', 'b, c'), ('grün\n', 'd;e'), ('x', '1')]
  )
]


@pytest.fixture(scope='module')
def folder():
  with tempfile.TemporaryDirectory() as name:
    yield pathlib.Path(name)


def refused_or(call):
  """Returns what a call returns, or None if it is a mistake of the user."""
  try:
    return call()
  except UsageError as error:
    # What main prints of it is one line, and not an empty one.
    assert str(error).strip()
    return None


def read(path):
  """Reads a file in every way there is; returns its rows."""
  found = refused_or(lambda: list(records.read(str(path))))
  refused_or(lambda: list(records.rows(str(path), ['input', 'target'])))
  refused_or(lambda: list(records.texts(str(path))))
  made = refused_or(lambda: pairs.read(str(path)))
  if made is not None:
    made.fingerprint()
    for text in (*made.inputs, *made.targets):
      text.encode('utf-8')  # what every vocabulary does
  return found


def mutated(data):
  """A strategy: good bytes with some flipped, cut out or put in."""
  place = st.integers(0, max(0, len(data) - 1))
  edit = st.one_of(
    st.tuples(st.just('flip'), place, st.integers(1, 255)),
    st.tuples(st.just('cut'), place, st.integers(1, len(data))),
    st.tuples(st.just('put'), place, st.binary(min_size=1, max_size=4)),
  )

  def apply(edits):
    found = bytearray(data)
    for kind, at, what in edits:
      at = min(at, len(found))
      if kind == 'cut':
        del found[at : at + what]
      elif kind == 'put':
        found[at:at] = what
      elif at < len(found):
        found[at] ^= what
    return bytes(found)

  return st.lists(edit, min_size=1, max_size=4).map(apply)


def json_values(*special):
  """Any JSON, with values that mean something put among it."""
  leaf = st.one_of(
    st.sampled_from(special),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
  )
  return st.recursive(
    leaf,
    lambda inner: st.one_of(
      st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
  )


# ---- Files of rows -----------------------------------------------------------

ENDINGS = ('txt', 'tsv', 'csv', 'jsonl', 'json', 'parquet', 'csv.gz')
# What these formats are made of, so that more than the first byte is read.
PIECES = [
  *(b'"', b'""', b',', b';', b'\t', b'\n', b'\r\n', b'\r', b'\0', b'\\'),
  *(b'{', b'}', b'[', b']', b':', b'null', b'NaN', b'1e999', b'-', b'true'),
  *(b'input', b'target', b'"input":', b'"target":', b'"x"', b'"\\ud800"'),
  *(b'\xff', b'\xef\xbb\xbf', b'\xc3\xa9', b' ', b'PAR1', b'\x1f\x8b\x08'),
]


@pytest.mark.parametrize('ending', ENDINGS)
def test_arbitrary_bytes(folder, ending):
  @hypothesis.settings(settings, max_examples=75 * SCALE)
  @hypothesis.given(
    st.one_of(
      st.binary(max_size=60),
      st.lists(st.sampled_from(PIECES), max_size=40).map(b''.join),
      # Lines that are whole.
      st.lists(json_values(*ROWS), max_size=3).map(
        lambda values: b'\n'.join(json.dumps(v).encode() for v in values)
      ),
      st.dictionaries(
        st.sampled_from(['input', 'target', 'label']),
        st.one_of(st.text(st.characters(), max_size=4), json_values('a')),
        min_size=2,
      ).map(lambda row: json.dumps(row).encode()),
      # A header makes the rest rows.
      st.lists(st.sampled_from(PIECES), max_size=40).map(
        lambda parts: b'input,target\n' + b''.join(parts)
      ),
    )
  )
  def check(data):
    path = folder / f'any.{ending}'
    path.write_bytes(data)
    read(path)

  check()


def good_file(ending):
  text = io.StringIO()
  if ending == 'jsonl':
    text.writelines(json.dumps(row) + '\n' for row in ROWS)
  elif ending == 'json':
    json.dump({'version': 1, 'data': ROWS}, text, indent=1)
  else:
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
  data = text.getvalue().encode()
  if ending == 'tsv':
    data = b'input\ttarget\na b\tc\nd e\tf\n'
  if ending == 'csv.gz':
    data = gzip.compress(data, mtime=0)
  if ending == 'parquet':
    pandas = pytest.importorskip('pandas')
    file = io.BytesIO()
    pandas.DataFrame(ROWS).to_parquet(file)
    data = file.getvalue()
  return data


@pytest.mark.parametrize('ending', ENDINGS[1:])
def test_damaged_files(folder, ending):
  data = good_file(ending)
  path = folder / f'damaged.{ending}'
  path.write_bytes(data)
  assert read(path)

  @hypothesis.settings(settings, max_examples=75 * SCALE)
  @hypothesis.given(mutated(data))
  def check(changed):
    path.write_bytes(changed)
    read(path)

  check()


@hypothesis.settings(settings, max_examples=100 * SCALE)
@hypothesis.given(st.data())
def test_damaged_saved_datasets(saved_dataset, data):
  files = {
    'dataset_dict.json': ['splits'],
    'train/state.json': ['_data_files'],
    'train/data-00000-of-00001.arrow': [],
  }
  name = data.draw(st.sampled_from(sorted(files)))
  path = saved_dataset / name
  good = path.read_bytes()
  how = st.one_of(mutated(good), st.binary(max_size=20))
  for key in files[name]:
    values = json_values('train', 'data-00000-of-00001.arrow', '..', 'a\0b')
    entry = st.fixed_dictionaries({key: values})
    files_of = st.fixed_dictionaries(
      {key: st.lists(st.fixed_dictionaries({'filename': values}), max_size=2)}
    )
    encoded = st.one_of(entry, files_of, values).map(lambda value: json.dumps(value).encode())
    how = st.one_of(how, encoded)
  try:
    path.write_bytes(data.draw(how))
    refused_or(lambda: records.dataset_splits(str(saved_dataset)))
    refused_or(lambda: pairs.read(str(saved_dataset)))
    read(saved_dataset / 'train')
  finally:
    path.write_bytes(good)


@pytest.fixture(scope='module')
def saved_dataset(folder):
  datasets = pytest.importorskip('datasets')
  made = datasets.Dataset.from_list(ROWS).class_encode_column('target')
  datasets.DatasetDict(train=made).save_to_disk(str(folder / 'saved'))
  assert len(pairs.read(str(folder / 'saved'))) == len(ROWS)
  return folder / 'saved'


# What a user's text may hold: all of Unicode but halves of pairs, which UTF-8
# cannot say. Blank rows are skipped on purpose.
TEXTS = st.text(st.characters(exclude_categories=['Cs']), max_size=20).filter(str.strip)
LISTS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)
WRITERS = {
  'csv': 'csv',
  'semicolons': 'csv',
  'csv.gz': 'csv.gz',
  'jsonl': 'jsonl',
  'ascii': 'jsonl',
  'json': 'json',
  'pandas_csv': 'csv',
  'pandas_parquet': 'parquet',
  'pandas_records': 'json',
  'pandas_lines': 'jsonl',
}


def write(path, how, rows):
  if how.startswith('pandas'):
    pandas = pytest.importorskip('pandas')
    frame = pandas.DataFrame(rows, columns=['input', 'target'])
    if how == 'pandas_csv':
      frame.to_csv(path, index=False)
    elif how == 'pandas_parquet':
      frame.to_parquet(path)
    else:
      frame.to_json(path, orient='records', lines=how == 'pandas_lines')
    return
  text = io.StringIO()
  if 'js' in how or how == 'ascii':
    objects = [{'input': one, 'target': other} for one, other in rows]
    ascii_ = how == 'ascii'
    if how == 'json':
      json.dump(objects, text, ensure_ascii=ascii_)
    else:
      for entry in objects:
        text.write(json.dumps(entry, ensure_ascii=ascii_) + '\n')
  else:
    writer = csv.writer(text, delimiter=';' if how == 'semicolons' else ',')
    writer.writerows([('input', 'target'), *rows])
  data = text.getvalue().encode()
  path.write_bytes(gzip.compress(data) if how == 'csv.gz' else data)


@pytest.mark.parametrize('how', sorted(WRITERS))
def test_what_was_written_is_read(folder, how):
  path = folder / f'round.{how}.{WRITERS[how]}'

  @hypothesis.settings(settings, max_examples=40 * SCALE)
  @hypothesis.example([('a\r\nb', 'c\rd')])
  @hypothesis.example([('nan', 'NaN'), ('None', 'null')])
  @hypothesis.given(LISTS)
  def check(rows):
    # pandas puts no quotes around a carriage return, so nobody can tell it
    # from the end of a line.
    hypothesis.assume(how != 'pandas_csv' or '\\r' not in repr(rows))
    write(path, how, rows)
    found = pairs.read(str(path))
    assert list(zip(found.inputs, found.targets, strict=True)) == rows

  check()


# ---- gin ---------------------------------------------------------------------


def program(*, value=0, other='', third=None):
  """Stands for a command."""
  return value, other, third


PYTHON_VALUES = st.recursive(
  st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
  ),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.tuples(inner, inner),
    st.dictionaries(st.text(max_size=3), inner, max_size=3),
  ),
  max_leaves=5,
)
NAMES = st.one_of(
  st.sampled_from(['program.value', 'program.other', 'program.x', 'a/program.value', 'M']),
  # main takes no name with a blank or '='.
  st.text(min_size=1, max_size=12).filter(
    lambda name: '=' not in name and not any(map(str.isspace, name))
  ),
  st.text('ab./_1@%', min_size=1, max_size=8),
)
VALUES = st.one_of(
  st.text(max_size=16),
  st.text('[](){},:\'"\\\n#@%=+-1e. x', max_size=16),
  PYTHON_VALUES.map(repr),
  st.sampled_from(['[' * 3000, '(' * 3000, '1' * 5000, '-' * 3000]),
)


@hypothesis.settings(settings, max_examples=150 * SCALE)
@hypothesis.given(NAMES, VALUES)
def test_any_binding(name, text):
  def configure():
    statement = configuration.binding(name, text)
    return configuration.configure(program, bindings=[statement])

  configured = refused_or(configure)
  if configured is not None and name in ('program.value', 'program.other'):
    [*values, _] = configured.call()
    value = values[name == 'program.other']
    # A carriage return ends a statement for Python, not for gin.
    assert value == expected(text) or set(text) & set('@%\r')


def expected(text):
  """Returns the Python literal that a text is, else the text."""
  try:
    return ast.literal_eval(text.strip())
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    return text


@hypothesis.settings(settings, max_examples=150 * SCALE)
@hypothesis.given(PYTHON_VALUES)
def test_a_python_value_is_itself(value):
  for name in ('value', 'other'):
    statement = configuration.binding(f'program.{name}', repr(value))
    found = configuration.configure(program, bindings=[statement]).call()
    assert found[name == 'other'] == value


@hypothesis.settings(settings, max_examples=150 * SCALE)
@hypothesis.given(
  st.one_of(
    st.text(max_size=40),
    st.text('[](){},:\'"\\\n#@%=+-1e. programvlue', max_size=40),
    mutated(b'# all\nM = 3\nprogram.value = %M\nprogram.other = "x"\n').map(
      lambda data: data.decode('latin-1')
    ),
  )
)
def test_any_gin_file(folder, text):
  path = folder / 'any.gin'
  path.write_text(text)
  refused_or(lambda: configuration.configure(program, gin_files=[str(path)]))
