import gzip
import sys

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


def test_standard_input_may_be_closed(monkeypatch):
  monkeypatch.setattr(sys, 'stdin', None)
  with pytest.raises(UsageError, match='standard input is closed'):
    list(text_files.lines('-'))


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


def test_total_bytes(tmp_path):
  plain = write(tmp_path / 'x.txt', 'x' * 100)
  packed = write(tmp_path / 'x.txt.gz', 'x' * 100)
  size = (tmp_path / 'x.txt.gz').stat().st_size
  assert text_files.total_bytes([plain, packed]) == 100 + 4 * size


@pytest.mark.parametrize('folder', ['a[1]', 'what?', 'x*y', 'a b'])
def test_folders_whose_names_look_like_patterns(tmp_path, folder):
  (tmp_path / folder / 'in').mkdir(parents=True)
  (tmp_path / 'a1').mkdir()
  files = [tmp_path / folder / 'in' / name for name in ('1.txt', '2.txt')]
  for file in (*files, tmp_path / 'a1' / '3.txt'):
    file.write_text('x\n')
  for pattern in ('in/*.txt', '*/?.txt', 'in/[12].txt'):
    assert text_files.expand(f'{tmp_path / folder}/{pattern}') == list(map(str, files))
