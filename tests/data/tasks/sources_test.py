import gzip
import itertools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data.tasks import sources
from t5x_lite.errors import UsageError


def numbers(n, **settings):
  return sources.RowsDataSource(
    {'train': lambda: {'targets': [str(i) for i in range(n)]}}, **settings
  )


def values(dataset):
  return [
    int(value) for example in dataset.as_numpy_iterator() for value in np.ravel(example['targets'])
  ]


def read(source, **settings):
  return values(source.get_dataset(split='train', **settings))


def test_rows_in_order():
  source = numbers(7)
  assert read(source, shuffle=False) == list(range(7))
  assert source.num_input_examples('train') == 7
  assert source.splits == ('train',)


def test_vectors_of_rows_are_the_same_rows():
  together, apart = numbers(10, rows_per_element=4), numbers(10)
  sizes = [len(e['targets']) for e in together.get_dataset('train', seed=0).as_numpy_iterator()]
  assert sizes == [4, 4, 2]
  for settings in (
    {'shuffle': False},
    {'shuffle': True, 'seed': 3},
    {'shard_info': seqio.ShardInfo(1, 3), 'seed': 3},
  ):
    assert read(together, **settings) == read(apart, **settings)
  assert together.num_input_examples('train') == 10


@pytest.mark.parametrize('n', [1, 2, 3, 100])
def test_every_epoch_is_a_new_permutation(n):
  source = numbers(n)
  dataset = source.get_dataset(split='train', shuffle=True, seed=3).repeat(3)
  epochs = values(dataset)
  epochs = [epochs[n * i : n * (i + 1)] for i in range(3)]
  assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
  again = source.get_dataset(split='train', shuffle=True, seed=3).repeat(3)
  assert values(again) == list(itertools.chain(*epochs))
  if n == 100:
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert read(source, shuffle=True, seed=4) != epochs[0]
    # Not a shuffle within a window: late rows come early.
    assert max(epochs[0][:20]) > 60 and min(epochs[0][-20:]) < 40


@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize(('n', 'hosts'), [(10, 3), (2, 5), (8, 1)])
def test_shards_are_disjoint_and_complete(n, hosts, shuffle):
  source = numbers(n)
  shards = [
    # Different seeds: hosts need not agree.
    read(
      source, shuffle=shuffle, seed=host, shard_info=seqio.ShardInfo(index=host, num_shards=hosts)
    )
    for host in range(hosts)
  ]
  assert sorted(itertools.chain(*shards)) == list(range(n))
  sizes = [len(shard) for shard in shards]
  assert max(sizes) - min(sizes) <= 1


# Within an epoch of many rows, and across the ends of short ones.
@pytest.mark.parametrize(('n', 'before'), [(50_000, 200), (100, 170)])
def test_an_iterator_resumes_exactly_from_a_small_state(tmp_path, n, before):
  def iterator():
    source = numbers(n)
    dataset = source.get_dataset(split='train', shuffle=True, seed=1)
    return iter(dataset.repeat())

  first = iterator()
  for _ in range(before):
    next(first)
  path = tf.train.Checkpoint(iterator=first).write(str(tmp_path / 'state'))
  # tf.data's own read-ahead is in it; 50,000 rows would be megabytes.
  assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 100_000
  second = iterator()
  tf.train.Checkpoint(iterator=second).read(path).assert_consumed()
  for _ in range(250):
    assert next(first) == next(second)


def test_rows_are_read_when_needed_and_once():
  reads = []

  def read_rows():
    reads.append(1)
    return {'targets': ['0']}

  source = sources.RowsDataSource({'train': read_rows})
  assert not reads
  read(source, shuffle=False)
  read(source, shuffle=False)
  assert len(reads) == 1


def test_read_pairs(tmp_path):
  (tmp_path / 'a.tsv').write_text('1\tx\n2\ty\n')
  (tmp_path / 'b.tsv').write_text('3\tz\n')
  assert sources.read_pairs(str(tmp_path / '*.tsv')) == {
    'inputs': ['1', '2', '3'],
    'targets': ['x', 'y', 'z'],
  }
  (tmp_path / 'c.jsonl').write_text(json.dumps({'q': 'Q', 'a': 'A'}))
  assert sources.read_pairs(str(tmp_path / 'c.jsonl'), fields=('q', 'a')) == {
    'inputs': ['Q'],
    'targets': ['A'],
  }
  (tmp_path / 'd.tsv').write_text('\n')
  with pytest.raises(UsageError, match=r'holds no rows'):
    sources.read_pairs(str(tmp_path / 'd.tsv'))


def test_read_documents_joins_neighbours_within_a_file(tmp_path):
  (tmp_path / 'a.txt').write_text('1\n2\n\n3\n')
  (tmp_path / 'b.txt').write_text('4\n')
  pattern = str(tmp_path / '*.txt')
  assert sources.read_documents(pattern)['targets'] == ['1', '2', '3', '4']
  joined = sources.read_documents(pattern, lines_per_document=2)
  assert joined['targets'] == ['1\n2', '3', '4']
  jsonl = tmp_path / 'c.jsonl'
  jsonl.write_text('{"text": "x\\ny"}\n')
  assert sources.read_documents(str(jsonl))['targets'] == ['x\ny']


def test_streamed_text(tmp_path):
  (tmp_path / 'a.txt').write_text('1\n\n2\n')
  (tmp_path / 'b.txt.gz').write_bytes(gzip.compress('3\n4 ü\n'.encode()))
  source = sources.stream_text({'train': str(tmp_path / '*')})
  lines = [
    e['targets'].decode() for e in source.get_dataset('train', shuffle=False).as_numpy_iterator()
  ]
  assert sorted(lines) == ['', '1', '2', '3', '4 ü']
  assert len(source.list_shards('train')) == 2
