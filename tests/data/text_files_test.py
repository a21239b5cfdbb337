import gzip
import json

import pytest

from t5x_lite.data import text_files
from t5x_lite.errors import UsageError

# Characters at which str.splitlines cuts, quotes, and a lone carriage return.
ODD = 'a\u2028b\x0bc\x0cd\x1ce\x85f\u2029g "q" \'r\r s'


def write(path, data):
  data = data.encode() if isinstance(data, str) else data
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return str(path)


@pytest.mark.parametrize('name', ['x.txt', 'x.txt.gz'])
def test_only_line_feeds_end_lines(tmp_path, name):
  path = write(tmp_path / name, f'{ODD}\r\n\n  \nlast')
  assert list(text_files.lines(path)) == [
    (1, ODD), (2, ''), (3, '  '), (4, 'last'),
  ]  # fmt: skip
  assert list(text_files.rows(path, [])) == [(ODD,), ('last',)]


@pytest.mark.parametrize('name', ['x.tsv', 'x.tsv.gz'])
def test_tsv_keeps_odd_rows(tmp_path, name):
  path = write(tmp_path / name, f'{ODD}\t1\t\n\n\t\t\n"x\t2\ty"\n')
  assert list(text_files.rows(path, [0, 1])) == [
    (ODD, '1'),
    ('', ''),
    ('"x', '2'),
  ]
  assert list(text_files.rows(path, [2])) == [('',), ('',), ('y"',)]


def test_tsv_columns_by_name(tmp_path):
  path = write(tmp_path / 'x.tsv', '\ufeffid\ten\tde\n1\tyes\tja\n')
  assert list(text_files.rows(path, ['de', 'en'])) == [('ja', 'yes')]
  assert list(text_files.rows(path, ['id'])) == [('1',)]
  with pytest.raises(UsageError, match=r"no column 'fr'.*'id', 'en', 'de'"):
    list(text_files.rows(path, ['fr']))
  with pytest.raises(UsageError, match=r'3 columns; there is no column 3'):
    list(text_files.rows(path, [3]))


def test_a_torn_tsv_row_is_named(tmp_path):
  path = write(tmp_path / 'x.tsv', 'a\tb\nc\td\te\n')
  with pytest.raises(UsageError, match=r'x\.tsv:2 has 3 columns'):
    list(text_files.rows(path, [0, 1]))


def test_jsonl(tmp_path):
  entries = [
    {'q': ODD, 'a': 'x\ny', 'n': 1},
    {'q': 'Ü', 'a': '', 'n': 2.5, 'more': None},
  ]
  text = '\n'.join(json.dumps(entry) for entry in entries) + '\n\n'
  path = write(tmp_path / 'x.jsonl', text)
  assert list(text_files.rows(path, ['q', 'a'])) == [
    (ODD, 'x\ny'), ('Ü', ''),
  ]  # fmt: skip
  assert list(text_files.rows(path, ['n'])) == [('1',), ('2.5',)]


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
    list(text_files.rows(path, ['q']))


def test_broken_files(tmp_path):
  path = write(tmp_path / 'latin.txt', 'fine\nna\xefve\n'.encode('latin-1'))
  with pytest.raises(UsageError, match=r'latin\.txt:2 is not UTF-8'):
    list(text_files.lines(path))
  cut = tmp_path / 'cut.txt.gz'
  data = gzip.compress(b'line\n' * 9999)
  cut.write_bytes(data[: len(data) // 2])
  with pytest.raises(UsageError, match=r'not a whole gzip file'):
    list(text_files.lines(str(cut)))
  (tmp_path / 'plain.gz').write_text('plain')
  with pytest.raises(UsageError, match=r'not a whole gzip file'):
    list(text_files.lines(str(tmp_path / 'plain.gz')))
  with pytest.raises(UsageError, match=r'Cannot read'):
    list(text_files.lines(str(tmp_path / 'none.txt')))


def test_expand(tmp_path):
  b = write(tmp_path / 'b.txt', 'b')
  a = write(tmp_path / 'a.txt', 'a')
  assert text_files.expand(str(tmp_path / '*.txt')) == [a, b]
  (tmp_path / 'sub' / 'deep').mkdir(parents=True)
  c = write(tmp_path / 'sub' / 'deep' / 'c.txt', 'c')
  assert text_files.expand(str(tmp_path / 's*' / '*' / '[bc].txt')) == [c]
  with pytest.raises(UsageError, match=r'name each folder'):
    text_files.expand(str(tmp_path / '**' / 'c.txt'))
  assert text_files.expand([b, a]) == [b, a]
  assert text_files.expand(tmp_path / 'a.txt') == [a]
  for missing in (tmp_path / 'c.txt', tmp_path / '*.tsv', tmp_path):
    with pytest.raises(UsageError, match=r'There is no file'):
      text_files.expand(str(missing))


def test_format_of():
  assert text_files.format_of('x.tsv.gz') == 'tsv'
  assert text_files.format_of('x.jsonl') == 'jsonl'
  assert text_files.format_of('x.md') == 'text'
  assert text_files.format_of('x.md', 'tsv') == 'tsv'
  with pytest.raises(UsageError, match=r"'csv'; it must be one of text, tsv"):
    text_files.format_of('x.csv', 'csv')


def test_texts_takes_all_there_is_or_the_fields(tmp_path):
  tsv = write(tmp_path / 'x.tsv', 'a\tb\nc\n')
  assert list(text_files.texts(tsv)) == ['a', 'b', 'c']
  jsonl = write(tmp_path / 'x.jsonl', '{"q": "x", "n": 1, "a": "y"}\n')
  assert list(text_files.texts(jsonl)) == ['x', 'y']
  assert list(text_files.texts(jsonl, ['a'])) == ['y']
  text = write(tmp_path / 'x.txt', 'a\tb\n\nc\n')
  assert list(text_files.texts(text)) == ['a\tb', 'c']


def test_total_bytes(tmp_path):
  plain = write(tmp_path / 'x.txt', 'x' * 100)
  packed = write(tmp_path / 'x.txt.gz', 'x' * 100)
  size = (tmp_path / 'x.txt.gz').stat().st_size
  assert text_files.total_bytes([plain, packed]) == 100 + 4 * size
