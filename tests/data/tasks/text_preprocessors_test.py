"""Text to tokens: vectors of rows give what SeqIO gives row by row."""

import hypothesis
import pytest
import seqio
import tensorflow as tf
from hypothesis import strategies as st

from t5x_lite.data.tasks import text_preprocessors
from t5x_lite.data.tasks.seqio_vocabulary import to_seqio
from t5x_lite.data.vocabularies import VocabularyConfig

TEXTS = ['', ' ', 'a', 'Übung macht den Meister', 'x' * 50, '東京 \t\n\0 <extra_id_0>']
BYTES = to_seqio(VocabularyConfig(kind='byte'))


def rows(**columns):
  """Elements of all rows but the last, and of the last."""
  size = len(next(iter(columns.values()))) - 1
  return tf.data.Dataset.from_tensor_slices(columns).batch(size)


def features(vocabulary, **settings):
  return {
    'inputs': seqio.Feature(vocabulary, add_eos=True, **settings),
    'targets': seqio.Feature(vocabulary, add_eos=False, **settings),
  }


def plain(dataset):
  return [
    {key: value.tolist() if hasattr(value, 'tolist') else value
     for key, value in example.items()}
    for example in dataset.as_numpy_iterator()
  ]  # fmt: skip


@pytest.mark.parametrize('lengths', [None, {'inputs': 8, 'targets': 3}])
@pytest.mark.parametrize('kind', ['byte', 'sentencepiece'])
def test_tokenize_rows_is_seqios_tokenization(kind, lengths):
  specs = features(to_seqio(VocabularyConfig(kind=kind)))
  columns = {'inputs': TEXTS, 'targets': TEXTS[::-1], 'other': [str(i) for i in range(len(TEXTS))]}
  ours = text_preprocessors.tokenize_rows(rows(**columns), lengths, specs)
  ours = plain(text_preprocessors.split_rows(ours))
  seqios = tf.data.Dataset.from_tensor_slices(columns)
  seqios = seqio.preprocessors.tokenize(seqios, specs)
  seqios = seqio.preprocessors.append_eos_after_trim(seqios, specs, lengths)
  seqios = seqio.utils.trim_dataset(seqios, lengths, specs)
  assert ours == plain(seqios)


@pytest.mark.parametrize('kind', ['byte', 'sentencepiece'])
@pytest.mark.parametrize('extra_ids', [0, 7, 100])
def test_tokenize_documents(kind, extra_ids):
  vocabulary = to_seqio(VocabularyConfig(kind=kind, extra_ids=extra_ids))
  dataset = tf.data.Dataset.from_tensor_slices({'targets': TEXTS * 7})  # of several calls
  found = plain(text_preprocessors.tokenize_documents(dataset, features(vocabulary)))
  assert found == [{'targets': list(vocabulary.encode(t))} for t in TEXTS * 7]
  with text_preprocessors.in_python():
    other = text_preprocessors.tokenize_documents(dataset, features(vocabulary))
  assert plain(other) == found


@pytest.mark.parametrize('path', ['package:t5', 'package:quickstart'])
def test_ids_in_python_are_tensorflows(path):
  vocabulary = to_seqio(VocabularyConfig(path=path))

  def ids(texts):
    dataset = tf.data.Dataset.from_tensor_slices({'targets': list(texts)})
    examples = text_preprocessors.tokenize_documents(dataset, features(vocabulary))
    return [example['targets'].tolist() for example in examples.as_numpy_iterator()]

  # Any bytes: TensorFlow's strings need not be UTF-8.
  pieces = st.one_of(st.text().map(str.encode), st.binary(), st.just(b' <extra_id_0> '))
  texts = st.lists(st.lists(pieces, max_size=4).map(b''.join), min_size=1, max_size=40)

  @hypothesis.settings(max_examples=15, deadline=None)
  @hypothesis.given(texts)
  def check(texts):
    wanted = ids(texts)
    with text_preprocessors.in_python():
      assert ids(texts) == wanted

  check()


def test_rows_of_ids():
  vocabulary = to_seqio(VocabularyConfig(kind='passthrough', size=50))
  dataset = rows(inputs=['7 0 49', ''], targets=['3', '4 5'])
  dataset = text_preprocessors.tokenize_rows(dataset, None, features(vocabulary))
  found = plain(text_preprocessors.split_rows(dataset))
  assert [e['inputs'] for e in found] == [[7, 0, 49, 1], [1]]
  assert [e['targets'] for e in found] == [[3], [4, 5]]


def test_prefix_inputs():
  dataset = rows(inputs=['a', ''], targets=['x', 'y'])
  dataset = text_preprocessors.prefix_inputs(dataset, prefix='task: ')
  found = [e['inputs'] for e in dataset.unbatch().as_numpy_iterator()]
  assert found == [b'task: a', b'task: ']


@pytest.mark.parametrize('separator', [' | ', '.', '||', '\\E'])
def test_references_train_on_the_first_and_keep_all(separator):
  wanted = [['B AW1 T'], ['AH0', 'EY1', 'A'], ['', 'x'], [' sp ', 'ü\ny']]
  dataset = rows(inputs=['w'] * 4, targets=[separator.join(r) for r in wanted])
  dataset = text_preprocessors.first_reference(dataset, separator=separator)
  dataset = text_preprocessors.tokenize_rows(dataset, None, features(BYTES))
  dataset = text_preprocessors.restore_references(dataset)
  dataset = text_preprocessors.split_rows(dataset)
  for row, example in zip(wanted, dataset.as_numpy_iterator(), strict=True):
    assert BYTES.decode(example['targets']) == row[0]
    references = example['targets_pretokenized'].decode()
    assert references.split(separator) == row
    assert 'references' not in example
