import collections
import errno
import logging
import os
import shutil

import numpy as np
import pytest
from etils import epath

from t5x_lite.runs import checkpoints, files
from t5x_lite.runs.checkpoints import CheckpointConfig, Checkpointer
from tests import tiny_run

Usage = collections.namedtuple('Usage', 'total used free')


def test_the_reason_is_the_file_systems():
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  try:
    raise RuntimeError('thread failed') from full
  except RuntimeError as error:
    assert files.cause(error) == 'No space left on device'
  told = ValueError('RESOURCE_EXHAUSTED: write: No space left on device [28]')
  assert files.cause(told) == 'No space left on device'
  assert files.cause(ValueError('one\ntwo')) == 'one'
  assert files.cause(ValueError()) == 'ValueError'


def test_space_is_looked_at_first(tmp_path, monkeypatch):
  tree = {'x': np.zeros(1000, np.float32)}
  root = epath.Path(tmp_path)
  files.check_space(root, tree)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: Usage(1, 1, 1999))
  with pytest.raises(OSError, match='No space left'):
    files.check_space(root, tree)
  files.check_space(epath.Path('gs://bucket/run'), tree)


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path, monkeypatch):
  run = tmp_path / 'run'
  params = tiny_run.save_untrained(run)
  with Checkpointer(str(run), CheckpointConfig()) as checkpointer:
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: Usage(1, 1, 0))
    with pytest.raises(files.SaveError) as caught:
      checkpointer.save(2, params, None)
    assert checkpoints.steps_in(checkpointer.directory) == [1]
  text = str(caught.value)
  assert 'step 2' in text and 'No space left' in text and 'step 1' in text
  assert caught.value.exit_code == 7 and '\n' not in text


def test_orbax_does_not_say_it_all_again():
  record = logging.LogRecord(
    'absl', logging.ERROR, '/orbax/x.py', 1, 'failed', (), (None, None, None)
  )
  assert not logging.getLogger('absl').filter(record)
  record.exc_info = None
  assert logging.getLogger('absl').filter(record)
