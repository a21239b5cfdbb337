"""Packing keeps every value, in order, and knows whose it is."""

import numpy as np
import pytest

from t5x_lite.data.rows import packing
from t5x_lite.errors import UsageError

LENGTHS = {'inputs': 20, 'targets': 12}


def random_examples(num, seed=0, min_length=0):
  rng = np.random.default_rng(seed)
  return {
    'inputs': packing.Ragged.from_arrays(
      # Ids from 0, and empty features now and then.
      [rng.integers(0, 9, rng.integers(min_length, 20)) for _ in range(num)],
      np.int32,
    ),
    'targets': packing.Ragged.from_arrays(
      [rng.integers(0, 9, rng.integers(min_length, 12)) for _ in range(num)], np.int32
    ),
  }


def split(ragged):
  return np.split(ragged.values, np.cumsum(ragged.lengths)[:-1])


def merge(parts):
  parts = [part for part in parts if part]
  return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def pack_all(examples, windows=(None,), **kwargs):
  packer = packing.Packer(LENGTHS, **kwargs)
  parts = []
  start = 0
  num = len(examples['inputs'].lengths)
  for size in windows:
    index = np.arange(start, num if size is None else min(start + size, num))
    parts.append(packer.add({k: packing.take(v, index) for k, v in examples.items()}))
    start += len(index)
  return merge([*parts, packer.flush()])


def unpack(rows):
  """Returns the (inputs, targets) pairs of rows, from segment ids alone."""
  pairs = []
  for row in range(len(rows['inputs'])):
    last = max(rows['inputs_segment_ids'][row].max(), rows['targets_segment_ids'][row].max())
    for segment in range(1, last + 1):
      pair = []
      for name in LENGTHS:
        mine = rows[f'{name}_segment_ids'][row] == segment
        positions = rows[f'{name}_positions'][row][mine]
        np.testing.assert_array_equal(positions, np.arange(mine.sum()))
        pair.append(tuple(rows[name][row][mine].tolist()))
      pairs.append(tuple(pair))
  return pairs


def pairs_of(examples):
  return [
    (tuple(i.tolist()), tuple(t.tolist()))
    for i, t in zip(split(examples['inputs']), split(examples['targets']), strict=True)
  ]


@pytest.mark.parametrize('num_open_rows', [1, 3, 64])
def test_every_example_is_placed_once_with_its_own_targets(num_open_rows):
  examples = random_examples(300)
  rows = pack_all(examples, num_open_rows=num_open_rows)
  want = [pair for pair in pairs_of(examples) if pair != ((), ())]
  got = [pair for pair in unpack(rows) if pair != ((), ())]
  assert sorted(got) == sorted(want)


def test_padding_is_zero_and_segments_ascend():
  rows = pack_all(random_examples(200))
  for name, length in LENGTHS.items():
    segments = rows[f'{name}_segment_ids']
    assert segments.shape == (len(segments), length)
    assert segments.dtype == rows[f'{name}_positions'].dtype == np.int32
    padding = segments == 0
    assert not rows[name][padding].any()
    assert not rows[f'{name}_positions'][padding].any()
    real = ~padding
    # Values first, then padding; segment ids never go back.
    assert (real[:, :-1] >= real[:, 1:]).all()
    assert (np.diff(segments, axis=1)[real[:, 1:]] >= 0).all()


def test_one_open_row_keeps_the_order_of_the_stream():
  examples = random_examples(200, min_length=1)
  rows = pack_all(examples, num_open_rows=1)
  assert unpack(rows) == pairs_of(examples)


def test_result_does_not_depend_on_the_windows():
  examples = random_examples(257)
  want = pack_all(examples)
  got = pack_all(examples, windows=(1, 7, 50, 0, 100, None))
  for name, rows in want.items():
    np.testing.assert_array_equal(got[name], rows)


def test_state_continues_exactly():
  examples = random_examples(200)
  first = {k: packing.take(v, np.arange(90)) for k, v in examples.items()}
  second = {k: packing.take(v, np.arange(90, 200)) for k, v in examples.items()}
  packer = packing.Packer(LENGTHS, num_open_rows=8)
  packer.add(first)
  state = packer.state()
  want = merge([packer.add(second), packer.flush()])
  fresh = packing.Packer(LENGTHS, num_open_rows=8)
  fresh.set_state(state)
  got = merge([fresh.add(second), fresh.flush()])
  for name, rows in want.items():
    np.testing.assert_array_equal(got[name], rows)


