"""Postprocessors and metrics of GLUE, SuperGLUE and question answering, in percent.

What metrics.py has is about text. Here a label becomes the number of its class (anything else -1,
never right), for correlations and F1, and examples that share a question are judged together.

Source: t5/data/postprocessors.py and t5/evaluation/metrics.py.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite.data import metrics

Values = Sequence[Any]
Grouped = Sequence[Mapping[str, Any]]

# ---- Postprocessors: fn(text, example, is_target) ----------------------------


def class_number(text: str, *, labels: Sequence[str], **unused) -> int:
  """Returns which label a text is, or -1."""
  return labels.index(text) if text in labels else -1


def number(text: str, **unused) -> float:
  """Returns the number that a text is, or -1."""
  try:
    return float(text)
  except ValueError:
    return -1.0


def all_answers(text: str, *, example: Mapping[str, Any], is_target: bool = False) -> Any:
  """Returns a prediction as it is, and for a target every right answer."""
  return [answer.decode('utf-8') for answer in example['answers']] if is_target else text


def grouped(
  text: str,
  *,
  example: Mapping[str, Any],
  is_target: bool = False,
  group: Sequence[str],  # features that tell one question or query from another
  value_fn: Callable[..., Any],
) -> dict[str, Any]:
  """Returns what `value_fn`, a postprocessor, makes of a text, and the group it belongs to."""
  value = value_fn(text, example=example, is_target=is_target)
  return {'value': value, 'group': tuple(int(example[key]) for key in group)}


# Of a pronoun's noun phrase; they do not tell one noun from another.
_DETERMINERS = frozenset(
  'a an few her his each every many much my our some that the their these this those which whose '
  'your'.split()
)


def names_referent(text: str, *, example: Mapping[str, Any], is_target: bool = False) -> int:
  """Returns whether a prediction names the example's noun; for a target its label.

  One may be part of the other ('rabbit', 'the fluffy rabbit'), but Bob is not Bob's hat. An empty
  prediction is -1, which no label equals. Source: t5's wsc_simple.
  """
  if is_target:
    return int(example['label'])
  got, noun = _content_words(text), _content_words(example['targets_pretokenized'].decode('utf-8'))
  if not got:
    return -1
  if ("'" in ' '.join(got)) != ("'" in ' '.join(noun)):
    return 0
  return int(set(got) <= set(noun) or set(noun) <= set(got))


def _content_words(text: str) -> list[str]:
  return [word for word in text.lower().split() if word not in _DETERMINERS]


# ---- Metrics -----------------------------------------------------------------


def class_accuracy(targets: Values, predictions: Values) -> dict[str, float]:
  """Share of predictions that are the target's class."""
  return {'accuracy': 100.0 * float(np.mean(np.equal(targets, predictions)))}


def binary_f1(targets: Values, predictions: Values) -> dict[str, float]:
  """F1 of class 1 of two; a prediction that is neither counts as the wrong one."""
  wanted, got = np.asarray(targets), np.asarray(predictions)
  got = np.where((got == 0) | (got == 1), got, 1 - wanted)
  return {'f1': _of_sklearn('f1_score', wanted, got, zero_division=0)}


def mean_3class_f1(targets: Values, predictions: Values) -> dict[str, float]:
  """Mean of the F1 of each of three classes."""
  settings = {'labels': range(3), 'average': 'macro', 'zero_division': 0}
  return {'mean_3class_f1': _of_sklearn('f1_score', targets, predictions, **settings)}


def matthews(targets: Values, predictions: Values) -> dict[str, float]:
  """Matthews correlation."""
  return {'matthews_corrcoef': _of_sklearn('matthews_corrcoef', targets, predictions)}


def _of_sklearn(name: str, targets: Any, predictions: Any, **settings: Any) -> float:
  from sklearn import metrics as sklearn_metrics  # takes a second to import

  return 100.0 * float(getattr(sklearn_metrics, name)(targets, predictions, **settings))


def correlations(targets: Values, predictions: Values) -> dict[str, float]:
  """Pearson's and Spearman's correlation; not a number if all are equal."""
  from scipy import stats

  return {
    'pearson_corrcoef': 100.0 * float(stats.pearsonr(targets, predictions)[0]),
    'spearman_corrcoef': 100.0 * float(stats.spearmanr(targets, predictions)[0]),
  }


def multirc(targets: Grouped, predictions: Grouped) -> dict[str, float]:
  """F1 over all answers (F1a), and the share of questions all right (EM)."""
  wanted = [target['value'] for target in targets]
  got = [prediction['value'] for prediction in predictions]
  right: dict[Any, bool] = {}
  for target, a, b in zip(targets, wanted, got, strict=True):
    right[target['group']] = right.get(target['group'], True) and a == b
  return binary_f1(wanted, got) | {'exact_match': 100.0 * sum(right.values()) / len(right)}


def record(targets: Grouped, predictions: Grouped) -> dict[str, float]:
  """SQuAD's metrics with one prediction a query, whose answers are several rows."""
  first: dict[Any, tuple[Any, Any]] = {}
  for target, prediction in zip(targets, predictions, strict=True):
    first.setdefault(target['group'], (target['value'], prediction['value']))
  wanted, got = zip(*first.values(), strict=True)
  return metrics.squad(wanted, got)


def trivia_qa(targets: Sequence[metrics.Target], predictions: Sequence[str]) -> dict[str, float]:
  """Exact match and word F1 after TriviaQA's normalisation, best reference each.

  Source: Joshi et al. 2017 evaluation script: punctuation becomes spaces; SQuAD's is dropped.
  """
  wanted = [[_spaced(text) for text in metrics.references(target)] for target in targets]
  return metrics.squad(wanted, [_spaced(text) for text in predictions])


def _spaced(text: str) -> str:
  return re.sub(f'[{re.escape(string.punctuation)}\u2018\u2019\u00b4]', ' ', text)


def t5_rouge(targets: Sequence[metrics.Target], predictions: Sequence[str]) -> dict[str, float]:
  """ROUGE as t5 takes it: no stems, and ' . ' ends a sentence too."""
  end, line_end = ' . ', ' .\n'
  wanted = [[text.replace(end, line_end) for text in metrics.references(one)] for one in targets]
  got = [text.replace(end, line_end) for text in predictions]
  return metrics.rouge(wanted, got, use_stemmer=False)
