"""Small SeqIO tasks with known examples, and short ways to read them."""

import contextlib

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import dataset_iterator

LENGTHS = {'inputs': 24, 'targets': 16}
NUM_EXAMPLES = 300
# Example i is: inputs = [i + 3] * (1 + i % 11), targets = [i + 3, 1].
FIRST_ID = 3
FEATURES = {
  name: seqio.Feature(seqio.PassThroughVocabulary(512), dtype=tf.int32) for name in LENGTHS
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

  return seqio.FunctionDataSource(dataset_fn, splits=['train'], num_input_examples={'train': num})


@seqio.map_over_dataset(num_seeds=1)
def _drop_tokens(example, seed):
  keep = tf.random.stateless_uniform(tf.shape(example['inputs']), seed) < 0.7
  return example | {'inputs': tf.boolean_mask(example['inputs'], keep)}


def _stateful(ds):
  return ds.map(lambda ex: ex | {'inputs': tf.random.shuffle(ex['inputs'], seed=1)})


def _python(ds):
  def double(ex):
    inputs = tf.numpy_function(lambda x: x + 1, [ex['inputs']], tf.int32)
    return ex | {'inputs': tf.ensure_shape(inputs, [None])}

  return ds.map(double)


def _with(**values):
  return lambda ds: ds.map(lambda ex: ex | {k: tf.constant(v, tf.int32) for k, v in values.items()})


@contextlib.contextmanager
def registered():
  """Registers the tasks (dt_...) for the time of the context."""

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
  floats = FEATURES | {'inputs': seqio.ContinuousFeature(dtype=tf.float32, rank=1)}
  add('dt_float', features=floats)
  seqio.MixtureRegistry.add('dt_mixture', [('dt_low', 1), ('dt_high', 2)])
  seqio.MixtureRegistry.add('dt_mixed', [('dt_random', 1), ('dt_plain', 1)])
  seqio.MixtureRegistry.add('dt_rare', [('dt_plain', 100.0), ('dt_python', 0.5)])
  seqio.MixtureRegistry.add('dt_partly', [('dt_plain', 1), ('dt_none', 1)])
  yield
  for name in [n for n in seqio.TaskRegistry.names() if n.startswith('dt_')]:
    seqio.TaskRegistry.remove(name)
  for name in ('dt_mixture', 'dt_mixed', 'dt_rare', 'dt_partly'):
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
  return DatasetConfig(**values | kwargs)


def take(iterator, num):
  return [next(iterator) for _ in range(num)]


def batches(cfg, num, index=0, count=1):
  iterator = dataset_iterator.DatasetIterator(cfg, process_index=index, process_count=count)
  try:
    return take(iterator, num)
  finally:
    iterator.close()


def all_batches(cfg, index=0, count=1):
  iterator = dataset_iterator.DatasetIterator(cfg, process_index=index, process_count=count)
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
