import gzip
import json

import numpy as np
import pytest

from t5x_lite.data import records
from t5x_lite.errors import UsageError

# Characters at which str.splitlines cuts, quotes, and a lone carriage return.
ODD = 'a\u2028b\x0bc\x0cd\x1ce\x85f\u2029g "q" \'r\r s'


def write(path, data):
  data = data.encode() if isinstance(data, str) else data
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return str(path)


@pytest.mark.parametrize('name', ['x.tsv', 'x.tsv.gz'])
def test_tsv_keeps_odd_rows(tmp_path, name):
  path = write(tmp_path / name, f'{ODD}\t1\t\n\n\t\t\n"x\t2\ty"\n')
  assert list(records.rows(path, [0, 1])) == [(ODD, '1'), ('', ''), ('"x', '2')]
  assert list(records.rows(path, [2])) == [('',), ('',), ('y"',)]


def test_tsv_columns_by_name(tmp_path):
  path = write(tmp_path / 'x.tsv', '\ufeffid\ten\tde\n1\tyes\tja\n')
  assert list(records.rows(path, ['de', 'en'])) == [('ja', 'yes')]
  assert list(records.rows(path, ['id'])) == [('1',)]
  with pytest.raises(UsageError, match=r"no column 'fr'.*'id', 'en', 'de'"):
    list(records.rows(path, ['fr']))
  with pytest.raises(UsageError, match=r'3 columns; there is no column 3'):
    list(records.rows(path, [3]))


def test_a_torn_tsv_row_is_named(tmp_path):
  path = write(tmp_path / 'x.tsv', 'a\tb\nc\td\te\n')
  with pytest.raises(UsageError, match=r'x\.tsv:2 has 3 columns'):
    list(records.rows(path, [0, 1]))


def test_jsonl(tmp_path):
  entries = [{'q': ODD, 'a': 'x\ny', 'n': 1}, {'q': 'Ü', 'a': '', 'n': 2.5, 'more': None}]
  text = '\n'.join(json.dumps(entry) for entry in entries) + '\n\n'
  path = write(tmp_path / 'x.jsonl', text)
  assert list(records.rows(path, ['q', 'a'])) == [
    (ODD, 'x\ny'), ('Ü', ''),
  ]  # fmt: skip
  assert list(records.rows(path, ['n'])) == [('1',), ('2.5',)]


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"q": 1', ':2 is not JSON'),
    ('["q"]', ':2 is not a JSON object but list'),
    ('{"p": "x"}', "'q' must be text or a number; it is not there.*'p'"),
    ('{"q": null}', 'it is NoneType'),
    ('{"q": true}', 'it is bool'),
    ('{"q": ["x"]}', 'it is list'),
  ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
  path = write(tmp_path / 'x.jsonl', '{"q": "fine"}\n' + line + '\n')
  with pytest.raises(UsageError, match=message):
    list(records.rows(path, ['q']))


def test_format_of():
  assert records.format_of('x.tsv.gz') == 'tsv'
  assert records.format_of('x.jsonl') == 'jsonl'
  assert records.format_of('x.md') == 'text'
  assert records.format_of('x.md', 'tsv') == 'tsv'
  assert records.format_of('x.CSV.gz') == 'csv'
  assert records.format_of('x.json') == 'json'
  with pytest.raises(UsageError, match=r"'xml'; it must be one of text, tsv"):
    records.format_of('x.csv', 'xml')


def test_texts_takes_all_there_is_or_the_fields(tmp_path):
  tsv = write(tmp_path / 'x.tsv', 'a\tb\nc\n')
  assert list(records.texts(tsv)) == ['a', 'b', 'c']
  jsonl = write(tmp_path / 'x.jsonl', '{"q": "x", "n": 1, "a": "y"}\n')
  assert list(records.texts(jsonl)) == ['x', 'y']
  assert list(records.texts(jsonl, ['a'])) == ['y']
  text = write(tmp_path / 'x.txt', 'a\tb\n\nc\n')
  assert list(records.texts(text)) == ['a\tb', 'c']


def all_rows(path, fields=()):
  return list(records.read(str(path), fields))


def test_text_is_a_row_a_line(tmp_path):
  path = write(tmp_path / 'x.txt', f'{ODD}\r\n\n  \nlast')
  assert list(records.rows(path, [])) == [(ODD,), ('last',)]


