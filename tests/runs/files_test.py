import errno
import os

import pytest
from etils import epath

from t5x_lite.runs import files


@pytest.fixture(autouse=True)
def naps(monkeypatch):
  naps = []
  monkeypatch.setattr(files.time, 'sleep', naps.append)
  return naps


def failing(code, times):
  """A call that fails so often and then says how often it was made."""
  calls = []

  def call():
    calls.append(1)
    if len(calls) <= times:
      raise OSError(code, os.strerror(code))
    return len(calls)

  return call, calls


@pytest.mark.parametrize('code', sorted(files.TRANSIENT))
def test_what_may_pass_is_tried_again_and_logged(code, naps, caplog):
  call, _ = failing(code, 3)
  assert files.retried('some/path', call) == 4
  assert naps == [0.1, 0.3, 1.0]
  assert caplog.text.count('some/path: ' + os.strerror(code)) == 3


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT])
def test_what_stays_is_told_at_once(code, naps):
  call, calls = failing(code, 1)
  with pytest.raises(OSError, match=os.strerror(code)):
    files.retried('p', call)
  assert len(calls) == 1 and not naps


def test_it_ends(naps):
  call, calls = failing(errno.EIO, 1000)
  with pytest.raises(OSError, match='Input/output error'):
    files.retried('p', call)
  assert len(calls) == 6 and sum(naps) < 20


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = epath.Path(tmp_path) / 'a.json'
  files.write_json(path, {'a': 1})
  assert path.read_text() == '{\n  "a": 1\n}\n'

  replace, left = os.replace, [2]

  def flaky(*args):
    if left[0]:
      left[0] -= 1
      raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    replace(*args)

  monkeypatch.setattr(os, 'replace', flaky)
  files.write_text(path, 'new')
  assert path.read_text() == 'new'
  left[0] = 1000
  with pytest.raises(OSError, match='Stale'):
    files.write_text(path, 'newer')
  assert path.read_text() == 'new'
