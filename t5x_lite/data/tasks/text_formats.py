"""Rows of public datasets as `inputs` and `targets`: the paper's Appendix D.

What is beside them in an example is for the postprocessors. The published checkpoints were trained
on what t5's code wrote, so where the paper prints question answering without it, punctuation stands
between spaces here as there.

Source: Raffel et al. 2020, Appendix D; t5/data/preprocessors.py; multilingual_t5/preprocessors.py
(XNLI); t5_closed_book_qa/t5_cbqa/preprocessors.py.
"""

import functools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

Row = Mapping[str, Any]

# The target where a test set does not tell: what t5 has there.
_UNKNOWN = '<unk>'


def _words(*parts: Any) -> tf.Tensor:
  return tf.strings.join(parts, separator=' ')


# ---- Labels ------------------------------------------------------------------


@seqio.map_over_dataset
def labelled(row: Row, *, name: str, columns: Mapping[str, str], labels: Sequence[str]) -> Row:
  """'NAME KEY: text KEY: text', of each key's column, to the label's name; -1 has none."""
  texts = [part for key, column in columns.items() for part in (f'{key}:', row[column])]
  inputs = _words(name, *texts)
  if name == 'multirc':  # HTML in the paragraphs
    inputs = tf.strings.regex_replace(inputs, '<br>', ' ')
    inputs = tf.strings.regex_replace(inputs, '</?b>', '')
  index = row.get('idx', {})
  extra = {f'idx/{key}': index[key] for key in index} if isinstance(index, dict) else {}
  # -1 is the last.
  target = tf.gather([*labels, _UNKNOWN], row['label'] % (len(labels) + 1))
  return {'inputs': inputs, 'targets': target, **extra}


@seqio.map_over_dataset
def similarity(row: Row) -> Row:
  """STS-B: a number from 0 to 5, rounded to fifths and written out."""
  inputs = _words('stsb sentence1:', row['sentence1'], 'sentence2:', row['sentence2'])
  target = tf.strings.as_string(tf.round(row['label'] * 5) / 5, precision=1)
  return {'inputs': inputs, 'targets': target}


@seqio.map_over_dataset
def xnli(row: Row, *, language: str | None = None) -> Row:
  """'xnli: premise: ... hypothesis: ...' to the label's number, as mT5 has it.

  XNLI's rows hold all languages, of which one is taken; without a language they are MultiNLI's.
  """
  premise, hypothesis = row['premise'], row['hypothesis']
  if language is not None:
    premise = premise[language]
    hypothesis = hypothesis['translation'][tf.argmax(hypothesis['language'] == language)]
  inputs = _words('xnli: premise:', premise, 'hypothesis:', hypothesis)
  return {'inputs': inputs, 'targets': tf.strings.as_string(row['label'])}


# ---- Pronouns ----------------------------------------------------------------


def winograd(dataset: tf.data.Dataset, *, only_right: bool) -> tf.data.Dataset:
  """WSC (SuperGLUE's wsc.fixed): 'wsc: ... *pronoun* ...' to the noun that is asked about.

  With `only_right` rows are left out whose noun is not the pronoun's: they would teach it wrong.
  """
  if only_right:
    dataset = dataset.filter(lambda row: row['label'] == 1)
  return _mark_pronoun(dataset)


@seqio.map_over_dataset
def _mark_pronoun(row: Row) -> Row:
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
  inputs = _words('wsc:', tf.strings.reduce_join(words, separator=' '))
  return {'inputs': inputs, 'targets': row['span1_text'], 'label': row['label']}


@seqio.map_over_dataset
def definite_pronouns(row: Row) -> Row:
  """DPR in the form of WSC; the pronoun's first occurrence is the one meant."""
  pattern = tf.strings.join([' (', row['pronoun'], r')( |\.|,)'])
  marked = tf.strings.regex_replace(row['sentence'], pattern, r' *\1*\2', replace_global=False)
  return {'inputs': _words('wsc:', marked), 'targets': row['candidates'][row['label']]}


@seqio.map_over_dataset
def winograd_from_entailment(row: Row) -> Row:
  """WNLI in the form of WSC; see `find_pronoun`. For evaluation alone."""
  both = tf.numpy_function(_find_pronoun_bytes, [row['sentence1'], row['sentence2']], tf.string)
  both = tf.ensure_shape(both, [2])
  return {'inputs': both[0], 'targets': both[1], 'label': row['label']}


