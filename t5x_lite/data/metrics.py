"""Metric functions over decoded text, in SeqIO's form; all results in percent.

A metric is `fn(targets, predictions) -> {name: float}`. A target is one text, or a list of texts
where several references are right; a prediction is judged against the one it comes closest to.
"""

import collections
import functools
import importlib
import inspect
import itertools
import re
import statistics
import string
from collections.abc import Callable, Sequence
from typing import Any

import sacrebleu
from rapidfuzz.distance import Levenshtein

from t5x_lite.errors import UsageError, check_one_of

Target = str | Sequence[str]
Targets = Sequence[Target]
Texts = Sequence[str]
Scores = dict[str, float]
MetricFn = Callable[[Targets, Texts], Scores]
Tokenize = Callable[[str], Sequence]


def references(target: Target) -> list[str]:
  """Returns the references of a target, one or several, as a list."""
  return [target] if isinstance(target, str) else list(target)


def split_references(text: str, *, separator: str, is_target: bool = False, **unused) -> Target:
  """Postprocessor: a target with alternatives becomes the list of them."""
  del unused
  return text.split(separator) if is_target else text


# ---- Exact matches -----------------------------------------------------------


def accuracy(targets: Targets, predictions: Texts) -> Scores:
  """Share of predictions equal to a reference, spaces around them aside."""
  return {'accuracy': _percent_equal(targets, predictions, str.strip)}


def sequence_accuracy(targets: Targets, predictions: Texts) -> Scores:
  """Share of predictions equal to a reference, character by character."""
  return {'sequence_accuracy': _percent_equal(targets, predictions, str)}


def squad(targets: Targets, predictions: Texts) -> Scores:
  """Exact match and word F1, best reference each, as SQuAD's script (Rajpurkar et al. 2016)."""
  found = [
    max(_f1(_normalize_squad(text).split(), _normalize_squad(prediction).split()) for text in texts)
    for texts, prediction in _pairs(targets, predictions)
  ]
  em = _percent_equal(targets, predictions, _normalize_squad)
  return {'em': em, 'f1': 100.0 * sum(found) / len(found)}


def f1(targets: Targets, predictions: Texts) -> Scores:
  """F1 of each label that occurs among the targets, averaged (macro).

  A prediction that is no label counts as a miss. Of several references the
  first is the label, unless the prediction equals another.
  """
  from sklearn import metrics  # takes a second to import

  wanted, got = [], []
  for texts, prediction in _pairs(targets, predictions):
    labels = [label.strip() for label in texts]
    got.append(prediction.strip())
    wanted.append(got[-1] if got[-1] in labels else labels[0])
  labels = sorted(set(wanted))
  score = metrics.f1_score(wanted, got, labels=labels, average='macro', zero_division=0)
  return {'f1_macro': 100.0 * float(score)}


# ---- Error rates -------------------------------------------------------------


def pronunciation_error_rates(targets: Targets, predictions: Texts) -> Scores:
  """Word and phoneme error rate of grapheme-to-phoneme conversion.

  word_error_rate: share of words whose phonemes equal no reference. phoneme_error_rate: see
  `token_error_rate`; a phoneme is what stands between spaces, its stress digit included. The same
  with `_no_stress`: without digits on both sides, to read beside results on ARPAbet's 39 phonemes.
  """

  def bare_phonemes(text: str) -> list[str]:
    return [phoneme.rstrip('012') for phoneme in text.split()]

  rates = {}
  for suffix, tokenize in (('', str.split), ('_no_stress', bare_phonemes)):
    equal = _percent_equal(targets, predictions, tokenize)
    rates[f'word_error_rate{suffix}'] = 100.0 - equal
    rates[f'phoneme_error_rate{suffix}'] = token_error_rate(targets, predictions, tokenize)
  return rates


def transcription_error_rates(targets: Targets, predictions: Texts) -> Scores:
  """Word and character error rate as in speech recognition."""
  return {
    'word_error_rate': token_error_rate(targets, predictions, str.split),
    'character_error_rate': token_error_rate(targets, predictions, list),
  }


def edit_distance(targets: Targets, predictions: Texts, *, lower: bool = True) -> Scores:
  """Word edits to the closest reference as t5 counts them (no percentages): least to sum.

  Words are what stands between characters that are no part of one, so there may be empty ones.
  """

  def words(text: str) -> list[str]:
    return re.split(r'\W', text.lower() if lower else text)

  edits = [_closest(*pair, words)[0] for pair in _pairs(targets, predictions)]
  found = {'min': min(edits), 'max': max(edits), 'sum': sum(edits)}
  found |= {'mean': statistics.mean(edits), 'median': statistics.median(edits)}
  return {f'{name}_edit': float(value) for name, value in found.items()}


