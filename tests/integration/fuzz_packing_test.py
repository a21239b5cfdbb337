"""Packing keeps every token once, in order, and apart from its neighbours."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from t5x_lite.data.rows import packing
from tests.integration import fuzz_readers_test as fuzz

STREAMS = st.tuples(
  # Row lengths of inputs and targets.
  st.integers(1, 12),
  st.integers(1, 12),
  # Examples' lengths, cut to the row's below.
  st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30),
  # Rows open at a time, examples a window, rows a batch.
  st.integers(1, 6),
  st.integers(1, 9),
  st.integers(1, 5),
)


def make(inputs, targets, sizes):
  """Returns (row lengths, examples): every token has a value of its own."""
  lengths = {'inputs': inputs, 'targets': targets}
  examples, start = {}, 1
  for feature, name in enumerate(lengths):
    arrays = []
    for example in sizes:
      size = min(example[feature], lengths[name])
      arrays.append(np.arange(start, start + size))
      start += size
    examples[name] = packing.Ragged.from_arrays(arrays, np.int32)
  examples['weights'] = packing.Ragged(
    examples['targets'].values * 0.5, examples['targets'].lengths
  )
  return lengths, examples


def rows_of(lengths, examples, num_open_rows, window, restart):
  """Packs window by window; restarted from its state after every one."""

  def new():
    return packing.Packer(lengths, {'weights': 'targets'}, num_open_rows=num_open_rows)

  packer, buffer = new(), packing.RowBuffer()
  count = len(examples['inputs'].lengths)
  for start in range(0, count, window):
    index = np.arange(start, min(start + window, count))
    buffer.push(packer.add({k: packing.take(v, index) for k, v in examples.items()}))
    if restart:
      state = packer.state()
      packer = new()
      packer.set_state(state)
  buffer.push(packer.flush())
  return buffer


def segments(rows, name):
  """Yields (row, segment, values), checking positions and padding."""
  ids = rows[f'{name}_segment_ids']
  assert not rows[name][ids == 0].any()
  assert not rows[f'{name}_positions'][ids == 0].any()
  for row in range(len(ids)):
    used = ids[row][ids[row] > 0]
    assert (ids[row][: len(used)] == used).all()  # padding is at the end
    assert (np.diff(used) >= 0).all()  # a segment is in one piece
    for segment in np.unique(used):
      inside = ids[row] == segment
      positions = rows[f'{name}_positions'][row][inside]
      assert (positions == np.arange(inside.sum())).all()
      yield row, segment, rows[name][row][inside]


@hypothesis.settings(fuzz.settings, max_examples=250 * fuzz.SCALE)
@hypothesis.given(STREAMS)
def test_every_token_once_in_order_and_apart(stream):
  *lengths, sizes, num_open_rows, window, batch = stream
  lengths, examples = make(*lengths, sizes)
  buffer = rows_of(lengths, examples, num_open_rows, window, restart=False)
  rows = buffer.peek()
  if not sizes:
    assert rows == {}
    return
  where = {}
  for name, length in lengths.items():
    assert rows[name].shape == (buffer.num_rows, length)
    wanted = {}
    ragged = examples[name]
    for i, values in enumerate(np.split(ragged.values, np.cumsum(ragged.lengths)[:-1])):
      if len(values):
        wanted[values[0]] = (i, values)
    seen = 0
    for row, segment, values in segments(rows, name):
      example, whole = wanted[values[0]]
      np.testing.assert_array_equal(values, whole)
      # The features of one example share a row and a number, and no other has
      # it.
      assert where.setdefault((row, segment), example) == example
      seen += 1
    assert seen == len(wanted)
  held = rows['targets_segment_ids'] > 0
  np.testing.assert_array_equal(rows['weights'], np.where(held, rows['targets'] * 0.5, 0.0))
  # However the stream is cut into windows, and whether or not it was resumed.
  for other in (
    rows_of(lengths, examples, num_open_rows, window, restart=True),
    rows_of(lengths, examples, num_open_rows, len(sizes), restart=False),
  ):
    assert other.num_rows == buffer.num_rows
    for name, array in other.peek().items():
      np.testing.assert_array_equal(array, rows[name])
  # In batches nothing is lost either.
  parts = []
  while buffer.num_rows:
    parts.append(buffer.pop(batch))
    assert len(parts[-1]['inputs']) <= batch
  for name, array in rows.items():
    np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)


@hypothesis.settings(fuzz.settings, max_examples=100 * fuzz.SCALE)
@hypothesis.given(STREAMS)
def test_rows_that_are_not_packed(stream):
  *lengths, sizes, _, _, extra = stream
  lengths, examples = make(*lengths, sizes)
  if not sizes:
    return
  rows = packing.pad(examples, lengths, {'weights': 'targets'})
  filled = packing.fill(rows, len(sizes) + extra)
  for name, ragged in ((name, examples[name]) for name in lengths):
    sizes_there = (filled[f'{name}_segment_ids'] > 0).sum(1)
    assert sizes_there.tolist() == [*ragged.lengths, *[0] * extra]
    held = filled[f'{name}_segment_ids'] == 1
    np.testing.assert_array_equal(filled[name][held], ragged.values)


@hypothesis.settings(fuzz.settings, max_examples=50 * fuzz.SCALE)
@hypothesis.given(st.integers(1, 5), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_what_is_too_long_is_refused(length, sizes):
  ragged = packing.Ragged.from_arrays([np.ones(n) for n in sizes], np.int32)
  packer = packing.Packer({'inputs': length})
  found = fuzz.refused_or(lambda: packer.add({'inputs': ragged}))
  assert (found is None) == (max(sizes) > length)
