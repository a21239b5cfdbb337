"""Reads TFRecord files of tf.train.Example: the one kind of rows that needs TensorFlow."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from t5x_lite.data.text_files import Bad
from t5x_lite.errors import UsageError

# TensorFlow only reads here; it must not reserve an accelerator's memory.
with contextlib.suppress(RuntimeError):  # already initialised by the caller
  tf.config.set_visible_devices([], 'GPU')


def read(path: str, bad: Bad) -> Iterator[tuple[int, dict[str | int, Any]]]:
  """Yields (number of the record from 1, its features by name), plain or gzip; see `records.read`.

  A feature of one value is that value, of several their list. Bytes are text if they are UTF-8.
  """
  if path.endswith('.zst'):
    raise UsageError(f'{path}: TensorFlow reads TFRecords plain or as .gz; decompress it with zstd')
  packed = 'GZIP' if path.endswith('.gz') else ''
  records = iter(tf.data.TFRecordDataset(path, compression_type=packed).as_numpy_iterator())
  number = 0
  while True:
    try:
      record = next(records, None)
    except tf.errors.OpError as error:
      why = f'is not a whole TFRecord file after record {number}: {error.message}'
      raise UsageError(f'{path} {why}') from error
    if record is None:
      return
    number += 1
    try:
      features = tf.train.Example.FromString(record).features.feature
    except DecodeError as error:
      bad(UsageError(f'{path}:{number} is not a tf.train.Example: {error}'))
      continue
    yield number, {name: _value(features[name]) for name in sorted(features)}


def _value(feature: Any) -> Any:
  kind = feature.WhichOneof('kind')
  values = list(getattr(feature, kind).value) if kind else []
  if kind == 'bytes_list':
    values = [_text(value) for value in values]
  return values[0] if len(values) == 1 else values


def _text(value: bytes) -> str | bytes:
  try:
    return value.decode('utf-8')
  except UnicodeDecodeError:
    return value