# ---- CSV ----


def test_csv_with_quotes_newlines_and_semicolons(tmp_path):
  text = 'text,label\n"a, ""b""\nc",x\n\n  plain ,y\r\n'
  path = write(tmp_path / 'x.csv.gz', text)
  assert all_rows(path) == [
    (2, {'text': 'a, "b"\nc', 'label': 'x'}),
    (5, {'text': '  plain ', 'label': 'y'}),
  ]
  path = write(tmp_path / 'x.csv', 'input;target\n"1,5";2\n')
  assert all_rows(path) == [(2, {'input': '1,5', 'target': '2'})]


def test_csv_errors_name_the_line(tmp_path):
  path = write(tmp_path / 'x.csv', 'text,label\na,b\nc\n')
  with pytest.raises(UsageError, match=r'x\.csv:3 has 1 columns'):
    all_rows(path)
  path = write(tmp_path / 'x.csv', 'text,label\n"never closed,b\nc,d\n')
  with pytest.raises(UsageError, match=r'x\.csv:2 is not CSV'):
    all_rows(path)
  path = write(tmp_path / 'x.csv', 'text,text,label\na,b,c\n')
  with pytest.raises(UsageError, match=r"names the column 'text' twice"):
    all_rows(path)


def test_a_header_is_told_by_its_looks_or_asked_for(tmp_path):
  path = write(tmp_path / 'x.tsv', 'Hello there\tHallo\n')
  assert all_rows(path) == [(1, {0: 'Hello there', 1: 'Hallo'})]
  path = write(tmp_path / 'x.tsv', 'Source\tTarget\na\tb\n')
  assert all_rows(path) == [(2, {'Source': 'a', 'Target': 'b'})]
  path = write(tmp_path / 'x.tsv', 'review\tstars\nfine\t4\n')
  with pytest.raises(UsageError, match=r'a header or an example\?'):
    all_rows(path)
  assert all_rows(path, ['stars']) == [(2, {'review': 'fine', 'stars': '4'})]
  assert len(all_rows(path, [0, 1])) == 2


def test_a_field_of_ten_megabytes(tmp_path):
  path = write(tmp_path / 'x.csv', 'text,label\n' + 'x' * 10_000_000 + ',y\n')
  [(_, row)] = all_rows(path)
  assert len(row['text']) == 10_000_000


# ---- JSON ----


@pytest.mark.parametrize(
  'text',
  [
    '[{"q": 1}, {"q": 2}]',
    '[\n {"q": 1},\n {"q": 2}\n]',
    '{"version": "1", "data": [{"q": 1}, {"q": 2}]}',
    '{"q": 1}\n{"q": 2}\n',
  ],
)
def test_json_in_any_form(tmp_path, text):
  path = write(tmp_path / 'x.json', text)
  assert all_rows(path) == [(1, {'q': 1}), (2, {'q': 2})]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"q": 1, "q": 2}', "the key 'q' is there twice"),
    ('[1, 2]', ':1 is not a JSON object but int'),
    ('"text"', 'holds no list of objects'),
    ('[{"q": 1}', 'is not JSON'),
    ('[' * 100_000, 'nested too deeply'),
    ('{"a":' * 100_000 + '1' + '}' * 100_000, 'nested too deeply'),
  ],
)
def test_json_errors(tmp_path, text, message):
  path = write(tmp_path / 'x.json', text)
  with pytest.raises(UsageError, match=message):
    all_rows(path)


def test_what_is_no_object_in_a_list_is_told(tmp_path):
  path, told = write(tmp_path / 'x.json', '[{"q": 1}, null, {"q": 2}]'), []
  assert list(records.read(path, bad=told.append)) == [(1, {'q': 1}), (3, {'q': 2})]
  assert 'x.json:2 is not a JSON object' in str(told[0]) and len(told) == 1


def test_nested_fields(tmp_path):
  path = write(tmp_path / 'x.jsonl', '{"translation": {"en": "a", "de": "b"}}')
  assert list(records.rows(path, ['translation.de', 'translation.en'])) == [('b', 'a')]
  with pytest.raises(UsageError, match=r"'translation\.fr' must be text"):
    list(records.rows(path, ['translation.fr']))


