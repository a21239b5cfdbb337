"""The stream of batches: exact, disjoint, finite, and clear about mistakes."""

import dataclasses
import json
import time

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data import dataset, row_stream
from t5x_lite.errors import UsageError

LENGTHS = {'inputs': 24, 'targets': 16}
NUM_EXAMPLES = 300
# Example i is: inputs = [i + 3] * (1 + i % 11), targets = [i + 3, 1].
FIRST_ID = 3
FEATURES = {
  name: seqio.Feature(seqio.PassThroughVocabulary(512), dtype=tf.int32)
  for name in LENGTHS
}


def _examples(offset=0, num=NUM_EXAMPLES):
  def make(i):
    token = tf.cast(i + FIRST_ID, tf.int32)
    return {
      'inputs': tf.fill([tf.cast(1 + i % 11, tf.int32)], token),
      'targets': tf.stack([token, 1]),
      'targets_pretokenized': tf.strings.as_string(i),
    }

  def dataset_fn(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.range(offset, offset + num).map(make)

  return seqio.FunctionDataSource(
    dataset_fn, splits=['train'], num_input_examples={'train': num}
  )


@seqio.map_over_dataset(num_seeds=1)
def _drop_tokens(example, seed):
  keep = tf.random.stateless_uniform(tf.shape(example['inputs']), seed) < 0.7
  return example | {'inputs': tf.boolean_mask(example['inputs'], keep)}


def _stateful(ds):
  return ds.map(
    lambda ex: ex | {'inputs': tf.random.shuffle(ex['inputs'], seed=1)}
  )


def _python(ds):
  def double(ex):
    inputs = tf.numpy_function(lambda x: x + 1, [ex['inputs']], tf.int32)
    return ex | {'inputs': tf.ensure_shape(inputs, [None])}

  return ds.map(double)


def _with(**values):
  return lambda ds: ds.map(
    lambda ex: ex | {k: tf.constant(v, tf.int32) for k, v in values.items()}
  )


@pytest.fixture(scope='module', autouse=True)
def tasks():
  def add(name, *preprocessors, source=None, features=None):
    seqio.TaskRegistry.add(
      name,
      source=source or _examples(),
      preprocessors=[*preprocessors],
      output_features=features or FEATURES,
      metric_fns=[],
      shuffle_buffer_size=50,
    )

  add('dt_plain')
  add('dt_random', seqio.CacheDatasetPlaceholder(), _drop_tokens)
  add('dt_low', source=_examples(0, 100))
  add('dt_high', source=_examples(200, 100))
  add('dt_stateful', _stateful)
  add('dt_python', _python)
  add('dt_zero', _with(inputs=[5, 0, 6]))
  add('dt_big_id', _with(targets=[512]))
  add('dt_none', source=_examples(0, 0))
  floats = FEATURES | {
    'inputs': seqio.ContinuousFeature(dtype=tf.float32, rank=1)
  }
  add('dt_float', features=floats)
  seqio.MixtureRegistry.add('dt_mixture', [('dt_low', 1), ('dt_high', 2)])
  seqio.MixtureRegistry.add('dt_mixed', [('dt_random', 1), ('dt_plain', 1)])
  yield
  for name in [n for n in seqio.TaskRegistry.names() if n.startswith('dt_')]:
    seqio.TaskRegistry.remove(name)
  for name in ('dt_mixture', 'dt_mixed'):
    seqio.MixtureRegistry.remove(name)


def config(name='dt_plain', **kwargs):
  values = {
    'mixture_or_task_name': name,
    'task_feature_lengths': LENGTHS,
    'batch_size': 4,
    'seed': 7,
    'window': 16,
    'num_open_rows': 4,
  }
  return dataset.DatasetConfig(**values | kwargs)


def take(iterator, num):
  return [next(iterator) for _ in range(num)]


def batches(cfg, num, index=0, count=1):
  iterator = dataset.make_iterator(
    cfg, process_index=index, process_count=count
  )
  try:
    return take(iterator, num)
  finally:
    iterator.close()


def all_batches(cfg, index=0, count=1):
  iterator = dataset.make_iterator(
    cfg, process_index=index, process_count=count
  )
  found = list(iterator)
  iterator.close()
  return found


def assert_equal(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert sorted(a) == sorted(b)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def example_numbers(found):
  """Which examples the targets of batches come from, with repetition."""
  ids = np.concatenate([b['decoder_target_tokens'].reshape(-1) for b in found])
  return sorted((ids[ids >= FIRST_ID] - FIRST_ID).tolist())


# ---- The stream ----


def test_every_example_once_packed_and_padded():
  for pack in (True, False):
    found = all_batches(config(pack=pack, num_epochs=1))
    assert example_numbers(found) == list(range(NUM_EXAMPLES))
    assert {b['decoder_target_tokens'].shape for b in found} == {(4, 16)}


def test_inputs_stay_with_their_targets():
  for batch in all_batches(config(num_epochs=1)):
    for row in range(4):
      for segment in range(1, batch['decoder_segment_ids'][row].max() + 1):
        inputs = batch['encoder_input_tokens'][row][
          batch['encoder_segment_ids'][row] == segment
        ]
        targets = batch['decoder_target_tokens'][row][
          batch['decoder_segment_ids'][row] == segment
        ]
        number = targets[0] - FIRST_ID
        assert inputs.tolist() == [number + FIRST_ID] * (1 + number % 11)


def test_batch_spec_is_what_comes():
  for pack in (True, False):
    cfg = config(pack=pack)
    (batch,) = batches(cfg, 1)
    got = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert got == dataset.batch_spec(cfg)
  assert 'decoder_segment_ids' not in batch
  assert (
    'decoder_segment_ids' in batches(config(pack=False, segment_ids=True), 1)[0]
  )


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
  assert [int(b['decoder_loss_weights'].any(1).sum()) for b in found] == [
    64,
    64,
    64,
    64,
    44,
  ]
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
  hosts = [
    set(example_numbers(batches(cfg, num, index, count)))
    for index in range(count)
  ]
  assert sum(map(len, hosts)) == len(set.union(*hosts))


def test_replicated_hosts_share_the_batches_of_one_host():
  cfg = config('dt_random', host_sharding='replicated')
  want = batches(cfg, 5)
  parts = [batches(cfg, 5, index, 2) for index in range(2)]
  joined = [
    {k: np.concatenate([a[k], b[k]]) for k in a}
    for a, b in zip(*parts, strict=True)
  ]
  assert_equal(joined, want)


def test_finite_streams_have_as_many_batches_on_every_host():
  cfg = config(num_epochs=1, batch_size=8)
  parts = [all_batches(cfg, index, 4) for index in range(4)]
  assert len({len(part) for part in parts}) == 1
  assert example_numbers([b for part in parts for b in part]) == list(
    range(NUM_EXAMPLES)
  )


# ---- Resuming ----


@pytest.mark.parametrize(
  ('name', 'pack', 'taken'),
  [
    ('dt_plain', True, 0),
    ('dt_random', True, 40),  # epochs later
    ('dt_mixed', False, 9),
    ('dt_python', True, 7),  # its position is a count
  ],
)
def test_restored_continues_exactly(tmp_path, name, pack, taken):
  cfg = config(name, pack=pack)
  iterator = dataset.make_iterator(cfg)
  take(iterator, taken)
  iterator.save(tmp_path)
  want = take(iterator, 30)
  iterator.close()

  fresh = dataset.make_iterator(cfg)
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
    iterator = dataset.make_iterator(cfg)
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
    iterator = dataset.make_iterator(cfg)
    take(iterator, taken)
    iterator.save(tmp_path)
    iterator.close()
    fresh = dataset.make_iterator(cfg)
    fresh.restore(tmp_path)
    assert_equal(list(fresh), want[taken:])
    fresh.close()


def test_batch_size_may_change_on_resuming(tmp_path):
  iterator = dataset.make_iterator(config('dt_random'))
  take(iterator, 3)
  iterator.save(tmp_path)
  want = take(iterator, 6)
  iterator.close()
  fresh = dataset.make_iterator(config('dt_random', batch_size=8))
  fresh.restore(tmp_path)
  got = take(fresh, 3)
  fresh.close()
  for name in want[0]:
    np.testing.assert_array_equal(
      np.concatenate([b[name] for b in got]),
      np.concatenate([b[name] for b in want]),
    )


def test_processes_write_and_find_their_own_files(tmp_path):
  cfg = config(batch_size=8)
  iterators = [
    dataset.make_iterator(cfg, process_index=i, process_count=2)
    for i in range(2)
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
    iterator = dataset.make_iterator(
      config('dt_random', prefetch_batches=prefetch)
    )
    take(iterator, 3)
    iterator.save(tmp_path)
    iterator.close()
  assert len(list(tmp_path.glob('*.npz'))) == 2
  fresh = dataset.make_iterator(config('dt_random'))
  fresh.restore(tmp_path)
  assert_equal(take(fresh, 17), want[3:])
  fresh.close()


def test_other_process_count_needs_leave_and_is_deterministic(tmp_path, caplog):
  cfg = config(batch_size=8)
  for index in range(2):
    iterator = dataset.make_iterator(cfg, process_index=index, process_count=2)
    take(iterator, 4)
    iterator.save(tmp_path)
    iterator.close()
  alone = dataset.make_iterator(cfg)
  with pytest.raises(UsageError, match='saved by 2 processes and there are 1'):
    alone.restore(tmp_path)
  alone.close()

  cfg = dataclasses.replace(cfg, allow_process_count_change=True)
  found = []
  for _ in range(2):
    iterator = dataset.make_iterator(cfg)
    iterator.restore(tmp_path)
    assert iterator.num_batches == 4
    found.append(take(iterator, 5))
    iterator.close()
  assert_equal(*found)
  assert 'folded from seed 7 and the 4 batches seen' in caplog.text
  # The folded stream is saved and restored like any other.
  iterator = dataset.make_iterator(cfg)
  iterator.restore(tmp_path)
  take(iterator, 2)
  iterator.save(tmp_path / 'new')
  iterator.close()
  fresh = dataset.make_iterator(cfg)
  fresh.restore(tmp_path / 'new')
  assert_equal(take(fresh, 3), found[0][2:])
  fresh.close()


def test_replicated_hosts_resume_exactly_on_any_number(tmp_path):
  cfg = config('dt_random', host_sharding='replicated', batch_size=8)
  want = batches(cfg, 8)
  for index in range(4):
    iterator = dataset.make_iterator(cfg, process_index=index, process_count=4)
    take(iterator, 3)
    iterator.save(tmp_path)
    iterator.close()
  alone = dataset.make_iterator(cfg)
  alone.restore(tmp_path)
  assert_equal(take(alone, 5), want[3:])
  alone.close()


def test_positions_of_another_stream_are_refused(tmp_path):
  iterator = dataset.make_iterator(config())
  with pytest.raises(UsageError, match='holds 0 saved data positions'):
    iterator.restore(tmp_path)
  iterator.save(tmp_path)
  iterator.close()
  other = dataset.make_iterator(config(seed=8))
  with pytest.raises(UsageError, match='saved with seed=7, now it is 8'):
    other.restore(tmp_path)
  other.close()


# ---- Evaluation ----


@pytest.mark.parametrize('name', ['dt_plain', 'dt_mixture'])
def test_eval_dataset_pairs_rows_with_raw_examples(name):
  cfg = config(
    name, batch_size=64, task_feature_lengths=LENGTHS | {'inputs': 5}
  )
  for _ in range(2):  # it can be iterated again
    seen = []
    for batch, examples in dataset.make_eval_dataset(cfg):
      assert batch['encoder_input_tokens'].shape == (64, 5)
      assert 'encoder_segment_ids' not in batch
      for row, example in enumerate(examples):
        target = batch['decoder_target_tokens'][row, 0]
        number = int(example['targets_pretokenized'])
        assert target == number + FIRST_ID
        assert len(example['inputs']) == 1 + number % 11  # untrimmed
        seen.append(number)
      assert not batch['decoder_loss_weights'][len(examples) :].any()
    if name == 'dt_plain':
      assert seen == list(range(NUM_EXAMPLES))
    else:  # task after task, by name, each to its end
      assert seen == [*range(200, 300), *range(100)]


def test_eval_hosts_have_the_rows_of_one_host():
  cfg = config(batch_size=64)
  whole = list(dataset.make_eval_dataset(cfg))
  parts = [
    list(dataset.make_eval_dataset(cfg, process_index=index, process_count=2))
    for index in range(2)
  ]
  for (batch, examples), (a, _), (b, others) in zip(whole, *parts, strict=True):
    assert len(examples) == len(others)
    for name in batch:
      np.testing.assert_array_equal(
        batch[name], np.concatenate([a[name], b[name]])
      )


# ---- Mistakes ----


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'name': 'dt_plian'}, "'dt_plian', which is not registered.*dt_plain"),
    ({'split': 'tset'}, "no split 'tset', only.*train"),
    ({'module': 'no_such_module'}, "'no_such_module' cannot be imported"),
    (
      {'task_feature_lengths': LENGTHS | {'answers': 3}},
      "names 'answers', but the output features of dt_plain are",
    ),
    ({'name': 'dt_float'}, "'inputs' of dt_float is float32"),
  ],
)
def test_wrong_tasks_are_refused_at_once(kwargs, message):
  with pytest.raises(UsageError, match=message):
    dataset.make_iterator(config(**kwargs))


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'name': 'dt_big_id'}, r"id 512 in 'targets' of dt_big_id.*\[0, 512\)"),
    ({'vocab_size': 100}, r"in 'inputs' of dt_plain.*\[0, 100\)"),
    (
      {'name': 'dt_zero', 'pack': False},
      "id 0 occurs inside 'inputs' of dt_zero.*segment_ids=True",
    ),
    ({'name': 'dt_stateful'}, 'RandomShuffle.*allow_stateful_ops=True'),
    ({'name': 'dt_none'}, "dt_none has no examples in split 'train'"),
  ],
)
def test_wrong_examples_are_refused_when_met(tmp_path, kwargs, message):
  iterator = dataset.make_iterator(config(**kwargs))
  with pytest.raises(UsageError, match=message):
    for _ in range(200):
      next(iterator)
  with pytest.raises(UsageError, match=message):
    iterator.save(tmp_path)  # the position would be after the bad window
  iterator.close()


