"""Random texts for metrics, and what t5 publishes of SQuAD and TriviaQA, written out."""

import collections
import re
import string

import numpy as np

WORDS = (
  *('a', 'an', 'the', 'The', 'cat', 'Cat', 'cats', 'cat', 'dog', 'running', 'runs', '1,000', '3.5'),
  *("it's", 'x-y', 'x_y', '(dog)', '.', ',', '!', 'b.', '`b`', '\u2018n\u2019', '\u201cthe\u201d'),
  *(
    'na\u00efve',
    'nai\u0308ve',
    'a\u0308',
    '\u00df',
    'SS',
    '\u0130',
    'i',
    '\u5317\u4eac',
    '\u4eac',
  ),
  *('\u0645\u0631\u062d\u0628\u0627', '\u0441\u043e\u0431\u0430\u043a\u0430', '\U0001f600'),
)
SPACES = (' ', ' ', ' ', ' ', '  ', '\n', '\u00a0', ' . ')


def text(rng, words=WORDS, spaces=SPACES):
  """Returns up to six words; one text of eight is empty or but a space."""
  if rng.random() < 0.125:
    return ('', ' ')[rng.integers(2)]
  parts = [words[i] + spaces[j] for i, j in rng.integers(0, (len(words), len(spaces)), (6, 2))]
  return ''.join(parts[: rng.integers(1, 7)]).removesuffix(' ')


def pairs(seed, size=40, most=3, words=WORDS, spaces=SPACES):
  """Returns targets, texts if `most` references is 1 and else lists, and predictions of them."""
  rng = np.random.default_rng(seed)
  targets = [
    [text(rng, words, spaces) for _ in range(rng.integers(1, most + 1))] for _ in range(size)
  ]
  predictions = [changed(rng, target[rng.integers(len(target))], words) for target in targets]
  return ([one for [one] in targets] if most == 1 else targets), predictions


def changed(rng, wanted, words=WORDS):
  """Returns a text as it is, in another case, or with a word more, less or another."""
  parts = wanted.split(' ')
  at, word = rng.integers(len(parts)), words[rng.integers(len(words))]
  return (
    wanted,
    wanted.upper(),
    '',
    ' '.join([*parts[:at], word, *parts[at:]]),
    ' '.join([*parts[:at], *parts[at + 1 :]]),
    ' '.join([*parts[:at], word, *parts[at + 1 :]]),
  )[rng.integers(6)]


def squad_words(one):
  """t5/evaluation/qa_utils.py: lower case, no ASCII punctuation, no articles."""
  one = one.lower().translate({ord(c): None for c in string.punctuation})
  return re.sub(r'\b(?:an?|the)\b', ' ', one).split()


def trivia_qa_words(one):
  """The same, but punctuation, with four quotes more, becomes a space."""
  one = one.lower().translate({ord(c): ' ' for c in string.punctuation + '\u2018\u2019\u00b4`_'})
  return re.sub(r'\b(?:an?|the)\b', ' ', one).split()


def question_answering(targets, predictions, words):
  """Returns exact match and F1, each of its best answer, averaged.

  Where nothing is left of both, F1 is 1 here, as in SQuAD 2.0's script and CoQA's; t5's is 0.
  """
  matches, scores = [], []
  for answers, prediction in zip(targets, predictions, strict=True):
    got, best = words(prediction), 0.0
    for wanted in map(words, answers):
      common = (collections.Counter(got) & collections.Counter(wanted)).total()
      best = max(best, 2 * common / (len(got) + len(wanted)) if got or wanted else 1.0)
    matches.append(got in list(map(words, answers)))
    scores.append(best)
  return {'em': 100 * np.mean(matches), 'f1': 100 * np.mean(scores)}


def f1(targets, predictions, label):
  """F1 of one class: 2 TP / (2 TP + FP + FN), 0 where there is none."""
  wanted, got = np.equal(targets, label), np.equal(predictions, label)
  return 2 * (wanted & got).sum() / max((wanted.sum() + got.sum()), 1)
