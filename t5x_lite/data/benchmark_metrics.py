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


def ranked_choice(score: float, *, example: Mapping[str, Any], is_target: bool = False) -> Any:
  """For `rank_classification`: a target is (question, choice), whether right, weight, tokens."""
  if not is_target:
    return score
  question, choice = (int(number) for number in example['idx'])
  rest = bool(example['is_correct']), float(example.get('weight', 1.0)), len(example['targets'])
  return (question, choice), *rest


def in_groups(target: Any) -> bool:
  """Whether a target is of `grouped` or `ranked_choice`: examples are judged together."""
  ranked = isinstance(target, tuple) and any(isinstance(x, tuple) for x in target[:1])
  return ranked or (isinstance(target, Mapping) and 'group' in target)


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


def mean_multiclass_f1(
  targets: Values, predictions: Values, *, num_classes: int = 3, **settings: Any
) -> dict[str, float]:
  """Mean of the F1 of each class; settings are scikit-learn's, such as sample_weight."""
  settings |= {'labels': range(num_classes), 'average': 'macro', 'zero_division': 0}
  name = f'mean_{num_classes}class_f1'
  return {name: _of_sklearn('f1_score', targets, predictions, **settings)}


def matthews(targets: Values, predictions: Values) -> dict[str, float]:
  """Matthews correlation."""
  return {'matthews_corrcoef': _of_sklearn('matthews_corrcoef', targets, predictions)}


def auc(
  targets: Values, predictions: Values, *, targets_threshold: float | None = None, **settings: Any
) -> dict[str, float]:
  """Areas under the ROC and the precision-recall curve, in percent (t5's `auc` has shares).

  Targets are 0 or 1, or what reaches the threshold is 1.
  """
  if targets_threshold is not None:
    targets = (np.asarray(targets) >= targets_threshold).astype(int).tolist()
  names = {'auc-roc': 'roc_auc_score', 'auc-pr': 'average_precision_score'}
  return {key: _of_sklearn(fn, targets, predictions, **settings) for key, fn in names.items()}


def score_auc(
  targets: Values, scores: Values, *, targets_threshold: float | None = None
) -> dict[str, float]:
  """The same of the log-probabilities of the targets' tokens."""
  return auc(targets, scores, targets_threshold=targets_threshold)


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


def deduplicated(metric_fn: metrics.MetricFn) -> Callable[[Grouped, Grouped], dict[str, float]]:
  """Returns the metric of the first example of each group (see `grouped`)."""

  def metric(targets: Grouped, predictions: Grouped) -> dict[str, float]:
    first: dict[Any, tuple[Any, Any]] = {}
    for target, prediction in zip(targets, predictions, strict=True):
      first.setdefault(target['group'], (target['value'], prediction['value']))
    return metric_fn(*map(list, zip(*first.values(), strict=True)))

  return metric


def mean_of_groups(metric_fn: metrics.MetricFn) -> Callable[[Grouped, Grouped], dict[str, float]]:
  """Returns the mean of the metric over the groups, which must be whole."""

  def metric(targets: Grouped, predictions: Grouped) -> dict[str, float]:
    groups: dict[Any, tuple[list, list]] = {}
    for target, prediction in zip(targets, predictions, strict=True):
      wanted, got = groups.setdefault(target['group'], ([], []))
      wanted.append(target['value'])
      got.append(prediction['value'])
    found = [metric_fn(*group) for group in groups.values()]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

  return metric


def all_match(targets: Values, predictions: Values) -> dict[str, float]:
  """100 if every prediction is its target, else 0."""
  return {'exact_match': 100.0 * np.array_equal(targets, predictions)}


def multirc(targets: Grouped, predictions: Grouped) -> dict[str, float]:
  """F1 over all answers (F1a), and the share of questions all right (EM)."""
  wanted, got = ([one['value'] for one in each] for each in (targets, predictions))
  return binary_f1(wanted, got) | mean_of_groups(all_match)(targets, predictions)


record = deduplicated(metrics.squad)  # a query has a row for each of its answers


def rank_classification(
  targets: Values,
  scores: Values,
  *,
  num_classes: int | None = None,
  normalize_by_target_length: bool = False,
) -> dict[str, float]:
  """Judges the likeliest of each question's choices; targets are those of `ranked_choice`.

  Accuracy; with num_classes choices each, of which one is right, also F1, and of two the areas
  under the curves of choice 1. With several right ones, any counts. Raises ValueError if a question
  has not num_classes choices.
  """
  questions: dict[int, list[tuple[bool, float, float]]] = {}
  for ((question, _), right, weight, length), score in sorted(zip(targets, scores, strict=True)):
    score /= length if normalize_by_target_length else 1
    questions.setdefault(question, []).append((right, weight, score))
  columns = [[*zip(*rows, strict=True)] for rows in questions.values()]
  chosen = [int(np.argmax(score)) for _, _, score in columns]
  hits = [right[i] for (right, _, _), i in zip(columns, chosen, strict=True)]
  of_each = {'sample_weight': [weight[0] for _, weight, _ in columns]}
  found = {'accuracy': 100.0 * float(np.average(hits, weights=of_each['sample_weight']))}
  wrong = [key for key, rows in questions.items() if num_classes not in (None, len(rows))]
  if wrong:
    raise ValueError(f'question {wrong[0]} has {len(questions[wrong[0]])} of {num_classes} choices')
  if num_classes is None or any(sum(right) > 1 for right, _, _ in columns):
    return found
  labels = [int(np.argmax(right)) for right, _, _ in columns]
  if num_classes > 2:
    return found | mean_multiclass_f1(labels, chosen, num_classes=num_classes, **of_each)
  found['f1'] = _of_sklearn('f1_score', labels, chosen, zero_division=0, **of_each)
  # The softmax of two scores grows with their difference.
  return found | auc(labels, [score[1] - score[0] for _, _, score in columns], **of_each)


def span_squad(targets: Sequence[Mapping[str, Any]], predictions: metrics.Texts) -> metrics.Scores:
  """SQuAD's metrics of spans written as 'start: 3 end: 6', word numbers of the context.

  A target has 'answers' and 'context'; what is no such span is an empty answer.
  """
  texts = []
  for target, prediction in zip(targets, predictions, strict=True):
    span = re.match(r'\W*\w+\W+(\d+)\W+\w+\W+(\d+)\b', prediction)
    words = re.findall(r'\w+', target['context'])
    texts.append(' '.join(words[int(span[1]) : int(span[2]) + 1]) if span else '')
  return metrics.squad([target['answers'] for target in targets], texts)


def coqa_f1(targets: Sequence[metrics.Target], predictions: metrics.Texts) -> metrics.Scores:
  """Word F1 over all turns, best reference each (Reddy et al. 2019); SQuAD's by another name."""
  return {'f1': metrics.squad(targets, predictions)['f1']}


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
