"""SeqIO preprocessors of text: prefixes, references, tokenization.

Most take vectors of rows (`RowsDataSource(rows_per_element=...)`): a dozen TensorFlow ops and seven
data set stages for every short row would cost many times the work that they do.
"""

import contextlib
import contextvars
import re

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data.objectives.denoising import ragged
from t5x_lite.data.objectives.preprocessors import Features, Lengths

# Documents in one call of SentencePiece; as many are read ahead and lie in checkpoints.
_DOCUMENTS_AT_ONCE = 16


@seqio.map_over_dataset
def prefix_inputs(example, *, prefix: str):
  """Puts the name of the task in front of the inputs."""
  return {**example, 'inputs': tf.strings.join([prefix, example['inputs']])}


@seqio.map_over_dataset
def first_reference(example, *, separator: str):
  """Trains on the first of several references; keeps all for the metrics.

  The targets become the first one. `restore_references` must follow the tokenization.
  """
  # Not tf.strings.split: it trims, and would lose an empty first one.
  quoted = re.sub(r'([!-/:-@\[-`{-~])', r'\\\1', separator)  # for RE2
  first = tf.strings.regex_replace(example['targets'], f'(?s){quoted}.*', '', replace_global=False)
  return {**example, 'targets': first, 'references': example['targets']}


@seqio.map_over_dataset
def restore_references(example):
  """Hands all references to the evaluation as `targets_pretokenized`.

  SeqIO and the evaluators take metrics' targets from there; the task's postprocessor splits them.
  """
  rest = {key: value for key, value in example.items() if key != 'references'}
  return {**rest, 'targets_pretokenized': example['references']}


@seqio.map_over_dataset
def tokenize_rows(rows, sequence_length: Lengths, output_features: Features):
  """Tokenizes vectors of rows, cuts, appends EOS; the rows stay together.

  The same as `seqio.preprocessors.tokenize` and `append_eos_after_trim` on each row, at a fraction
  of the cost. `split_rows` takes the rows apart.
  """
  tokenized = {}
  for key, texts in rows.items():
    if key not in output_features:
      tokenized[key] = texts
      continue
    feature = output_features[key]
    tokens = _encode(feature.vocabulary, texts)
    eos = int(feature.add_eos)
    if sequence_length is not None and key in sequence_length:
      tokens = tokens[:, : sequence_length[key] - eos]
    if eos:
      last = tf.fill([tf.size(texts), 1], feature.vocabulary.eos_id)
      tokens = tf.concat([tokens, last], axis=1)
    tokenized |= {key: tokens, f'{key}_pretokenized': texts}
  return tokenized


def split_rows(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Makes an example of every row."""
  return dataset.unbatch()


@contextlib.contextmanager
def in_python():
  """Within it `tokenize_documents` builds pipelines that call Python, at half the cost.

  Whoever iterates over one drops the iterator before the interpreter ends: a thread of tf.data that
  comes back to Python later aborts the process.
  """
  token = _in_python.set(True)
  try:
    yield
  finally:
    _in_python.reset(token)


_in_python = contextvars.ContextVar('_in_python', default=False)


def tokenize_documents(dataset: tf.data.Dataset, output_features: Features) -> tf.data.Dataset:
  """Tokenizes the targets, one text an example, without EOS or a copy.

  `seqio.preprocessors.tokenize` does 256 texts at once, which for documents means megabytes read
  ahead, and in every checkpoint of the iterator.
  """
  vocabulary = output_features['targets'].vocabulary
  texts = dataset.map(lambda example: example['targets'])
  model = None
  if _in_python.get() and type(vocabulary) is seqio.SentencePieceVocabulary:
    # The same library and model as TensorFlow's own op; a subclass, or the fast tokenizer, is not.
    model = None if vocabulary._use_fast_tokenizer else vocabulary.tokenizer
  if model is None:
    return texts.map(
      lambda text: {'targets': _encode(vocabulary, text[tf.newaxis])[0]},
      num_parallel_calls=tf.data.AUTOTUNE,
    )

  def encode(texts):
    # Without the interpreter's lock, so calls run beside each other.
    ids = model.Encode(texts.tolist(), out_type='numpy', num_threads=1)
    return np.concatenate(ids), np.array([len(i) for i in ids], np.int64)

  def tokenize(texts):
    # Declared stateless, for it is: an iterator's position can be saved.
    outputs = tf.numpy_function(encode, [texts], [tf.int32, tf.int64], stateful=False)
    ids, lengths = (tf.ensure_shape(output, [None]) for output in outputs)
    return {'targets': ragged.from_row_lengths(ids, lengths)}

  texts = texts.batch(_DOCUMENTS_AT_ONCE)
  return texts.map(tokenize, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def _encode(vocabulary: seqio.Vocabulary, texts: tf.Tensor) -> tf.RaggedTensor:
  """Returns the ids of a vector of texts, as SeqIO has them of each."""
  if isinstance(vocabulary, seqio.ByteVocabulary):
    # SeqIO's own works on one text only.
    characters = tf.strings.bytes_split(texts)
    ids = tf.reshape(tf.io.decode_raw(characters.flat_values, tf.uint8), [-1])
    return characters.with_flat_values(tf.cast(ids, tf.int32) + 3)
  if isinstance(vocabulary, seqio.PassThroughVocabulary):
    # Ids in decimal, between spaces; SeqIO takes only ids that are numbers.
    return tf.strings.to_number(tf.strings.split(texts), tf.int32)
  return vocabulary.encode_tf(texts)
