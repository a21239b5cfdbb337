"""A restored iterator continues exactly, or says why it cannot."""

import dataclasses
import json

import numpy as np
import pytest

from t5x_lite.data.rows import dataset_iterator
from t5x_lite.errors import UsageError
from tests.data import small_tasks
from tests.data.small_tasks import all_batches, assert_equal, batches, config, take


@pytest.fixture(scope='module', autouse=True)
def tasks():
  with small_tasks.registered():
    yield


@pytest.mark.parametrize(
  ('name', 'pack', 'taken'),
  [
    ('dt_plain', True, 0),
    ('dt_random', True, 40),  # epochs later
    ('dt_mixed', False, 9),
    ('dt_python', True, 7),  # its position is a count
    ('dt_rare', True, 200),  # and that one's too, once Python was drawn
  ],
)
def test_restored_continues_exactly(tmp_path, name, pack, taken):
  cfg = config(name, pack=pack)
  iterator = dataset_iterator.DatasetIterator(cfg)
  take(iterator, taken)
  iterator.save(tmp_path)
  want = take(iterator, 30)
  iterator.close()

  fresh = dataset_iterator.DatasetIterator(cfg)
  fresh.restore(tmp_path)
  assert fresh.num_batches == taken
  assert_equal(take(fresh, 10), want[:10])
  fresh.save(tmp_path / 'later')  # a resumed run's checkpoints are as good
  assert_equal(take(fresh, 20), want[10:])
  fresh.restore(tmp_path / 'later')  # and a used iterator can go back
  assert_equal(take(fresh, 20), want[10:])
  fresh.close()
  # Neither restoring nor saving is seen in the stream.
  assert_equal(batches(cfg, taken + 30)[taken:], want)


def test_every_batch_can_be_the_last_before_a_restart(tmp_path):
  cfg = config('dt_mixture', batch_size=2)
  want = batches(cfg, 8)
  got = []
  for step in range(8):
    iterator = dataset_iterator.DatasetIterator(cfg)
    if step:
      iterator.restore(tmp_path / str(step))
    got.append(next(iterator))
    iterator.save(tmp_path / str(step + 1))
    iterator.close()
  assert_equal(got, want)


def test_end_of_a_finite_stream_is_remembered(tmp_path):
  cfg = config(num_epochs=1, batch_size=8)
  want = all_batches(cfg)
  for taken in (len(want) - 2, len(want)):
    iterator = dataset_iterator.DatasetIterator(cfg)
    take(iterator, taken)
    iterator.save(tmp_path)
    iterator.close()
    fresh = dataset_iterator.DatasetIterator(cfg)
    fresh.restore(tmp_path)
    assert_equal(list(fresh), want[taken:])
    fresh.close()


def test_batch_size_may_change_on_resuming(tmp_path):
  iterator = dataset_iterator.DatasetIterator(config('dt_random'))
  take(iterator, 3)
  iterator.save(tmp_path)
  want = take(iterator, 6)
  iterator.close()
  fresh = dataset_iterator.DatasetIterator(config('dt_random', batch_size=8))
  fresh.restore(tmp_path)
  got = take(fresh, 3)
  fresh.close()
  for name in want[0]:
    np.testing.assert_array_equal(
      np.concatenate([b[name] for b in got]), np.concatenate([b[name] for b in want])
    )


def test_processes_write_and_find_their_own_files(tmp_path):
  cfg = config(batch_size=8)
  iterators = [
    dataset_iterator.DatasetIterator(cfg, process_index=i, process_count=2) for i in range(2)
  ]
  for iterator in iterators:
    take(iterator, 4)
    iterator.save(tmp_path)
  meta = json.loads((tmp_path / 'process_1-of-2.json').read_text())
  assert (meta['process_index'], meta['process_count']) == (1, 2)
  want = [take(iterator, 4) for iterator in iterators]
  for index, iterator in enumerate(iterators):
    iterator.restore(tmp_path)
    assert_equal(take(iterator, 4), want[index])
    iterator.close()


def test_hosts_with_the_same_rows_do_not_mix_their_files(tmp_path):
  # Both write process_0-of-1, having read ahead differently far.
  want = batches(config('dt_random'), 20)
  for prefetch in (40, 1):
    iterator = dataset_iterator.DatasetIterator(config('dt_random', prefetch_batches=prefetch))
    take(iterator, 3)
    iterator.save(tmp_path)
    iterator.close()
  assert len(list(tmp_path.glob('*.npz'))) == 2
  fresh = dataset_iterator.DatasetIterator(config('dt_random'))
  fresh.restore(tmp_path)
  assert_equal(take(fresh, 17), want[3:])
  fresh.close()


def test_other_process_count_needs_leave_and_is_deterministic(tmp_path, caplog):
  cfg = config(batch_size=8)
  for index in range(2):
    iterator = dataset_iterator.DatasetIterator(cfg, process_index=index, process_count=2)
    take(iterator, 4)
    iterator.save(tmp_path)
    iterator.close()
  alone = dataset_iterator.DatasetIterator(cfg)
  with pytest.raises(UsageError, match='saved by 2 processes and there are 1'):
    alone.restore(tmp_path)
  alone.close()

  cfg = dataclasses.replace(cfg, allow_process_count_change=True)
  found = []
  for _ in range(2):
    iterator = dataset_iterator.DatasetIterator(cfg)
    iterator.restore(tmp_path)
    assert iterator.num_batches == 4
    found.append(take(iterator, 5))
    iterator.close()
  assert_equal(*found)
  assert 'folded from seed 7 and the 4 batches seen' in caplog.text
  # The folded stream is saved and restored like any other.
  iterator = dataset_iterator.DatasetIterator(cfg)
  iterator.restore(tmp_path)
  take(iterator, 2)
  iterator.save(tmp_path / 'new')
  iterator.close()
  fresh = dataset_iterator.DatasetIterator(cfg)
  fresh.restore(tmp_path / 'new')
  assert_equal(take(fresh, 3), found[0][2:])
  fresh.close()


def test_replicated_hosts_resume_exactly_on_any_number(tmp_path):
  cfg = config('dt_random', host_sharding='replicated', batch_size=8)
  want = batches(cfg, 8)
  for index in range(4):
    iterator = dataset_iterator.DatasetIterator(cfg, process_index=index, process_count=4)
    take(iterator, 3)
    iterator.save(tmp_path)
    iterator.close()
  alone = dataset_iterator.DatasetIterator(cfg)
  alone.restore(tmp_path)
  assert_equal(take(alone, 5), want[3:])
  alone.close()


def test_positions_of_another_stream_are_refused(tmp_path):
  iterator = dataset_iterator.DatasetIterator(config())
  with pytest.raises(UsageError, match='holds 0 saved data positions'):
    iterator.restore(tmp_path)
  iterator.save(tmp_path)
  iterator.close()
  other = dataset_iterator.DatasetIterator(config(seed=8))
  with pytest.raises(UsageError, match='saved with seed=7, now it is 8'):
    other.restore(tmp_path)
  other.close()