def test_id_zero_is_kept():
  for batch in (
    batches(config('dt_zero'), 1)[0],
    batches(config('dt_zero', pack=False, segment_ids=True), 1)[0],
  ):
    assert batch['encoder_input_tokens'][0, :3].tolist() == [5, 0, 6]
    assert (batch['encoder_segment_ids'][0, :3] == 1).all()


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'batch_size': 0}, 'batch_size is 0, must be at least 1'),
    ({'feature_converter': 'encdec'}, "is 'encdec', must be one of"),
    ({'host_sharding': 'no'}, "host_sharding is 'no', must be one of"),
    ({'task_feature_lengths': {'inputs': 3}}, "lacks 'targets'"),
    ({'task_feature_lengths': 5}, 'must map names to lengths'),
    ({'task_feature_lengths': LENGTHS | {'inputs': 0}}, "'inputs'.* is 0"),
    ({'num_epochs': 0}, 'num_epochs is 0'),
    ({'segment_ids': False}, 'pack=True needs segment_ids'),
  ],
)
def test_config_checks_itself(kwargs, message):
  with pytest.raises(UsageError, match=message):
    config(**kwargs)


def test_config_is_hashable_and_takes_pairs():
  assert hash(config()) == hash(config())
  pairs = tuple(LENGTHS.items())
  assert config(task_feature_lengths=pairs) == config()


def test_processes_must_divide_the_batch():
  with pytest.raises(UsageError, match='batch_size 4 does not divide over 3'):
    dataset.make_iterator(config(), process_count=3)
  with pytest.raises(UsageError, match='process_index is 2'):
    dataset.make_eval_dataset(config(), process_index=2, process_count=2)


def test_closed_is_closed():
  iterator = dataset.make_iterator(config())
  next(iterator)
  iterator.close()
  iterator.close()
  with pytest.raises(ValueError, match='closed'):
    next(iterator)
