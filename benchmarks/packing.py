"""Packing speed and fill: ours beside SeqIO's and Grain's, per core.

  python benchmarks/packing.py [--num_examples 20000] [--repeats 3]

Two workloads of real lengths (the embedded text, T5 vocabulary): Shakespeare's
paragraphs, each span-corrupted by itself, in rows of 512 and 114 tokens; and
translation pairs in rows of 256 and 256. All packers get the same examples from
memory and give numpy batches of 64 rows with segment ids and positions. Time is
the process's CPU time, all threads together, so that a busy machine does not
matter. Runs are interleaved; the median is printed. Grain is needed for its two
lines: pip install grain.
"""

import argparse
import gzip
import importlib.resources
import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from t5x_lite.data.rows import packing
from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary

BATCH = 64
NUM_OPEN_ROWS = 64
Pack = Callable[[], Iterator[dict[str, np.ndarray]]]


def read(name: str) -> list[str]:
  """Returns the lines of an embedded corpus."""
  path = importlib.resources.files('t5x_lite.data.corpora') / name
  with path.open('rb') as file, gzip.open(file, 'rt', encoding='utf-8') as text:
    return text.read().splitlines()


def span_corruption(num: int) -> tuple[list, dict[str, int]]:
  """Returns examples of the lengths that corrupting single paragraphs gives."""
  vocabulary = make_vocabulary(VocabularyConfig())
  examples = []
  for line in read('shakespeare_train.txt.gz')[:num]:
    tokens = np.array(vocabulary.encode(line)[:570], np.int32)
    noise = max(round(0.15 * len(tokens)), 1)
    spans = max(round(noise / 3), 1)
    inputs = len(tokens) - noise + spans + 1
    targets = noise + spans + 1
    examples.append(
      {'inputs': np.resize(tokens, inputs)[:512], 'targets': np.resize(tokens, targets)[:114]}
    )
  return examples, {'inputs': 512, 'targets': 114}


def translation(num: int) -> tuple[list, dict[str, int]]:
  """Returns English-German pairs, repeated up to `num`."""
  vocabulary = make_vocabulary(VocabularyConfig())
  examples = []
  for line in read('translate_en_de_train.tsv.gz'):
    english, german = line.split('\t')[:2]
    examples.append(
      {
        'inputs': np.array(vocabulary.encode(english)[:256], np.int32),
        'targets': np.array(vocabulary.encode(german)[:256], np.int32),
      }
    )
  examples *= -(-num // len(examples))
  return examples[:num], {'inputs': 256, 'targets': 256}


def ours(examples: list, lengths: dict[str, int]) -> Pack:
  """Windows of 256 ragged examples, as row_stream.py feeds them."""
  windows = []
  for start in range(0, len(examples), 256):
    window = examples[start : start + 256]
    windows.append(
      {name: packing.Ragged.from_arrays([e[name] for e in window]) for name in lengths}
    )

  def run():
    packer = packing.Packer(lengths, num_open_rows=NUM_OPEN_ROWS)
    for window in windows:
      yield packer.add(window)
    yield packer.flush()

  return run


def seqio_packer(examples: list, lengths: dict[str, int]) -> Pack:
  """SeqIO's trim_and_pack_dataset."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  import seqio
  import tensorflow as tf

  values = {n: tf.constant(np.concatenate([e[n] for e in examples])) for n in lengths}
  bounds = {n: tf.constant(np.cumsum([0] + [len(e[n]) for e in examples])) for n in lengths}

  def example(i):
    return {n: v[bounds[n][i] : bounds[n][i + 1]] for n, v in values.items()}

  def run():
    dataset = tf.data.Dataset.range(len(examples)).map(example)
    dataset = seqio.trim_and_pack_dataset(dataset, lengths).batch(BATCH)
    return dataset.as_numpy_iterator()

  return run


def grain_packer(kind: str, examples: list, lengths: dict[str, int]) -> Pack:
  """Grain's first-fit or best-fit."""
  import grain

  def run():
    # Its reader threads cost more than they bring for examples in memory.
    source = grain.MapDataset.source(examples).to_iter_dataset(
      grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    )
    packed = getattr(grain.experimental, kind)(
      source, length_struct=lengths, num_packing_bins=NUM_OPEN_ROWS, shuffle_bins=False
    )
    return iter(packed.batch(BATCH, drop_remainder=False))

  return run


def measure(run: Pack) -> tuple[float, int]:
  """Returns CPU seconds and the number of rows that came out."""
  start = time.process_time()
  rows = sum(len(batch['inputs']) for batch in run() if batch)
  return time.process_time() - start, rows


def main() -> None:
  """Prints one line per packer and workload."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--num_examples', type=int, default=20_000)
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()
  for workload in (span_corruption, translation):
    examples, lengths = workload(args.num_examples)
    num_tokens = {name: sum(len(example[name]) for example in examples) for name in lengths}
    packers = {'ours': ours(examples, lengths)}
    packers['SeqIO'] = seqio_packer(examples, lengths)
    for kind in ('FirstFitPackIterDataset', 'BestFitPackIterDataset'):
      packers[f'Grain {kind[:8]}'] = grain_packer(kind, examples, lengths)
    seconds: dict[str, list[float]] = {name: [] for name in packers}
    rows = {}
    for _ in range(args.repeats):
      for name, run in packers.items():
        elapsed, rows[name] = measure(run)
        seconds[name].append(elapsed)
    print(f'{workload.__name__}: {len(examples)} examples, rows of {lengths}')
    for name in packers:
      rate = len(examples) / statistics.median(seconds[name])
      fill = ' / '.join(f'{num_tokens[k] / rows[name] / lengths[k]:.1%}' for k in lengths)
      print(f'  {name:15} {rate:10,.0f} examples per CPU second   fill {fill}')


if __name__ == '__main__':
  main()