def test_id_zero_and_empty_features_keep_their_segment():
  # SeqIO cuts the first example at its 0, and gives the second example's
  # targets the first segment id because the first has no targets.
  examples = {
    'inputs': packing.Ragged.from_arrays([[5, 0, 6], [7]], np.int32),
    'targets': packing.Ragged.from_arrays([[], [8, 0]], np.int32),
  }
  rows = pack_all(examples)
  assert rows['inputs'][0, :5].tolist() == [5, 0, 6, 7, 0]
  assert rows['inputs_segment_ids'][0, :5].tolist() == [1, 1, 1, 2, 0]
  assert rows['inputs_positions'][0, :5].tolist() == [0, 1, 2, 0, 0]
  assert rows['targets'][0, :3].tolist() == [8, 0, 0]
  assert rows['targets_segment_ids'][0, :3].tolist() == [2, 2, 0]


def test_floats_stay_floats_and_aligned_values_follow():
  examples = {
    'inputs': packing.Ragged.from_arrays([[0.5, 0.0], [1.5]], np.float32),
    'targets': packing.Ragged.from_arrays([[3], [4, 5]], np.int32),
    'weights': packing.Ragged.from_arrays([[0.25], [0.5, 1.0]], np.float32),
  }
  for rows in (
    merge(
      [(packer := packing.Packer(LENGTHS, {'weights': 'targets'})).add(examples), packer.flush()]
    ),
    packing.pad(examples, LENGTHS, {'weights': 'targets'}),
  ):
    assert rows['inputs'].dtype == rows['weights'].dtype == np.float32
    assert rows['targets'].dtype == np.int32
    real = rows['targets_segment_ids'] > 0
    assert rows['weights'][real].tolist() == [0.25, 0.5, 1.0]
    assert rows['inputs'][rows['inputs_segment_ids'] > 0].tolist() == [0.5, 0.0, 1.5]
    assert 'weights_segment_ids' not in rows


def test_an_example_waits_for_a_bounded_number_of_rows():
  examples = random_examples(500, min_length=1)
  packer = packing.Packer(LENGTHS, num_open_rows=4)
  waiting = []
  for i in range(500):
    packer.add({k: packing.take(v, np.array([i])) for k, v in examples.items()})
    waiting.append(len(packer.state()['row']))
  assert max(waiting) <= 4 * 20


def test_fill_is_near_the_bound():
  rng = np.random.default_rng(0)
  inputs = np.clip(rng.lognormal(4.0, 0.8, 4000), 2, 512).astype(np.int64)
  targets = np.clip(inputs * rng.uniform(0.1, 0.4, 4000), 1, 114).astype(int)
  examples = {
    name: packing.Ragged(np.ones(lengths.sum(), np.int32), lengths)
    for name, lengths in (('inputs', inputs), ('targets', targets))
  }
  packer = packing.Packer({'inputs': 512, 'targets': 114})
  num_rows = len(packer.add(examples)['inputs']) + len(packer.flush()['inputs'])
  bound = max(inputs.sum() / 512, targets.sum() / 114)
  assert bound / num_rows > 0.96


def test_pad_gives_one_example_a_row():
  examples = random_examples(50)
  rows = packing.pad(examples, LENGTHS)
  assert len(rows['inputs']) == 50
  for i, (inputs, targets) in enumerate(pairs_of(examples)):
    assert tuple(rows['inputs'][i, : len(inputs)].tolist()) == inputs
    assert rows['targets_segment_ids'][i].sum() == len(targets)


def test_full_length_examples_take_one_row_each():
  examples = {
    name: packing.Ragged.from_arrays([[1] * length] * 5, np.int32)
    for name, length in LENGTHS.items()
  }
  rows = pack_all(examples)
  assert rows['inputs'].shape == (5, 20)
  assert (rows['inputs_segment_ids'] == 1).all()


def test_nothing_in_nothing_out():
  packer = packing.Packer(LENGTHS)
  assert packer.flush() == {}
  assert len(packer.add(random_examples(0))['inputs']) == 0


def test_too_long_is_refused_by_name():
  examples = {
    'inputs': packing.Ragged.from_arrays([[1] * 21], np.int32),
    'targets': packing.Ragged.from_arrays([[1]], np.int32),
  }
  with pytest.raises(UsageError, match=r"21 values in 'inputs'.*holds 20"):
    packing.Packer(LENGTHS).add(examples)
  with pytest.raises(UsageError, match='inputs'):
    packing.pad(examples, LENGTHS)
  with pytest.raises(UsageError, match='num_open_rows is 0'):
    packing.Packer(LENGTHS, num_open_rows=0)


def test_interleave_joins_pairs():
  first = packing.Ragged.from_arrays([[1, 2], [], [3]], np.int32)
  second = packing.Ragged.from_arrays([[4], [5], []], np.int32)
  joined = packing.interleave(first, second)
  assert joined.values.tolist() == [1, 2, 4, 5, 3]
  assert joined.lengths.tolist() == [3, 1, 1]