def test_half_a_character_is_refused(tmp_path):
  # JSON can say it, UTF-8 and so every vocabulary cannot.
  path = write(tmp_path / 'x.jsonl', r'{"q": "fine"}' + '\n{"q": "a\\ud83d"}')
  for call in (lambda: list(records.rows(path, ['q'])), lambda: list(records.texts(path))):
    with pytest.raises(UsageError, match=r':2: .* half of a surrogate pair'):
      call()


def test_not_a_number_is_an_empty_field(tmp_path):
  path = write(tmp_path / 'x.jsonl', '{"q": NaN}\n{"q": "nan"}\n')
  assert list(records.rows(path, ['q'])) == [('',), ('nan',)]


# ---- Parquet and datasets ----


def test_parquet(tmp_path):
  pandas = pytest.importorskip('pandas')
  path = tmp_path / 'x.parquet'
  frame = pandas.DataFrame({'text': ['a', 'b'], 'n': [1, 2], 'x': [3.8, float('nan')]})
  frame.astype({'x': 'float32'}).to_parquet(path)
  assert all_rows(path) == [
    (1, {'text': 'a', 'n': 1, 'x': 3.8}), (2, {'text': 'b', 'n': 2, 'x': None}),
  ]  # fmt: skip
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(UsageError, match='is not a whole Parquet file'):
    all_rows(path)


def test_parquet_with_a_column_twice(tmp_path):
  arrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  table = arrow.table([['a'], ['b']], names=['text', 'text'])
  parquet.write_table(table, tmp_path / 'x.parquet')
  with pytest.raises(UsageError, match=r"the column 'text' twice"):
    all_rows(tmp_path / 'x.parquet')


def test_arrow_that_lies_about_its_lengths(tmp_path):
  arrow = pytest.importorskip('pyarrow')
  state = {'_data_files': [{'filename': 'x.arrow'}]}
  (tmp_path / 'state.json').write_text(json.dumps(state))
  table = arrow.table({'text': ['a' * 100, 'b']})
  with arrow.OSFile(str(tmp_path / 'x.arrow'), 'wb') as file:
    with arrow.ipc.new_stream(file, table.schema) as stream:
      stream.write_table(table)
  data = (tmp_path / 'x.arrow').read_bytes()
  # Where the first text ends: far behind what is there.
  offsets = np.array([0, 100, 101], np.int32).tobytes()
  assert data.count(offsets) == 1
  lie = np.array([0, 2**30, 2**30 + 1], np.int32).tobytes()
  (tmp_path / 'x.arrow').write_bytes(data.replace(offsets, lie))
  with pytest.raises(UsageError, match=r'cannot be read after row 0'):
    all_rows(tmp_path)


@pytest.mark.parametrize(
  'text', ['{}', '[]', '{"_data_files": null}', '{"_data_files": [3]}', '\xff']
)
def test_a_saved_dataset_with_a_damaged_list(tmp_path, text):
  (tmp_path / 'state.json').write_text(text, encoding='latin-1')
  with pytest.raises(UsageError, match=r'state\.json|which is not in it'):
    all_rows(tmp_path)


def test_a_saved_dataset(tmp_path):
  datasets = pytest.importorskip('datasets')
  one = datasets.Dataset.from_dict({'text': ['a', 'b'], 'label': ['no', 'yes']})
  one = one.class_encode_column('label')
  datasets.DatasetDict(train=one, test=one).save_to_disk(str(tmp_path / 'd'))
  splits = records.dataset_splits(str(tmp_path / 'd'))
  assert set(splits) == {'train', 'test'}
  assert all_rows(splits['train']) == [
    (1, {'text': 'a', 'label': 'no'}),
    (2, {'text': 'b', 'label': 'yes'}),
  ]
  with pytest.raises(UsageError, match='holds the splits train, test'):
    all_rows(tmp_path / 'd')


@pytest.mark.parametrize('name', ['../x.arrow', '/etc/passwd', '', '..', 3])
def test_a_saved_dataset_reads_its_own_folder_alone(tmp_path, name):
  state = {'_data_files': [{'filename': name}]}
  (tmp_path / 'state.json').write_text(json.dumps(state))
  with pytest.raises(UsageError, match='which is not in it'):
    all_rows(tmp_path)
