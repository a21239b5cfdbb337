import json
import random
import re

import editdistance
import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from sklearn import metrics as sklearn_metrics

from t5x_lite.data import metrics
from t5x_lite.errors import UsageError
from tests.data import metric_cases


def reference_edit_distance(a, b):
  """By definition: recursion over the last tokens, no table."""
  if not a or not b:
    return len(a) + len(b)
  if a[-1] == b[-1]:
    return reference_edit_distance(a[:-1], b[:-1])
  return 1 + min(
    reference_edit_distance(a[:-1], b),
    reference_edit_distance(a, b[:-1]),
    reference_edit_distance(a[:-1], b[:-1]),
  )


def test_edits_are_the_fewest():
  """Of whole tokens, whatever they are made of, the empty one included."""
  generator = random.Random(0)
  for tokens in ('ab', ['', 'B', 'AW1', '\u00e9', '\U0001f600']):
    for _ in range(200):
      wanted, got = (
        [generator.choice(tokens) for _ in range(generator.randrange(least, 7))] for least in (1, 0)
      )
      rate = metrics.token_error_rate([json.dumps(wanted)], [json.dumps(got)], json.loads)
      edits = reference_edit_distance(wanted, got)
      assert rate == pytest.approx(100.0 * edits / len(wanted))


def test_pronunciation_is_right_if_it_equals_any_reference():
  targets = [['AH0', 'EY1'], ['B AW1 T'], 'S IY1']
  scores = metrics.pronunciation_error_rates(targets, ['EY1', 'B AW1 T', 'S'])
  # One of three words is wrong; one of 1 + 3 + 2 phonemes is missing.
  assert scores['word_error_rate'] == pytest.approx(100 / 3)
  assert scores['phoneme_error_rate'] == pytest.approx(100 / 6)


def test_stress_counts_and_can_be_left_out():
  scores = metrics.pronunciation_error_rates([['AH0 B', 'EY1'], 'K AE1 T'], ['EY2', 'K AA1 T'])
  assert scores == {
    'word_error_rate': 100.0,
    'phoneme_error_rate': pytest.approx(200 / 4),
    'word_error_rate_no_stress': 50.0,
    'phoneme_error_rate_no_stress': pytest.approx(100 / 4),
  }


def test_phoneme_error_rate_counts_against_the_closest_reference():
  # 1 edit to the second of 2 phonemes, 3 to the first of 4.
  rate = metrics.token_error_rate([['A B C D', 'X Y']], ['X'], str.split)
  assert rate == pytest.approx(50.0)
  # Both are one edit away: the longer one counts.
  rate = metrics.token_error_rate([['A', 'A B C']], ['A B'], str.split)
  assert rate == pytest.approx(100 / 3)
  # Spaces are no phonemes, and errors may exceed the reference.
  rate = metrics.token_error_rate(['A'], [' B   B '], str.split)
  assert rate == pytest.approx(200.0)
  assert metrics.token_error_rate([''], [''], str.split) == 0.0
  assert metrics.token_error_rate([''], ['A'], str.split) == 100.0


def test_transcription_error_rates():
  scores = metrics.transcription_error_rates(['the cat'], ['the hat'])
  assert scores['word_error_rate'] == pytest.approx(50.0)
  assert scores['character_error_rate'] == pytest.approx(100 / 7)


def test_accuracies():
  targets, predictions = ['de', ['fr', 'fr-CA'], 'nl'], [' de', 'fr-CA', 'da']
  assert metrics.accuracy(targets, predictions)['accuracy'] == (pytest.approx(200 / 3))
  assert metrics.sequence_accuracy(targets, predictions) == {
    'sequence_accuracy': pytest.approx(100 / 3)
  }


def test_edit_distances_are_t5s():
  scores = metrics.edit_distance([['A b', 'c'], 'x', 'it is, so'], ['a', 'X', 'it is so'])
  # A comma and a space leave an empty word between them.
  edits = {
    'min_edit': 0.0,
    'max_edit': 1.0,
    'sum_edit': 2.0,
    'mean_edit': 2 / 3,
    'median_edit': 1.0,
  }
  assert scores == pytest.approx(edits)
  assert metrics.edit_distance(['A'], ['a'], lower=False)['sum_edit'] == 1.0


