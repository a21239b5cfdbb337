"""Rows of public datasets as `inputs` and `targets`: the paper's Appendix D.

What is beside them in an example is for the postprocessors. The published
checkpoints were trained on what t5's code wrote, so where the paper prints
question answering without it, punctuation stands between spaces here as there.

Source: Raffel et al. 2020, Appendix D; t5/data/preprocessors.py; for XNLI
multilingual_t5/preprocessors.py; for closed-book questions
t5_closed_book_qa/t5_cbqa/preprocessors.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Row = Mapping[str, Any]

# The target where a test set does not tell: what t5 has there.
_UNKNOWN = '<unk>'
_PUNCTUATION = r'([[:punct:]])'


def _rows(dataset: tf.data.Dataset, fn) -> tf.data.Dataset:
  return dataset.map(fn, num_parallel_calls=tf.data.AUTOTUNE)


# ---- Labels ------------------------------------------------------------------


def labelled(
  dataset: tf.data.Dataset, *, name: str, columns: Mapping[str, str], labels: Sequence[str]
) -> tf.data.Dataset:
  """'NAME KEY: text KEY: text' to the label's name.

  Args:
    dataset: with `label`, -1 where it is not known.
    name: the benchmark's.
    columns: column of the dataset by the key that is written.
    labels: names of the classes.
  """

  def convert(row: Row) -> Row:
    words = [name]
    for key, column in columns.items():
      words += [f'{key}:', row[column]]
    inputs = tf.strings.join(words, separator=' ')
    if name == 'multirc':  # HTML in the paragraphs
      inputs = tf.strings.regex_replace(inputs, '<br>', ' ')
      inputs = tf.strings.regex_replace(inputs, '</?b>', '')
    index = row.get('idx', {})
    extra = {f'idx/{key}': index[key] for key in index} if isinstance(index, dict) else {}
    # -1 is the last.
    return {
      'inputs': inputs,
      'targets': tf.gather([*labels, _UNKNOWN], row['label'] % (len(labels) + 1)),
      **extra,
    }

  return _rows(dataset, convert)


def similarity(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """STS-B: a number from 0 to 5, rounded to fifths and written out."""

  def convert(row: Row) -> Row:
    words = ['stsb sentence1:', row['sentence1'], 'sentence2:', row['sentence2']]
    target = tf.strings.as_string(tf.round(row['label'] * 5) / 5, precision=1)
    return {'inputs': tf.strings.join(words, separator=' '), 'targets': target}

  return _rows(dataset, convert)


def xnli(dataset: tf.data.Dataset, *, language: str | None = None) -> tf.data.Dataset:
  """'xnli: premise: ... hypothesis: ...' to the label's number, as mT5 has it.

  Args:
    dataset: XNLI's rows if there is a language, else MultiNLI's.
    language: the one to take; rows hold all.
  """

  def convert(row: Row) -> Row:
    premise, hypothesis = row['premise'], row['hypothesis']
    if language is not None:
      premise = premise[language]
      hypothesis = hypothesis['translation'][tf.argmax(hypothesis['language'] == language)]
    inputs = tf.strings.join(['xnli: premise: ', premise, ' hypothesis: ', hypothesis])
    return {'inputs': inputs, 'targets': tf.strings.as_string(row['label'])}

  return _rows(dataset, convert)


# ---- Pronouns ----------------------------------------------------------------


def winograd(dataset: tf.data.Dataset, *, only_right: bool) -> tf.data.Dataset:
  """WSC: 'wsc: ... *pronoun* ...' to the noun that is asked about.

  Args:
    dataset: SuperGLUE's wsc.fixed.
    only_right: leave out rows whose noun is not the pronoun's, which would
      teach wrong answers.
  """
  if only_right:
    dataset = dataset.filter(lambda row: row['label'] == 1)

  def convert(row: Row) -> Row:
    # Words as the index counts them: a double space has an empty one.
    words = tf.strings.split([row['text']], sep=' ').values
    at, pronoun = row['span2_index'], row['span2_text']
    length = tf.strings.length(pronoun)
    # Two rows' index points before the pronoun, or punctuation is behind it.
    begins = tf.cast(tf.strings.substr(words[at:], 0, length) == pronoun, tf.int32)
    at += tf.cast(tf.argmax(begins), at.dtype)
    rest = tf.strings.substr(words[at], length, -1)
    marked = tf.strings.join(['*', pronoun, '*', tf.where(rest == '', '', ' '), rest])
    words = tf.concat([words[:at], [marked], words[at + 1 :]], 0)
    inputs = tf.strings.join(['wsc:', tf.strings.reduce_join(words, separator=' ')], separator=' ')
    return {'inputs': inputs, 'targets': row['span1_text'], 'label': row['label']}

  return _rows(dataset, convert)


def definite_pronouns(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """DPR in the form of WSC; the pronoun's first occurrence is the one meant."""

  def convert(row: Row) -> Row:
    pattern = tf.strings.join([' (', row['pronoun'], r')( |\.|,)'])
    marked = tf.strings.regex_replace(row['sentence'], pattern, r' *\1*\2', replace_global=False)
    return {
      'inputs': tf.strings.join(['wsc:', marked], separator=' '),
      'targets': row['candidates'][row['label']],
    }

  return _rows(dataset, convert)


