"""Reads TFRecord files of tf.train.Example: the one kind of rows that needs TensorFlow."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from t5x_lite.data import records
from t5x_lite.data.text_files import Bad
from t5x_lite.errors import UsageError

# TensorFlow only reads here; it must not reserve an accelerator's memory.
with contextlib.suppress(RuntimeError):  # already initialised by the caller
  tf.config.set_visible_devices([], 'GPU')


def read(path: str, bad: Bad) -> Iterator[tuple[int, dict[str | int, Any]]]:
  """Yields (number from 1, features by name) of plain or gzip records; see `records.read`."""
  number, packed = 0, 'GZIP' if path.endswith('.gz') else ''
  found = tf.data.TFRecordDataset(path, packed).as_numpy_iterator()
  try:
    for number, record in enumerate(found, start=1):
      try:
        features = tf.train.Example.FromString(record).features.feature
      except DecodeError as error:
        bad(UsageError(f'{path}:{number} is not a tf.train.Example: {error}'))
      else:
        yield number, {name: _value(features[name]) for name in sorted(features)}
  except tf.errors.OpError as error:
    what = 'is no TFRecord file, plain or .gz, that is whole'
    raise UsageError(f'{path} {what}; after record {number}: {error.message}') from error


def _value(feature: Any) -> Any:
  """Returns the only value of a feature, or the list; bytes as text, if they are UTF-8."""
  kind = feature.WhichOneof('kind') or 'bytes_list'
  values = list(getattr(feature, kind).value)
  with contextlib.suppress(UnicodeDecodeError, AttributeError):
    values = [value.decode('utf-8') for value in values]
  values = [*map(records.shortest, values)] if kind == 'float_list' else values
  return values[0] if len(values) == 1 else values
