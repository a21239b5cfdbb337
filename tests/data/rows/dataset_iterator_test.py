"""The stream of batches: seeded, disjoint, finite."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from t5x_lite.data.config import batch_spec
from t5x_lite.data.rows import dataset_iterator, row_stream
from t5x_lite.errors import UsageError
from t5x_lite.runs.checkpoints import CheckpointConfig, Checkpointer
from tests.data import small_tasks
from tests.data.small_tasks import (
  FIRST_ID,
  NUM_EXAMPLES,
  all_batches,
  assert_equal,
  batches,
  config,
  example_numbers,
)


@pytest.fixture(scope='module', autouse=True)
def tasks():
  with small_tasks.registered():
    yield


def test_every_example_once_packed_and_padded():
  for pack in (True, False):
    found = all_batches(config(pack=pack, num_epochs=1))
    assert example_numbers(found) == list(range(NUM_EXAMPLES))
    assert {b['decoder_target_tokens'].shape for b in found} == {(4, 16)}


def test_inputs_stay_with_their_targets():
  for batch in all_batches(config(num_epochs=1)):
    for row in range(4):
      for segment in range(1, batch['decoder_segment_ids'][row].max() + 1):
        inputs = batch['encoder_input_tokens'][row][batch['encoder_segment_ids'][row] == segment]
        targets = batch['decoder_target_tokens'][row][batch['decoder_segment_ids'][row] == segment]
        number = targets[0] - FIRST_ID
        assert inputs.tolist() == [number + FIRST_ID] * (1 + number % 11)


def test_batch_spec_is_what_comes():
  for pack in (True, False):
    cfg = config(pack=pack)
    (batch,) = batches(cfg, 1)
    got = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert got == batch_spec(cfg)
  assert 'decoder_segment_ids' not in batch
  assert 'decoder_segment_ids' in batches(config(pack=False, segment_ids=True), 1)[0]


def test_seed_decides_the_stream():
  first = batches(config('dt_random'), 8)
  assert_equal(batches(config('dt_random'), 8), first)
  other = batches(config('dt_random', seed=8), 8)
  assert any(
    (a['encoder_input_tokens'] != b['encoder_input_tokens']).any()
    for a, b in zip(first, other, strict=True)
  )


def test_window_and_prefetch_do_not_change_the_stream():
  want = batches(config('dt_random'), 12)
  got = batches(config('dt_random', window=37, prefetch_batches=9), 12)
  assert_equal(got, want)


def test_last_batch_is_filled_with_rows_without_weight():
  cfg = config(pack=False, num_epochs=1, batch_size=64)
  found = all_batches(cfg)
  assert [int(b['decoder_loss_weights'].any(1).sum()) for b in found] == [64, 64, 64, 64, 44]
  padding = {k: v[44:] for k, v in found[-1].items()}
  assert not any(array.any() for array in padding.values())
  assert len(all_batches(dataclasses.replace(cfg, drop_remainder=True))) == 4


@pytest.mark.parametrize('shuffle', [False, True])
def test_finite_pass_over_a_mixture_is_complete(shuffle):
  # SeqIO's own would end with the first task that runs out.
  found = all_batches(config('dt_mixture', num_epochs=1, shuffle=shuffle))
  assert example_numbers(found) == [*range(100), *range(200, 300)]


def test_the_end_is_not_seen_before_the_last_rows(monkeypatch):
  next_rows = row_stream.RowStream.next_rows

  def slow(self):
    rows = next_rows(self)
    time.sleep(0.3 * self.ended)
    return rows

  cfg = config(num_epochs=1, batch_size=8)
  want = all_batches(cfg)
  monkeypatch.setattr(row_stream.RowStream, 'next_rows', slow)
  assert_equal(all_batches(cfg), want)


def test_where_data_cannot_be_read_on_is_no_position(monkeypatch, tmp_path):
  """A checkpoint says so, instead of naming its own directory."""

  def fail(self):
    raise ValueError('no such record')

  monkeypatch.setattr(row_stream.RowStream, 'next_rows', fail)
  iterator = dataset_iterator.DatasetIterator(config())
  with pytest.raises(ValueError, match='no such record'):
    next(iterator)
  checkpointer = Checkpointer(str(tmp_path), CheckpointConfig())
  with pytest.raises(UsageError, match=r"cannot be read on: ValueError\('no such record'\)"):
    checkpointer.save(1, {'step': jax.numpy.ones((), int)}, iterator)
  checkpointer.close()


# ---- Hosts ----


@pytest.mark.parametrize('count', [2, 4])
def test_host_shards_are_disjoint_and_cover(count):
  # The source has one shard: SeqIO then deals out single examples.
  # SeqIO shuffles across epochs, hence in order to see each example once.
  cfg = config(batch_size=4 * count, pack=False, shuffle=False)
  num = NUM_EXAMPLES // count // 4
  seen = []
  for index in range(count):
    seen += example_numbers(batches(cfg, num, index, count))
  assert sorted(seen) == list(range(num * 4 * count))
  cfg = dataclasses.replace(cfg, shuffle=True)
  hosts = [set(example_numbers(batches(cfg, num, index, count))) for index in range(count)]
  assert sum(map(len, hosts)) == len(set.union(*hosts))


def test_replicated_hosts_share_the_batches_of_one_host():
  cfg = config('dt_random', host_sharding='replicated')
  want = batches(cfg, 5)
  parts = [batches(cfg, 5, index, 2) for index in range(2)]
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
  assert_equal(joined, want)


def test_finite_streams_have_as_many_batches_on_every_host():
  cfg = config(num_epochs=1, batch_size=8)
  parts = [all_batches(cfg, index, 4) for index in range(4)]
  assert len({len(part) for part in parts}) == 1
  assert example_numbers([b for part in parts for b in part]) == list(range(NUM_EXAMPLES))


def test_closed_is_closed():
  iterator = dataset_iterator.DatasetIterator(config())
  next(iterator)
  iterator.close()
  iterator.close()
  with pytest.raises(ValueError, match='closed'):
    next(iterator)
