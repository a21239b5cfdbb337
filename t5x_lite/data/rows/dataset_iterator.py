"""From a SeqIO task or mixture to numpy batches, exactly resumable.

A background thread turns windows of examples into rows (row_stream.py); the iterator hands out this
host's rows of each batch as a dict of arrays.

The position is the row stream's (the tf.data iterator at the end of a window and the examples in
the packer's open rows) and the rows not handed out yet. `save` stops the thread between two
windows: a restored iterator continues with the batch that `__next__` would have returned.
"""

import atexit
import io
import json
import threading
import uuid
from typing import Any, Self

import numpy as np
from absl import logging
from etils import epath

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import packing, row_stream
from t5x_lite.errors import DamagedError, UsageError
from t5x_lite.parallel import checksums, pytrees

_PATIENCE_SECONDS = 60

# Fields that the stream of rows depends on. The batch size is not one of them:
# a run may go on with larger batches and see the same rows in the same order.
_STREAM_FIELDS = (
  'mixture_or_task_name split task_feature_lengths shuffle seed pack num_epochs use_cached '
  'feature_converter loss_on_targets_only decoder_start_id segment_ids per_task_loss host_sharding '
  'num_open_rows'
).split()


class DatasetIterator:
  """Batches of one host: `__next__` gives a dict of numpy arrays.

  Not for several consumers: one thread calls `__next__`, `save` and `restore`.
  """

  def __init__(self, cfg: DatasetConfig, *, process_index: int = 0, process_count: int = 1):
    """Reads nothing before `start`; UsageError if the config does not fit task or hosts."""
    cfg.check_processes(process_index, process_count)
    self._cfg, self._index, self._count = cfg, process_index, process_count
    self._rows_per_batch = cfg.batch_size // (1 if cfg.replicated else process_count)
    self._stem = f'process_{process_index}-of-{process_count}'
    self.num_batches = 0  # handed out since the stream began
    self._thread: threading.Thread | None = None
    self._condition = threading.Condition()
    self._reading = threading.Lock()  # free between two windows
    self._reset(cfg.seed)

  def _reset(self, seed: int) -> None:
    self._seed = seed
    self._untouched = True  # neither read from nor restored
    self._stream = row_stream.RowStream(self._cfg, seed, self._index, self._count)
    self._buffer = packing.RowBuffer()
    self._window_rows = 0
    self._ended = self._closed = False
    self._error: Exception | None = None

  # ---- The background thread ----

  def start(self) -> None:
    """Begins to read ahead (the first `__next__` does it too)."""
    self._untouched = False
    if self._thread is None and not self._closed:
      self._thread = threading.Thread(target=self._produce, name='t5x_lite-data', daemon=True)
      # A daemon thread inside TensorFlow must not outlive the interpreter.
      atexit.register(self.close)
      self._thread.start()

  def _produce(self) -> None:
    enough = self._cfg.prefetch_batches * self._rows_per_batch
    while self._error is None:
      with self._condition:
        # A window's worth more, to draw on while the next one is being made.
        self._condition.wait_for(
          lambda: self._closed or self._buffer.num_rows < enough + self._window_rows
        )
        if self._closed or self._ended:
          return
      with self._reading:
        rows, error = {}, None
        try:
          rows = self._stream.next_rows()
        except Exception as caught:  # raised again by __next__
          error = caught
        with self._condition:
          before = self._buffer.num_rows
          self._buffer.push(rows)
          self._window_rows = self._buffer.num_rows - before
          self._error = error
          # Only now: the consumer must not see the end before the last rows.
          self._ended = self._stream.ended
          self._condition.notify_all()

  def close(self, timeout: float | None = _PATIENCE_SECONDS) -> None:
    """Stops reading ahead; the iterator cannot be used afterwards."""
    with self._condition:
      self._closed = True
      self._condition.notify_all()
    if self._thread is not None:
      self._thread.join(timeout)
      if not self._thread.is_alive():
        self._stream.close()
      self._thread = None
      atexit.unregister(self.close)

  # ---- Batches ----

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> packing.Rows:
    if self._closed:
      raise ValueError('the dataset iterator is closed')
    self.start()
    num = self._rows_per_batch
    with self._condition:
      while not self._condition.wait_for(
        lambda: self._buffer.num_rows >= num or self._ended or self._error,
        timeout=_PATIENCE_SECONDS,
      ):
        logging.warning(
          'Still waiting for a batch of %s; do its preprocessors drop every example?',
          self._cfg.mixture_or_task_name,
        )
      left = self._buffer.num_rows
      if left < num and self._error:
        raise self._error
      if left == 0 or (left < num and self._cfg.drop_remainder):
        raise StopIteration
      rows = self._buffer.pop(num)
      self._condition.notify_all()
    self.num_batches += 1
    rows = packing.fill(rows, num)
    if self._cfg.replicated:
      rows = packing.host_rows(rows, self._index, self._count)
    return rows

  # ---- Position ----

  def save(self, directory) -> None:
    """Writes the position, so that `restore` gives the batch due next.

    One set of files per process index, `process_I-of-N.json` and those it names. The files are
    complete when this returns; committing the directory is the caller's.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Hosts that share a model axis share an index, and each has read ahead as far as it came: their
    # files must not mix. The last to finish counts.
    files = f'{self._stem}.{uuid.uuid4().hex[:8]}'
    with self._reading:
      if self._error:
        raise UsageError(f'the data cannot be read on: {self._error!r:.300}') from self._error
      arrays = {**self._stream.write(directory / files), 'rows': self._buffer.peek()}
    stream = io.BytesIO()
    np.savez(stream, **pytrees.flatten_names(arrays))
    (directory / f'{files}.npz').write_bytes(stream.getvalue())
    meta = {
      'process_index': self._index,
      'process_count': self._count,
      'num_batches': self.num_batches,
      'stream_seed': self._seed,
      'files': files,
      'config': _stream_config(self._cfg),
      'digests': checksums.of_files(directory, files),
    }
    unfinished = directory / f'{files}.json.unfinished'
    unfinished.write_text(json.dumps(checksums.signed(meta), indent=1))
    unfinished.replace(directory / f'{self._stem}.json')

  def restore(self, directory) -> None:
    """Goes to a saved position.

    With the process count of the save the continuation is exact, bit for bit; so it is with any
    count if the hosts are replicated. Otherwise, if cfg.allow_process_count_change, all hosts begin
    a new stream whose seed is folded from the old seed and the number of batches seen:
    deterministic, but examples of the current epoch may come again or later. UsageError without
    that leave, if another config saved it, or nothing.
    """
    directory = epath.Path(directory)
    path = directory / f'{self._stem}.json'
    if not path.exists():
      saved = list(directory.glob('process_0-of-*.json'))
      if len(saved) != 1:
        raise DamagedError(f'{directory} holds {len(saved)} saved data positions, expected one')
      [path] = saved
    meta = checksums.read_signed(path)
    checksums.check_files(directory, meta['digests'])
    _check_same_stream(self._cfg, meta['config'])
    if meta['process_count'] != self._count and not self._cfg.replicated:
      self._restart(meta)
      return
    files = meta['files']
    with io.BytesIO((directory / f'{files}.npz').read_bytes()) as stream:
      arrays = pytrees.nested((name.split('/'), x) for name, x in np.load(stream).items())
    self._rewind(meta['stream_seed'])
    self._untouched = False
    self._stream.read(directory / files, arrays)
    self._buffer.push(arrays.get('rows', {}))
    self._ended = self._stream.ended
    self.num_batches = meta['num_batches']

  def _rewind(self, seed: int) -> None:
    """Goes to the beginning of the stream of `seed`."""
    if self._untouched and seed == self._seed:
      return
    self.close(timeout=None)
    self._reset(seed)

  def _restart(self, meta: dict[str, Any]) -> None:
    old, batches = meta['process_count'], meta['num_batches']
    if not self._cfg.allow_process_count_change:
      raise UsageError(
        f'the data position was saved by {old} processes and there are {self._count} now: run with '
        f'{old}, or set allow_process_count_change=True to go on with a fresh shuffle'
      )
    fold = np.random.SeedSequence([meta['stream_seed'], batches, old])
    seed = int(fold.generate_state(1)[0]) & 0x7FFFFFFF
    logging.warning(
      f'Data position saved by {old} processes, now {self._count}: the stream begins anew with '
      f'seed {seed}, folded from seed {meta["stream_seed"]} and the {batches} batches seen. '
      'Examples of the current epoch may come again or later.'
    )
    self._rewind(seed)
    self.num_batches = batches


def _stream_config(cfg: DatasetConfig) -> dict[str, Any]:
  values = {name: getattr(cfg, name) for name in _STREAM_FIELDS}
  return json.loads(json.dumps(values))  # tuples as lists, as they come back


def _check_same_stream(cfg: DatasetConfig, saved: dict[str, Any]) -> None:
  for name, now in _stream_config(cfg).items():
    if saved.get(name, now) != now:
      was = f'the data position was saved with {name}={saved[name]!r}'
      fix = 'change it back, or start without the saved data position'
      raise UsageError(f'{was}, now it is {now!r}: {fix}')