def winograd_from_entailment(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """WNLI in the form of WSC; see `find_pronoun`. For evaluation alone."""

  def convert(row: Row) -> Row:
    both = tf.numpy_function(_find_pronoun_bytes, [row['sentence1'], row['sentence2']], tf.string)
    both = tf.ensure_shape(both, [2])
    return {'inputs': both[0], 'targets': both[1], 'label': row['label']}

  return _rows(dataset, convert)


_PRONOUNS = frozenset('he she they it her his their them him'.split())


def find_pronoun(premise: str, hypothesis: str) -> tuple[str, str]:
  """Returns 'wsc: ... *pronoun* ...' and the noun that the hypothesis puts there.

  The hypothesis repeats a part of the premise with a noun for the pronoun: it
  is the pronoun around which most words agree, and the noun is what stands
  between them.

  Source: t5's wnli_simple; the rule, not its special cases.
  """
  words = premise.split(' ')
  plain, goal = [_plain(word) for word in words], [_plain(word) for word in hypothesis.split()]
  best, found = (False, -1), (0, 0, len(goal))
  for at in (i for i, word in enumerate(plain) if word in _PRONOUNS):
    for start in range(len(goal)):
      left = _agreement(plain[:at][::-1], goal[:start][::-1])
      for end in range(start + 1, len(goal) + 1):
        right = _agreement(plain[at + 1 :], goal[end:])
        score = (left + right + end - start == len(goal), left + right)
        if score > best:
          best, found = score, (at, start, end)
  at, start, end = found
  noun = re.sub(r"('s|')?[.,!?]*$", '', ' '.join(hypothesis.split()[start:end]))
  marked = re.sub(r'^(\w+)', r'*\1*', words[at])
  return f'wsc: {" ".join([*words[:at], marked, *words[at + 1 :]])}', noun


def _find_pronoun_bytes(premise: bytes, hypothesis: bytes):
  both = find_pronoun(premise.decode(), hypothesis.decode())
  return np.array([text.encode() for text in both], object)


def _plain(word: str) -> str:
  return word.lower().rstrip('.,!?')


def _agreement(first: Sequence[str], second: Sequence[str]) -> int:
  """Returns how many words are the same from the beginning."""
  count = 0
  for a, b in zip(first, second, strict=False):
    if a != b:
      break
    count += 1
  return count


# ---- Questions ---------------------------------------------------------------


def _spaced(text: tf.Tensor) -> tf.Tensor:
  """Puts spaces around punctuation, and one where there are several."""
  text = tf.strings.regex_replace(text, _PUNCTUATION, r' \1 ')
  return tf.strings.regex_replace(text, r'\s+', ' ')


def squad(dataset: tf.data.Dataset, *, with_context: bool = True) -> tf.data.Dataset:
  """'question: ... context: ...' to the first answer; all of them beside it."""

  def convert(row: Row) -> Row:
    answers = _spaced(row['answers']['text'])
    question, context = _spaced(row['question']), _spaced(row['context'])
    words = ['question:', question, 'context:', context]
    if not with_context:
      words = ['squad trivia question:', question]
    inputs = tf.strings.regex_replace(tf.strings.join(words, separator=' '), r'\s+', ' ')
    return {'inputs': inputs, 'targets': answers[0], 'answers': answers}

  return _rows(dataset, convert)


def closed_book(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """TriviaQA's question without a context to its answer; aliases beside it."""

  def convert(row: Row) -> Row:
    return {
      'inputs': tf.strings.join(['trivia_qa question: ', row['question']]),
      'targets': row['answer']['value'],
      'answers': row['answer']['aliases'],
    }

  return _rows(dataset, convert)


def cloze(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """ReCoRD: 'record query: ... entities: a, b passage: ...', a row an answer."""

  def convert(row: Row) -> tf.data.Dataset:
    passage = tf.strings.regex_replace(row['passage'], r'(\.|\?|\!|\"|\')\n@highlight\n', r'\1 ')
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(row['entities'], separator=', ')
    words = ['record query:', row['query'], 'entities:', entities, 'passage:', passage]
    same = {
      'inputs': tf.strings.join(words, separator=' '),
      'answers': row['answers'],
      'idx/passage': row['idx']['passage'],
      'idx/query': row['idx']['query'],
    }
    targets = row['answers'] if tf.size(row['answers']) > 0 else tf.constant([_UNKNOWN])
    return tf.data.Dataset.from_tensor_slices(targets).map(lambda one: {**same, 'targets': one})

  return dataset.flat_map(convert)


# ---- Translation, summaries, plain text --------------------------------------

_LANGUAGES = {'en': 'English', 'de': 'German', 'fr': 'French', 'ro': 'Romanian'}


def translation(dataset: tf.data.Dataset, *, source: str, target: str) -> tf.data.Dataset:
  """'translate English to German: ...' to the translation."""
  prefix = f'translate {_LANGUAGES[source]} to {_LANGUAGES[target]}: '

  def convert(row: Row) -> Row:
    return {'inputs': tf.strings.join([prefix, row[source]]), 'targets': row[target]}

  return _rows(dataset, convert)


def summary(dataset: tf.data.Dataset, *, article: str, highlights: str) -> tf.data.Dataset:
  """'summarize: ...' to the summary."""

  def convert(row: Row) -> Row:
    return {'inputs': tf.strings.join(['summarize: ', row[article]]), 'targets': row[highlights]}

  return _rows(dataset, convert)


def plain_text(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Documents for the objectives, as they are."""
  return _rows(dataset, lambda row: {'targets': row['text']})


def wiki40b(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Documents without Wiki40B's marks of structure, which become line breaks."""

  def convert(row: Row) -> Row:
    text = tf.strings.regex_replace(row['text'], r'\s*_(START_[A-Z]+|NEWLINE)_\s*', '\n')
    return {'targets': tf.strings.strip(text)}

  return _rows(dataset, convert)
