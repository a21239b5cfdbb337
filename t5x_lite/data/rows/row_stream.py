"""A SeqIO task or mixture read as finished rows, with a savable position.

SeqIO reads, preprocesses and trims the examples; they cross from TensorFlow to numpy as ragged
windows, cheaply, and are packed (or padded) and converted there.
"""

import contextlib
import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from etils import epath

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import feature_converters, packing
from t5x_lite.data.tasks import catalog, text_preprocessors
from t5x_lite.errors import UsageError, first_line, refusing

Sizes = Mapping[str, int]

# TensorFlow only reads text here; it must not reserve an accelerator's memory.
with contextlib.suppress(RuntimeError):  # already initialised by the caller
  tf.config.set_visible_devices([], 'GPU')


def open_task(cfg: DatasetConfig) -> tuple[Any, feature_converters.FeatureConverter, Sizes]:
  """Returns the task or mixture, its converter, and the first id that is too large by feature."""
  provider = catalog.task_provider(cfg)
  features = provider.output_features
  weights = feature_converters.LOSS_WEIGHTS in features
  sizes = {name: cfg.vocab_size or features[name].vocabulary.vocab_size for name in cfg.lengths}
  return provider, dataclasses.replace(cfg.converter, loss_weights=weights), sizes


def read_examples(
  cfg: DatasetConfig,
  provider: seqio.Task | seqio.Mixture,
  *,
  seed: int,
  shard: seqio.ShardInfo | None = None,
  trim: bool = True,
) -> list[tf.data.Dataset]:
  """Returns SeqIO's examples in a repeatable order, read on few threads.

  One dataset, or for a finite pass over a mixture one for each task: SeqIO ends a finite mixture
  when the first of its tasks runs out, which would leave most of the others out of an evaluation.
  """
  tasks: list[Any] = [provider]
  if isinstance(provider, seqio.Mixture):
    if cfg.per_task_loss:
      provider = _Numbered(provider)
      tasks = [provider]
    if cfg.num_epochs is not None:
      tasks = [task for task in provider.tasks if cfg.split in task.splits]
  half_the_cores = max((os.cpu_count() or 1) // 2, 1)
  options = tf.data.Options()
  options.deterministic = True
  # Its thread sleeps for up to a minute between two looks at the pipeline, and whoever drops the
  # iterator waits for it. It makes nothing here any faster.
  options.autotune.enabled = False
  options.threading.private_threadpool_size = cfg.num_threads or min(half_the_cores, 16)
  try:
    datasets = [
      task.get_dataset(
        sequence_length=cfg.lengths,
        split=cfg.split,
        use_cached=cfg.use_cached,
        shuffle=cfg.shuffle,
        seed=seed,
        shard_info=shard,
        num_epochs=cfg.num_epochs,
        trim_output_features=trim,
        # SeqIO would hold the raw examples of small tasks in memory, and every checkpoint of the
        # iterator with them; it saves no preprocessing.
        try_in_mem_cache=False,
      ).with_options(options)
      for task in tasks
    ]
  except KeyError as error:
    column = re.search(r'KeyError: (.+)', str(error))
    why = f'a preprocessor asks for the column {column[1] if column else error}, which no row has'
    raise UsageError(f'{cfg.mixture_or_task_name} cannot be read: {why}') from error
  except (ValueError, OSError, tf.errors.NotFoundError) as error:
    raise UsageError(f'{cfg.mixture_or_task_name} cannot be read: {first_line(error)}') from error
  if cfg.per_task_loss and cfg.num_epochs is not None:
    numbers = [seqio.get_subtasks(provider).index(task) for task in tasks]
    return [_numbered(*pair) for pair in zip(datasets, numbers, strict=True)]
  return datasets


class _Numbered(seqio.Mixture):
  """A mixture whose examples say which of its tasks they come from."""

  def __init__(self, mixture: seqio.Mixture):
    rates: list[Any] = [(task, mixture.get_rate) for task in mixture.tasks]
    super().__init__(mixture.name, rates, sample_fn=mixture._sample_fn)

  def get_task_dataset(self, task: seqio.Task, *args, **kwargs) -> tf.data.Dataset:
    number = self.tasks.index(task)
    return _numbered(super().get_task_dataset(task, *args, **kwargs), number)


def _numbered(dataset: tf.data.Dataset, number: int) -> tf.data.Dataset:
  return dataset.map(lambda example: {**example, feature_converters.TASK_ID: [number]})


def _token_dataset(cfg: DatasetConfig, seed: int, shard: seqio.ShardInfo | None) -> tf.data.Dataset:
  """Returns the features that the converter needs, of all tasks."""
  provider, converter, _ = open_task(cfg)
  names = (*cfg.lengths, *converter.extra_features)
  datasets = [
    dataset.map(lambda example: {name: example[name] for name in names})
    for dataset in read_examples(cfg, provider, seed=seed, shard=shard)
  ]
  if cfg.shuffle and len(datasets) > 1:
    return tf.data.Dataset.sample_from_datasets(datasets, seed=seed, stop_on_empty_dataset=False)
  return functools.reduce(tf.data.Dataset.concatenate, datasets)


def check_ids(cfg: DatasetConfig, sizes: Sizes, examples: packing.Examples) -> None:
  """Refuses ids that the model has no row for, or would take for padding."""
  task = cfg.mixture_or_task_name
  for name, size in sizes.items():
    values = examples[name].values
    low, high = values.min(initial=0), values.max(initial=0)
    if low < 0 or high >= size:
      token, fix = low if low < 0 else high, 'the task and the model need the same vocabulary'
      raise UsageError(f'id {token} in {name!r} of {task} is outside [0, {size}): {fix}')
    if not cfg.has_segment_ids and not values.all():
      why = 'where it would be read as padding: set segment_ids=True'
      raise UsageError(f'id 0 occurs inside {name!r} of {task}, {why}')


def _to_numpy(tensor: tf.Tensor | tf.RaggedTensor) -> packing.Ragged:
  if isinstance(tensor, tf.RaggedTensor):
    return packing.Ragged(tensor.flat_values.numpy(), tensor.row_lengths().numpy())
  # tf.data batches features of one known length densely.
  values = tensor.numpy()
  return packing.Ragged(values.reshape(-1), np.full(len(values), values.shape[1], np.int64))


class RowStream:
  """Finished rows, a window of examples at a time, with a savable position.

  The position is the tf.data iterator's own checkpoint, which holds shuffle buffers, caches and
  seeds. Pipelines that run Python (tf.py_function, Dataset.from_generator) have none: for those it
  is the number of examples read, and `read` skips as many: exact if the code is deterministic.
  """

  def __init__(self, cfg: DatasetConfig, seed: int, index: int = 0, count: int = 1):
    self._cfg = cfg
    _, self._converter, self._vocab_sizes = open_task(cfg)
    self._packer = packing.Packer(
      self._converter.row_lengths, self._converter.aligned, num_open_rows=cfg.num_open_rows
    )
    self._num_examples = 0
    self.ended = False
    shard = None if cfg.replicated else seqio.ShardInfo(index=index, num_shards=count)
    with text_preprocessors.in_python():
      self._dataset = _token_dataset(cfg, seed, shard)
    # Made once: a second iterator over a shuffled dataset has another order.
    self._iterator: Iterator[dict[str, Any]] | None = None
    # Whether the position is a count; at the beginning it is, 0.
    self._counted = True

  def close(self) -> None:
    """Ends tf.data's threads; nothing can be read afterwards."""
    self._iterator = None

  def _iterate(self, skip: int = 0) -> Iterator[dict[str, Any]]:
    rest = self._dataset.skip(skip) if skip else self._dataset
    return iter(rest.ragged_batch(self._cfg.window))

  def _write_iterator(self, prefix: epath.Path) -> bool:
    """Writes tf.data's position, and returns whether it has one; UsageError where it should."""
    task = self._cfg.mixture_or_task_name
    try:
      tf.train.Checkpoint(iterator=self._iterator).write(os.fspath(prefix))
      return True
    except tf.errors.FailedPreconditionError as error:
      match = re.search(r'(\w+) is stateful', str(error))
    op = match[1] if match else 'an op'
    if 'PyFunc' not in op and not self._cfg.allow_stateful_ops:
      raise UsageError(
        f'{task} uses {op}, a TensorFlow op with hidden state that no checkpoint can hold: use '
        'stateless random ops (SeqIO: map_over_dataset(num_seeds=1)), or set '
        'allow_stateful_ops=True and do without exact resumption'
      )
    logging.warning(
      f'{task} runs Python or keeps hidden state in its input pipeline ({op}): a resumed run reads '
      'it again from the start up to where it was, which takes time and is exact only if that code '
      'is deterministic.'
    )
    return False

  def next_rows(self) -> packing.Rows:
    """Returns the rows that the next window of examples finishes."""
    if self._iterator is None:
      self._iterator = self._iterate()
    if (window := next(self._iterator, None)) is None:
      return self._end()
    if not self._num_examples:  # tried at once: a run must not learn it at its first checkpoint
      with tempfile.TemporaryDirectory() as directory:
        self._counted = not self._write_iterator(epath.Path(directory) / 'probe')
    examples = {name: _to_numpy(tensor) for name, tensor in window.items()}
    check_ids(self._cfg, self._vocab_sizes, examples)
    sizes = np.sum([examples[name].lengths for name in self._cfg.lengths], axis=0)
    self._num_examples += len(sizes)
    if not sizes.all():  # nothing to learn from, nothing to place
      keep = np.flatnonzero(sizes)
      examples = {n: packing.take(r, keep) for n, r in examples.items()}
    if not self._cfg.pack:
      return self._converter.padded(examples)
    return self._converter.convert(self._packer.add(self._converter.prepare(examples)))

  def _end(self) -> packing.Rows:
    if not self._num_examples or self._cfg.num_epochs is None:
      raise UsageError(
        f'{self._cfg.mixture_or_task_name} has no examples in split {self._cfg.split!r} for this '
        'host, or a task of it has none: check its preprocessors, or set '
        "host_sharding='replicated' if there are more hosts than examples"
      )
    self.ended = True
    rows = self._packer.flush()
    return self._converter.convert(rows) if rows else {}

  def write(self, prefix: epath.Path) -> dict[str, Any]:
    """Writes tf.data's position to files; returns the rest as arrays and dicts of them."""
    if not self._counted:  # of a task that is drawn rarely, it shows late
      self._counted = not self._write_iterator(prefix)
    counts = {'num_examples': self._num_examples, 'ended': self.ended, 'counted': self._counted}
    return {'packer': self._packer.state(), **{k: np.array(v) for k, v in counts.items()}}

  def read(self, prefix: epath.Path, state: Mapping[str, Any]) -> None:
    """Goes from the beginning to what `write` wrote and returned."""
    self._num_examples = int(state['num_examples'])
    self.ended = bool(state['ended'])
    self._packer.set_state(state['packer'])
    self._counted = bool(state['counted'])
    self._iterator = self._iterate(skip=self._num_examples * self._counted)
    if self._counted:
      return
    checkpoint = tf.train.Checkpoint(iterator=self._iterator)
    task = f'{self._cfg.mixture_or_task_name}: was the task or its data changed?'
    wrong = f'the saved position {prefix} does not fit the input pipeline of {task}'
    with refusing(wrong, tf.errors.OpError, AssertionError):
      checkpoint.read(os.fspath(prefix)).assert_consumed()