def test_squad_normalises_and_takes_the_best_answer():
  targets = [['the Cat', 'dog'], ['New York City']]
  scores = metrics.squad(targets, ['cat!', 'York city'])
  assert scores['em'] == pytest.approx(50.0)
  # The second: precision 1, recall 2/3.
  assert scores['f1'] == pytest.approx((100 + 80) / 2)
  assert metrics.squad([['a']], ['the'])['f1'] == pytest.approx(100.0)


def test_bleu_and_chrf_are_sacrebleus():
  targets = ['Der Hund schläft heute im Garten .', 'Es regnet sehr stark .']
  predictions = ['Der Hund schläft im Garten .', 'Es regnet stark .']
  assert metrics.bleu(targets, targets)['bleu'] == pytest.approx(100.0)
  assert metrics.bleu(targets, predictions)['bleu'] == pytest.approx(
    sacrebleu.corpus_bleu(predictions, [targets], tokenize='intl').score
  )
  assert metrics.chrf(targets, predictions)['chrf'] == pytest.approx(
    sacrebleu.corpus_chrf(predictions, [targets]).score
  )


def test_references_may_differ_in_number():
  predictions = ['The cat sat on the mat .', 'It rains a lot today .']
  two = [['A dog stood there once .', predictions[0]], [predictions[1]]]
  one = [[two[0][0]], two[1]]
  assert metrics.bleu(two, predictions)['bleu'] == pytest.approx(100.0)
  assert metrics.chrf(two, predictions)['chrf'] == pytest.approx(100.0)
  assert metrics.bleu(one, predictions)['bleu'] < 90.0


def test_split_references():
  split = metrics.split_references
  assert split('A B | C', separator=' | ', is_target=True) == ['A B', 'C']
  assert split('A | B', separator=' | ', is_target=False, example={}) == 'A | B'


# ---- Random texts beside the libraries and t5's formulas ---------------------

SEEDS = pytest.mark.parametrize('seed', range(4))


@SEEDS
def test_bleu_is_t5s_and_chrf_is_sacrebleus(seed):
  targets, predictions = metric_cases.pairs(seed, most=1)
  expected = sacrebleu.BLEU(
    smooth_method='exp', force=False, lowercase=False, tokenize='intl', effective_order=False
  ).corpus_score(predictions, [targets])
  assert metrics.bleu(targets, predictions)['bleu'] == pytest.approx(expected.score)
  assert 0.0 < expected.score < 100.0
  expected = sacrebleu.CHRF().corpus_score(predictions, [targets])
  assert metrics.chrf(targets, predictions)['chrf'] == pytest.approx(expected.score)


@SEEDS
def test_references_of_any_number_are_as_with_one_of_them_again(seed):
  """Which changes neither score, and makes the streams whole."""
  targets, predictions = metric_cases.pairs(seed)
  streams = [[(target * 3)[i] for target in targets] for i in range(3)]
  for name, metric in (('bleu', sacrebleu.BLEU(tokenize='intl')), ('chrf', sacrebleu.CHRF())):
    expected = metric.corpus_score(predictions, streams).score
    assert metrics.METRICS[name](targets, predictions)[name] == pytest.approx(expected)


@SEEDS
def test_rouge_is_rouge_scores_best_reference(seed):
  targets, predictions = metric_cases.pairs(seed)
  for stemmed in (True, False):
    scorer = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeLsum'], use_stemmer=stemmed)
    found = metrics.rouge(targets, predictions, use_stemmer=stemmed)
    for kind, score in found.items():
      best = [
        max(scorer.score(text, prediction)[kind].fmeasure for text in texts)
        for texts, prediction in zip(targets, predictions, strict=True)
      ]
      assert score == pytest.approx(100 * np.mean(best))


@SEEDS
def test_squad_is_t5s(seed):
  targets, predictions = metric_cases.pairs(seed, size=100)
  expected = metric_cases.question_answering(targets, predictions, metric_cases.squad_words)
  assert metrics.squad(targets, predictions) == pytest.approx(expected)


