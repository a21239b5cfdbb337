"""DatasetConfig, apart from the iterator: made and checked without TensorFlow's 15 seconds."""

import dataclasses
from typing import Any

import numpy as np

from t5x_lite.data.rows import feature_converters
from t5x_lite.errors import UsageError, check_fields, refusing

_ARCHITECTURES = {'encoder_decoder': ('enc_dec',), 'decoder': ('lm', 'prefix_lm'), 'encoder': ()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
  """Which examples, in what order, cut into what batches.

  Attributes:
    mixture_or_task_name: a name in SeqIO's registries.
    task_feature_lengths: tokens per row by task feature, a dict or pairs; what is longer is cut.
    batch_size: rows per step over all hosts.
    split: the split to read.
    shuffle: whether files and examples are shuffled (by `seed`).
    seed: same seed, same stream.
    pack: several examples share a row.
    num_epochs: passes over the data, the last batch filled up with rows of weight 0; None: no end.
    drop_remainder: leave out that last batch if it is not full.
    module: Python module(s), comma-separated, whose import registers tasks.
    use_cached: read what seqio_cache_tasks wrote.
    feature_converter: 'enc_dec', 'lm' or 'prefix_lm'.
    loss_on_targets_only: see FeatureConverter.
    decoder_start_id: first decoder input of every example.
    segment_ids: give segment ids and positions; None means when packing. Without them padding is
      where the token is 0: cheaper, and right if no example contains id 0 (this is checked).
    per_task_loss: of a mixture, log the loss of each task while training.
    vocab_size: ids must be below; 0 takes the size of the task's vocabulary.
    host_sharding: 'source', each host reads its own part of the examples; or 'replicated', each
      makes every batch and keeps its rows, so that the batches do not depend on the number of
      hosts, at the cost of reading everything everywhere. Finite streams are always replicated:
      that gives all hosts the same number of batches.
    allow_process_count_change: begin anew after another number of processes, see DatasetIterator.
    allow_stateful_ops: accept a task whose TensorFlow ops keep hidden state (tf.random.uniform,
      variables): resuming is then not exact.
    window: examples fetched at a time; no effect on the result.
    num_open_rows: rows that packing fills at a time.
    prefetch_batches: batches kept ready.
    num_threads: TensorFlow threads; 0 means half the cores, at most 16.
  """

  mixture_or_task_name: str
  task_feature_lengths: Any
  batch_size: int
  split: str = 'train'
  shuffle: bool = True
  seed: int = 0
  pack: bool = True
  num_epochs: int | None = None
  drop_remainder: bool = False
  module: str = ''
  use_cached: bool = False
  feature_converter: str = 'enc_dec'
  loss_on_targets_only: bool = True
  decoder_start_id: int = 0
  segment_ids: bool | None = None
  per_task_loss: bool = False
  vocab_size: int = 0
  host_sharding: str = 'source'
  allow_process_count_change: bool = False
  allow_stateful_ops: bool = False
  window: int = 256
  num_open_rows: int = 64
  prefetch_batches: int = 2
  num_threads: int = 0

  def __post_init__(self):
    lengths = self.task_feature_lengths
    form = "must map names to lengths, for example {'inputs': 512, 'targets': 114}"
    with refusing(f'task_feature_lengths is {lengths!r}, {form}', TypeError, ValueError):
      pairs = tuple((str(name), int(length)) for name, length in dict(lengths).items())
    object.__setattr__(self, 'task_feature_lengths', pairs)
    kinds, needed = feature_converters.CONVERTERS, {'targets'}
    needed |= {'inputs'} if self.feature_converter != 'lm' else set()
    counts = ('batch_size', 'window', 'num_open_rows', 'prefetch_batches', 'num_epochs')
    whole = needed <= self.lengths.keys() and min(self.lengths.values()) >= 1
    check_fields(
      self,
      feature_converter=(self.feature_converter in kinds, f'one of {", ".join(kinds)}'),
      host_sharding=(self.host_sharding in ('source', 'replicated'), 'source or replicated'),
      task_feature_lengths=(whole, f'at least 1 each, with {" and ".join(sorted(needed))}'),
      pack=(not self.pack or self.has_segment_ids, 'False without segment_ids; leave those unset'),
      **{x: (getattr(self, x) is None or getattr(self, x) >= 1, 'at least 1') for x in counts},
    )

  @property
  def lengths(self) -> dict[str, int]:
    """The task feature lengths as a dict."""
    return dict(self.task_feature_lengths)

  @property
  def has_segment_ids(self) -> bool:
    """Whether batches hold segment ids and positions."""
    return self.pack if self.segment_ids is None else self.segment_ids

  @property
  def replicated(self) -> bool:
    """Whether every host makes all rows and keeps its part of each batch."""
    return self.host_sharding == 'replicated' or self.num_epochs is not None

  @property
  def converter(self) -> feature_converters.FeatureConverter:
    """The rule from task features to model features."""
    return feature_converters.FeatureConverter(
      kind=self.feature_converter,
      lengths=self.lengths,
      decoder_start_id=self.decoder_start_id,
      loss_on_targets_only=self.loss_on_targets_only,
      segment_ids=self.has_segment_ids,
      task_ids=self.per_task_loss,
    )

  def check_architecture(self, name: str) -> None:
    """Refuses models that take no such batches."""
    kinds = _ARCHITECTURES[name]
    if self.feature_converter not in kinds:
      allowed = ' or '.join(map(repr, kinds)) or 'none that trains'
      task, kind = self.mixture_or_task_name, self.feature_converter
      read = f'{task} is read with feature_converter={kind!r}'
      raise UsageError(f'{read}; the architecture {name!r} needs {allowed}')

  def check_processes(self, index: int, count: int) -> None:
    """Refuses a batch that the processes cannot share equally."""
    if not 0 <= index < count:
      raise UsageError(f'process_index is {index}, must be in [0, {count})')
    if self.batch_size % count:
      fix = f'processes: take a multiple of {count}'
      raise UsageError(f'batch_size {self.batch_size} does not divide over {count} {fix}')


def batch_spec(cfg: DatasetConfig) -> dict[str, tuple[tuple, np.dtype]]:
  """Returns shape and dtype of every array of a GLOBAL batch; reads no data."""
  return {
    name: ((cfg.batch_size, length), dtype)
    for name, (length, dtype) in cfg.converter.spec().items()
  }
