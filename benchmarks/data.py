"""The input pipeline beside t5's on SeqIO: examples per second.

  python benchmarks/data.py [--t5 PATH] [--threads 1 2] [--repeats 3]

Span corruption of the embedded Shakespeare, 512 inputs and 114 targets, from text and from tokens
that lie in memory, to examples; and whole tasks, shuffled and from text to packed batches of 64
rows as a train step takes them: that span corruption, and translation pairs in rows of 256 and 256
(packing alone is in benchmarks/packing.py). t5's is its own code: PATH is its
`t5/data/preprocessors.py` (`pip download --no-deps t5` and unpack; it needs `babel`), behind
`seqio.preprocessors.tokenize`; append_eos_after_trim follows both, and then what T5X reads with,
`seqio.get_dataset` and EncDecFeatureConverter(pack=True). Runs begin when the pipeline is warm and
are interleaved; the median is printed, with the processor time of all threads per example, which a
busy machine distorts less than the clock.
"""

import argparse
import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.objectives import preprocessors
from t5x_lite.data.rows.dataset_iterator import DatasetIterator
from t5x_lite.data.tasks import catalog, text_preprocessors

LENGTHS = {'inputs': 512, 'targets': 114}
WINDOW = 256
ROWS = 64
TASKS = (
  ('shakespeare_span_corruption_t5', LENGTHS, ''),
  ('translate_en_de_t5', {'inputs': 256, 'targets': 256}, 'translate English to German: '),
)


def sources(features: dict, documents: list[bytes]) -> dict[str, Callable[[], tf.data.Dataset]]:
  """Returns data sets without end: of texts, and of their tokens."""
  vocabulary = features['targets'].vocabulary
  tokens = tf.ragged.constant([vocabulary.encode(d.decode()) for d in documents], dtype=tf.int32)

  def repeated(values) -> Callable[[], tf.data.Dataset]:
    return lambda: tf.data.Dataset.from_tensor_slices({'targets': values}).repeat()

  return {'text': repeated(documents), 'tokens': repeated(tokens)}


def pipelines(features: dict, start: str, t5) -> dict[str, Callable]:
  """Returns each maker of examples as a function from a data set to a data set."""

  def finished(dataset):
    return seqio.preprocessors.append_eos_after_trim(
      dataset, sequence_length=LENGTHS, output_features=features
    )

  def ours(dataset):
    if start == 'text':
      with text_preprocessors.in_python():
        dataset = text_preprocessors.tokenize_documents(dataset, features)
    return finished(preprocessors.span_corruption(dataset, LENGTHS, features))

  def theirs(dataset):
    if start == 'text':
      dataset = seqio.preprocessors.tokenize(dataset, features, copy_pretokenized=False)
    return finished(t5.span_corruption(dataset, LENGTHS, features))

  return {'ours': ours} | ({'t5': theirs} if t5 else {})


def batches(name: str, lengths: dict, prefix: str, threads: int, t5) -> dict[str, Iterator]:
  """Returns the packed batches of a registered task, and of the same rows in t5's way."""
  rows = {'mixture_or_task_name': name, 'task_feature_lengths': lengths, 'batch_size': ROWS}
  found: dict[str, Iterator] = {'ours': DatasetIterator(DatasetConfig(**rows, num_threads=threads))}
  if not t5:
    return found
  task = seqio.get_mixture_or_task(name)
  columns = ('targets',) if not prefix else ('inputs', 'targets')

  def read(split, shuffle_files=False, seed=None):
    rows = list(task.source.get_dataset(split, shuffle=False).as_numpy_iterator())
    # Ours reads pairs in vectors of some hundred rows.
    texts = {x: np.concatenate([np.atleast_1d(row[x]) for row in rows]) for x in columns}
    if prefix:
      texts['inputs'] = prefix.encode() + texts['inputs']
    return tf.data.Dataset.from_tensor_slices(texts)

  theirs = f'{name}_of_t5'
  if theirs not in seqio.TaskRegistry.names():
    objective = () if prefix else (t5.span_corruption,)
    seqio.TaskRegistry.add(
      theirs,
      source=seqio.FunctionDataSource(read, splits=('train',)),
      preprocessors=[
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        *objective,
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features=task.output_features,
    )
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  dataset = seqio.get_dataset(
    theirs,
    lengths,
    dataset_split='train',
    shuffle=True,
    num_epochs=None,
    feature_converter=seqio.EncDecFeatureConverter(pack=True),
    seed=0,
  )
  dataset = dataset.batch(ROWS, drop_remainder=True).prefetch(2).with_options(options)
  return {**found, 't5': dataset.as_numpy_iterator()}


def count(window) -> int:
  """Returns how many examples a batch has."""
  packed = window.get('decoder_segment_ids')
  return WINDOW if packed is None else int(packed.max(axis=1).sum())


def main():
  """Prints a line for each source, pipeline and number of threads."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--t5', default='')
  parser.add_argument('--threads', type=int, nargs='*', default=[1, 2])
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--windows', type=int, default=12)
  args = parser.parse_args()
  t5 = None
  if args.t5:
    spec = importlib.util.spec_from_file_location('t5_preprocessors', args.t5)
    assert spec is not None and spec.loader is not None
    t5 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(t5)
  catalog.import_modules()
  task = seqio.get_mixture_or_task('shakespeare_span_corruption_t5')
  source = task.source.get_dataset('train', shuffle=False)
  documents = [example['targets'] for example in source.as_numpy_iterator()]
  runs: dict[tuple, Iterator] = {}
  for threads, (start, make) in itertools.product(
    args.threads, sources(task.output_features, documents).items()
  ):
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    for name, pipeline in pipelines(task.output_features, start, t5).items():
      with seqio.map_seed_manager(0):
        dataset = pipeline(make()).prefetch(WINDOW).ragged_batch(WINDOW).with_options(options)
      runs[start, name, threads] = iter(dataset)
  for threads, (name, lengths, prefix) in itertools.product(args.threads, TASKS):
    for who, run in batches(name, lengths, prefix, threads, t5).items():
      runs[name.removesuffix('_t5'), who, threads] = run
  times: dict[tuple, list] = {key: [] for key in runs}
  for repeat in range(args.repeats + 1):
    for key, run in runs.items():
      time.sleep(0.5)  # the others fill their buffers
      next(run)
      clock, processor = time.perf_counter(), time.process_time()
      examples = rows = 0
      while rows < WINDOW * args.windows:
        window = next(run)
        examples += count(window)
        rows += WINDOW if 'targets' in window else ROWS
      took = time.perf_counter() - clock, time.process_time() - processor
      if repeat:
        times[key].append([1e6 * t / examples for t in took])
  for run in runs.values():
    if isinstance(run, DatasetIterator):
      run.close()
  runs.clear()  # before the interpreter ends, see `text_preprocessors.in_python`
  del run
  print(f'{"from":33}{"pipeline":10}{"threads":>8}{"examples/s":>12}{"us of CPU":>12}')
  for (start, name, threads), values in times.items():
    clock, processor = (statistics.median(column) for column in zip(*values, strict=True))
    print(f'{start:33}{name:10}{threads:8}{1e6 / clock:12,.0f}{processor:12.1f}')


if __name__ == '__main__':
  main()