def token_error_rate(targets: Targets, predictions: Texts, tokenize: Tokenize) -> float:
  """Returns edits to the closest references over their length, in percent.

  Both are summed over the corpus, so long targets weigh more. The closest
  reference has the fewest edits, and of those the most tokens. With empty
  references alone the rate is 0 if nothing was predicted, else 100.
  """
  closest = [_closest(*pair, tokenize) for pair in _pairs(targets, predictions)]
  edits, length = (sum(counts) for counts in zip(*closest, strict=True))
  return 100.0 * edits / length if length else 100.0 * (edits > 0)


# ---- Translation and summaries -----------------------------------------------


def bleu(targets: Targets, predictions: Texts) -> Scores:
  """Corpus BLEU with the tokenization `intl`, as the T5 paper reports it."""
  score = sacrebleu.corpus_bleu(list(predictions), _streams(targets, predictions), tokenize='intl')
  return {'bleu': score.score}


def chrf(targets: Targets, predictions: Texts) -> Scores:
  """Corpus chrF2: characters, no words."""
  score = sacrebleu.corpus_chrf(list(predictions), _streams(targets, predictions))
  return {'chrf': score.score}


def rouge(targets: Targets, predictions: Texts, *, use_stemmer: bool = True) -> Scores:
  """ROUGE-1, -2 and -Lsum, mean F-measure, stemmed or not; best reference each.

  Lsum takes a line for a sentence, as t5/evaluation/metrics.py does.
  """
  from rouge_score import rouge_scorer

  kinds = ['rouge1', 'rouge2', 'rougeLsum']
  scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=use_stemmer)
  scores = [scorer.score_multi(*pair) for pair in _pairs(targets, predictions)]
  return {kind: 100.0 * sum(one[kind].fmeasure for one in scores) / len(scores) for kind in kinds}


METRICS: dict[str, MetricFn] = {
  'accuracy': accuracy,
  'f1': f1,
  'sequence_accuracy': sequence_accuracy,
  'squad': squad,
  'pronunciation_error_rates': pronunciation_error_rates,
  'transcription_error_rates': transcription_error_rates,
  'edit_distance': edit_distance,
  'bleu': bleu,
  'chrf': chrf,
  'rouge': rouge,
}


def get_metrics(names: Sequence[str]) -> list[MetricFn]:
  """Returns metric functions by name; UsageError if one is not in METRICS."""
  for name in names:
    check_one_of('the metric', name, METRICS)
  return [METRICS[name] for name in names]


def with_inputs(name: str) -> Callable[[Targets, Texts, Texts], Scores]:
  """Returns a metric of METRICS, or a user's 'module:function', as one that is given inputs too."""
  module, _, function = name.partition(':')
  try:
    metric: Any = getattr(importlib.import_module(module), function) if function else METRICS[name]
    takes_inputs = 'inputs' in inspect.signature(metric).parameters
  except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
    known = f'{", ".join(METRICS)}, or your own as module:function'
    raise UsageError(f'There is no metric {name!r} ({error}); there are {known}') from error
  if takes_inputs:
    return metric
  return functools.wraps(metric)(lambda targets, predictions, _: metric(targets, predictions))


# ---- Parts -------------------------------------------------------------------


def _pairs(targets: Targets, predictions: Texts) -> list[tuple[list[str], str]]:
  """Returns the references and the prediction of each example."""
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(
      f'{len(targets)} targets and {len(predictions)} predictions; there must be as many of one as '
      'of the other, and at least one'
    )
  wanted = [*map(references, targets)]
  if [] in wanted:
    raise ValueError(f'example {wanted.index([])} has no reference')
  return list(zip(wanted, predictions, strict=True))


def _percent_equal(targets: Targets, predictions: Texts, normalize: Callable) -> float:
  pairs = _pairs(targets, predictions)
  equal = sum(normalize(prediction) in map(normalize, texts) for texts, prediction in pairs)
  return 100.0 * equal / len(pairs)


def _closest(texts: Texts, prediction: str, tokenize: Tokenize) -> tuple[int, int]:
  """Returns the edits to, and the tokens of, the closest reference."""
  got, wanted = tokenize(prediction), map(tokenize, texts)
  edits, negative_length = min((Levenshtein.distance(one, got), -len(one)) for one in wanted)
  return edits, -negative_length


def _streams(targets: Targets, predictions: Texts) -> list[Any]:
  """Returns sacrebleu's layout, one list per reference number; None where there is none."""
  return list(itertools.zip_longest(*(texts for texts, _ in _pairs(targets, predictions))))


# SQuAD's own twenty lines. Libraries that have them (torchmetrics, evaluate)
# bring torch or a hub client along; scikit-learn has no such score.
def _normalize_squad(text: str) -> str:
  kept = ''.join(c for c in text.lower() if c not in string.punctuation)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', kept).split())


def _f1(wanted: Sequence[str], got: Sequence[str]) -> float:
  common = collections.Counter(wanted) & collections.Counter(got)
  same = sum(common.values())
  if not same:
    return float(wanted == got)
  precision, recall = same / len(got), same / len(wanted)
  return 2 * precision * recall / (precision + recall)
