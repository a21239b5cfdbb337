"""SeqIO sources for files: shuffled whole, shared by row, exact to resume.

SeqIO's own file sources shuffle files, and then a window of 1,000 examples: on one sorted file (as
a dictionary is) that gives correlated batches. Nor can hosts share a file without all of it parsed.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf

from t5x_lite.data import records, text_files
from t5x_lite.errors import UsageError

Columns = dict[str, list[str]]


class RowsDataSource(seqio.DataSource):
  """Rows held in memory.

  Every epoch is a fresh permutation of all rows, computed from a seed and a counter instead of
  filled into a buffer: the state that an iterator checkpoint holds is two numbers (2.6 kB for
  113,382 rows; tf.data's shuffle of the row numbers alone writes 25 MB).
  """

  def __init__(
    self, split_to_rows: Mapping[str, Callable[[], Columns]], *, rows_per_element: int | None = None
  ):
    """Takes what reads each split, when it is first asked for.

    With `rows_per_element` an element of the data set is not a row but vectors of this many.
    """
    super().__init__(splits=split_to_rows.keys(), performs_internal_shuffling=True)
    self._rows_per_element = rows_per_element

    def rows(split: str) -> dict[str, tf.Tensor]:
      return {k: tf.constant(v, tf.string) for k, v in split_to_rows[split]().items()}

    self._rows = functools.cache(rows)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """Rows are counted, so that any number of hosts can share them."""
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    """Returns the one shard that can be named."""
    return [split]

  def num_input_examples(self, split: str) -> int:
    """Returns the number of rows of a split."""
    return len(next(iter(self._rows(split).values())))

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused,
  ) -> tf.data.Dataset:
    """Returns the rows, or every `num_shards`-th of them, of one epoch.

    With `shuffle` each iteration is a new permutation, repeatable by `seed`. The shards are
    disjoint and complete whatever the seed, so hosts need not agree on one. The rest has no effect.
    """
    columns = self._rows(split)
    index, step = 0, 1
    if shard_info is not None:
      index, step = shard_info.index, shard_info.num_shards
    count = len(range(index, self.num_input_examples(split), step))
    numbers = tf.data.Dataset.range(count, output_type=tf.int32)
    if self._rows_per_element is not None:
      numbers = numbers.batch(self._rows_per_element)

    def rows(i: tf.Tensor) -> dict[str, tf.Tensor]:
      return {k: tf.gather(v, index + step * i) for k, v in columns.items()}

    if not shuffle or count < 2:
      return numbers.map(rows)

    def epoch(epoch_seed: tf.Tensor) -> tf.data.Dataset:
      return numbers.map(
        lambda i: rows(tf.random.experimental.index_shuffle(i, epoch_seed, count - 1))
      )

    # A new pair of numbers at every iteration, that is, every epoch.
    seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    return seeds.batch(2, drop_remainder=True).take(1).flat_map(epoch)


def read_pairs(
  pattern: str, *, fields: Sequence[str | int] = (0, 1), file_format: str = ''
) -> Columns:
  """Returns inputs and targets of all rows of a pattern's files; UsageError if a file is bad."""
  paths = text_files.expand(pattern)
  rows = [row for path in paths for row in records.rows(path, fields, file_format)]
  _not_empty(rows, pattern)
  return {'inputs': [row[0] for row in rows], 'targets': [row[1] for row in rows]}


def read_documents(
  pattern: str,
  *,
  field: str | int = 'text',
  file_format: str = '',
  lines_per_document: int = 1,
  first: int | None = None,
) -> Columns:
  """Returns the documents of the files of a pattern as targets; TSV and JSONL hold them in `field`.

  `lines_per_document` neighbouring rows are joined, with line breaks: documents are shuffled, and
  rows that continue each other should stay together. Of each file the `first` rows count, or all.
  UsageError if a file is missing, empty or malformed.
  """
  documents: list[str] = []
  for path in text_files.expand(pattern):
    rows = itertools.islice(records.rows(path, [field], file_format), first)
    texts = [row[0] for row in rows]
    for start in range(0, len(texts), lines_per_document):
      documents.append('\n'.join(texts[start : start + lines_per_document]))
  return {'targets': _not_empty(documents, pattern)}


def stream_text(
  split_to_pattern: Mapping[str, str], first: int | None = None
) -> seqio.FileDataSource:
  """Returns a source for text too large for memory, one document a line.

  Hosts share by file when there are enough files, else by line (SeqIO). Only the order of files is
  shuffled here; the task shuffles a window of examples. UsageError if only the first are wanted.
  """
  if first is not None:
    raise UsageError(f'{split_to_pattern} is streamed: put its first {first} lines into a file')
  paths = {split: text_files.expand(pattern) for split, pattern in split_to_pattern.items()}
  if any(path.endswith('.zst') for found in paths.values() for path in found):
    raise UsageError(f'{split_to_pattern} is streamed, plain or as .gz: pack .zst anew with gzip')

  def read(path: tf.Tensor) -> tf.data.Dataset:
    # compression_type '' and 'GZIP' may be a tensor, one per file.
    compression = tf.where(tf.strings.regex_full_match(path, r'.*\.gz'), 'GZIP', '')
    dataset = tf.data.TextLineDataset(path, compression_type=compression)
    return dataset.map(lambda line: {'targets': line})

  return seqio.FileDataSource(read, paths)


def _not_empty(values: list, pattern: str) -> list:
  if not values:
    raise UsageError(f'{pattern!r} holds no rows')
  return values