@SEEDS
def test_accuracies_and_f1_are_sklearns(seed):
  rng = np.random.default_rng(seed)
  labels = ['', ' ', 'yes', 'Yes', ' yes', '\u00e9', 'e\u0301']
  targets, predictions = rng.choice(labels, (2, 60)).tolist()
  stripped = [[text.strip() for text in texts] for texts in (targets, predictions)]
  for found, expected in (
    (metrics.sequence_accuracy, sklearn_metrics.accuracy_score(targets, predictions)),
    (metrics.accuracy, sklearn_metrics.accuracy_score(*stripped)),
    (metrics.f1, np.mean([metric_cases.f1(*stripped, label) for label in sorted({*stripped[0]})])),
  ):
    [score] = found(targets, predictions).values()
    assert score == pytest.approx(100 * expected)
  several = [[target, predictions[i - 1]] for i, target in enumerate(targets)]
  right = [one in texts for one, texts in zip(predictions, several, strict=True)]
  found = metrics.sequence_accuracy(several, predictions)['sequence_accuracy']
  assert found == pytest.approx(100 * np.mean(right))


def edit_rate(targets, predictions):
  edits = [editdistance.eval(*pair) for pair in zip(targets, predictions, strict=True)]
  return 100 * sum(edits) / sum(map(len, targets))


@SEEDS
def test_error_rates_are_editdistances(seed):
  targets, predictions = metric_cases.pairs(seed, most=1)
  words = [[text.split() for text in texts] for texts in (targets, predictions)]
  assert metrics.transcription_error_rates(targets, predictions) == {
    'word_error_rate': pytest.approx(edit_rate(*words)),
    'character_error_rate': pytest.approx(edit_rate(targets, predictions)),
  }
  phonemes = ('AH0', 'AH1', 'EY2', 'B', 'K')
  targets, predictions = metric_cases.pairs(seed, most=1, words=phonemes, spaces=(' ', '  '))
  words = [[text.split() for text in texts] for texts in (targets, predictions)]
  bare = [[re.sub(r'\d', '', text).split() for text in texts] for texts in (targets, predictions)]
  wrong, wrong_bare = (np.mean([a != b for a, b in zip(*x, strict=True)]) for x in (words, bare))
  assert metrics.pronunciation_error_rates(targets, predictions) == {
    'word_error_rate': pytest.approx(100 * wrong),
    'phoneme_error_rate': pytest.approx(edit_rate(*words)),
    'word_error_rate_no_stress': pytest.approx(100 * wrong_bare),
    'phoneme_error_rate_no_stress': pytest.approx(edit_rate(*bare)),
  }


@SEEDS
def test_edit_distances_are_t5s_formulas(seed):
  words = ('a', 'Cat', 'dog,', '\u00dcber', '\u5317', 'x')
  several, predictions = metric_cases.pairs(seed, words=words)

  def cut(text, lower):
    return re.split('[^\\w]', text.lower() if lower else text)

  for lower in (True, False):
    edits = [
      min(editdistance.eval(cut(text, lower), cut(got, lower)) for text in texts)
      for texts, got in zip(several, predictions, strict=True)
    ]
    assert metrics.edit_distance(several, predictions, lower=lower) == {
      'min_edit': min(edits),
      'max_edit': max(edits),
      'mean_edit': pytest.approx(np.mean(edits)),
      'median_edit': np.median(edits),
      'sum_edit': sum(edits),
    }


@pytest.mark.parametrize('name', metrics.METRICS)
def test_every_metric_is_perfect_on_itself_and_returns_floats(name):
  texts = ['one two three four five six', 'a b c d e f g']
  scores = metrics.METRICS[name](texts, texts)
  for key, value in scores.items():
    assert isinstance(value, float)
    assert value == pytest.approx(0.0 if 'error_rate' in key or '_edit' in key else 100.0)


def test_errors():
  with pytest.raises(ValueError, match=r'2 targets and 1 predictions'):
    metrics.accuracy(['a', 'b'], ['a'])
  for metric in metrics.METRICS.values():
    with pytest.raises(ValueError, match='example 1 has no reference'):
      metric(['a', []], ['a', 'b'])
  with pytest.raises(UsageError, match=r"the metric is 'bluer'.*bleu"):
    metrics.get_metrics(['accuracy', 'bluer'])