_PRONOUNS = frozenset('he she they it her his their them him'.split())


def find_pronoun(premise: str, hypothesis: str) -> tuple[str, str]:
  """Returns 'wsc: ... *pronoun* ...' and the noun that the hypothesis puts there.

  The hypothesis repeats a part of the premise with a noun for the pronoun: it is the pronoun around
  which most words agree, and the noun is what stands between them.

  Source: t5's wnli_simple; the rule, not its special cases.
  """
  words = premise.split(' ')
  both = words, hypothesis.split()
  plain, goal = ([word.lower().rstrip('.,!?') for word in text] for text in both)
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


def _agreement(first: Sequence[str], second: Sequence[str]) -> int:
  """Returns how many words are the same from the beginning."""
  return [*map(operator.eq, first, second), False].index(False)


# ---- Questions ---------------------------------------------------------------


def _spaced(text: tf.Tensor) -> tf.Tensor:
  """Puts spaces around punctuation, and one where there are several."""
  text = tf.strings.regex_replace(text, r'([[:punct:]])', r' \1 ')
  return tf.strings.regex_replace(text, r'\s+', ' ')


@seqio.map_over_dataset
def squad(row: Row, *, with_context: bool = True) -> Row:
  """'question: ... context: ...' to the first answer; all of them beside it."""
  answers = _spaced(row['answers']['text'])
  question, context = _spaced(row['question']), _spaced(row['context'])
  inputs = _words('squad trivia question:', question)
  if with_context:
    inputs = _words('question:', question, 'context:', context)
  inputs = tf.strings.regex_replace(inputs, r'\s+', ' ')
  return {'inputs': inputs, 'targets': answers[0], 'answers': answers}


@seqio.map_over_dataset
def closed_book(row: Row) -> Row:
  """TriviaQA's question without a context to its answer; aliases beside it."""
  return {
    'inputs': _words('trivia_qa question:', row['question']),
    'targets': row['answer']['value'],
    'answers': row['answer']['aliases'],
  }


def cloze(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """ReCoRD: 'record query: ... entities: a, b passage: ...', a row an answer."""

  def convert(row: Row) -> tf.data.Dataset:
    passage = tf.strings.regex_replace(row['passage'], r'(\.|\?|\!|\"|\')\n@highlight\n', r'\1 ')
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(row['entities'], separator=', ')
    same = {
      'inputs': _words('record query:', row['query'], 'entities:', entities, 'passage:', passage),
      'answers': row['answers'],
      'idx/passage': row['idx']['passage'],
      'idx/query': row['idx']['query'],
    }
    targets = row['answers'] if tf.size(row['answers']) > 0 else tf.constant([_UNKNOWN])
    return tf.data.Dataset.from_tensor_slices(targets).map(lambda one: {**same, 'targets': one})

  return dataset.flat_map(convert)


# ---- Translation, summaries, plain text --------------------------------------

template = seqio.preprocessors.preprocess_tensorflow_examples
# Documents for the objectives, as they are.
plain_text = functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'})


def rank_classification(
  dataset: tf.data.Dataset,
  *,
  inputs_format: str,
  targets_formats: Sequence[str],
  label_key: str = 'label',
  only_right: bool = False,
) -> tf.data.Dataset:
  """A row of each choice, for `benchmark_metrics.rank_classification`; to train, the right alone.

  Formats are those of `template`, one of the targets for each label; 'idx' is (row, choice).
  """

  def rows(number: tf.Tensor, row: Row) -> tf.data.Dataset:
    found = []
    for choice, text in enumerate(targets_formats):
      one = tf.data.Dataset.from_tensors(row)
      one = template(one, inputs_format=inputs_format, targets_format=text)
      more = {'idx': [number, choice], 'is_correct': tf.cast(row[label_key], tf.int32) == choice}
      found.append(one.map(lambda texts, more=more: {**texts, **more}))
    choices = functools.reduce(tf.data.Dataset.concatenate, found)
    return choices.filter(lambda one: one['is_correct']) if only_right else choices

  return dataset.enumerate().flat_map(rows)


@seqio.map_over_dataset
def wiki40b(row: Row) -> Row:
  """Documents without Wiki40B's marks of structure, which become line breaks."""
  text = tf.strings.regex_replace(row['text'], r'\s*_(START_[A-Z]+|NEWLINE)_\s*', '\n')
  return {'targets': tf.strings.strip(text)}
