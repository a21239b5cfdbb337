import pytest
import tensorflow as tf

from t5x_lite.data import pairs, records
from t5x_lite.errors import UsageError


def feature(*values):
  if isinstance(values[0], bytes):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
  kind = tf.train.Int64List if isinstance(values[0], int) else tf.train.FloatList
  name = 'int64_list' if isinstance(values[0], int) else 'float_list'
  return tf.train.Feature(**{name: kind(value=values)})


def example(**features):
  message = tf.train.Example(features=tf.train.Features(feature=features))
  return message.SerializeToString()


def write(path, *rows):
  packed = 'GZIP' if str(path).endswith('.gz') else ''
  with tf.io.TFRecordWriter(str(path), packed) as writer:
    for row in rows:
      writer.write(row)
  return str(path)


@pytest.mark.parametrize('name', ['x.tfrecord', 'x.tfrecord-00000-of-00002', 'x.tfrecords.gz'])
def test_features_are_fields(tmp_path, name):
  first = example(
    text=feature('grün\n"q"'.encode()), n=feature(3), w=feature(0.5, 0.1), x=feature(3.8)
  )
  path = write(tmp_path / name, first, example(text=feature(b'b')))
  assert list(records.read(path)) == [
    (1, {'n': 3, 'text': 'grün\n"q"', 'w': [0.5, 0.1], 'x': 3.8}), (2, {'text': 'b'}),
  ]  # fmt: skip
  assert list(pairs.read_inputs(path, pairs.Columns(input='text'))) == ['grün\n"q"', 'b']


def test_bad_records_have_their_number(tmp_path):
  rows = [example(text=feature(b'a')), b'\xff\xff\xff', example(text=feature(b'\xff'))]
  path = write(tmp_path / 'x.tfrecord', *rows, example(other=feature(b'a')))
  with pytest.raises(UsageError, match=r'x\.tfrecord:2 is not a tf\.train\.Example'):
    list(pairs.read_inputs(path))
  told = []
  columns = pairs.Columns(input='text')
  assert list(pairs.read_inputs(path, columns, bad=told.append)) == ['a']
  assert [str(one).split(':')[1][:1] for one in told] == ['2', '3', '4']
  with open(path, 'rb') as file:
    (tmp_path / 'cut.tfrecord').write_bytes(file.read()[:-5])
  with pytest.raises(UsageError, match='after record 3'):
    list(records.read(str(tmp_path / 'cut.tfrecord'), bad=told.append))
