"""Rows leave the buffer in the order in which they came."""

import numpy as np
import pytest

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import packing
from t5x_lite.errors import UsageError


def rows(first, last):
  column = np.arange(first, last)[:, np.newaxis]
  return {'a': column, 'b': np.repeat(column, 3, axis=1)}


def test_batches_across_chunks():
  buffer = packing.RowBuffer()
  for first, last in ((0, 2), (2, 2), (2, 9), (9, 10)):
    buffer.push(rows(first, last))
  buffer.push({})
  assert buffer.num_rows == 10
  assert buffer.pop(3)['a'].ravel().tolist() == [0, 1, 2]
  assert buffer.peek()['a'].ravel().tolist() == list(range(3, 10))
  assert buffer.pop(4)['b'].shape == (4, 3)
  assert buffer.pop(99)['a'].ravel().tolist() == [7, 8, 9]
  assert buffer.num_rows == 0
  assert buffer.peek() == {}


def test_fill_adds_zeros_and_hosts_share():
  batch = packing.fill(rows(1, 4), 6)
  assert batch['b'].shape == (6, 3)
  assert not batch['b'][3:].any()
  parts = [packing.host_rows(batch, index, 3) for index in range(3)]
  np.testing.assert_array_equal(np.concatenate([part['a'] for part in parts]), batch['a'])


def test_processes_must_divide_the_batch():
  cfg = DatasetConfig(
    mixture_or_task_name='any', task_feature_lengths={'inputs': 3, 'targets': 3}, batch_size=4
  )
  cfg.check_processes(3, 4)
  with pytest.raises(UsageError, match='batch_size 4 does not divide over 3'):
    cfg.check_processes(0, 3)
  with pytest.raises(UsageError, match='process_index is 2'):
    cfg.check_processes(2, 2)
