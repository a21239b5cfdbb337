"""Metrics of the benchmarks on small cases worked out by hand and on random ones, as t5 counts."""

import numpy as np
import pytest
from rouge_score import rouge_scorer, scoring

from t5x_lite.data import benchmark_metrics as judged
from tests.data import metric_cases


def test_labels_are_numbers_and_anything_else_is_minus_one():
  labels = ['entailment', 'neutral']
  got = [judged.class_number(text, labels=labels) for text in ('neutral', 'entailment', 'x')]
  assert got == [1, 0, -1]
  assert [judged.number(text) for text in ('2.6', 'two')] == [2.6, -1.0]


def test_an_invalid_prediction_is_never_right():
  # TP 1, FP 1 (the -1 against 0), FN 1 (the -1 against 1).
  assert judged.binary_f1([1, 0, 1, 0], [1, -1, -1, 0]) == {'f1': pytest.approx(50.0)}
  assert judged.class_accuracy([1, 0, 1, 0], [1, -1, -1, 0]) == {'accuracy': 50.0}


def test_mean_f1_of_three_classes():
  # Class 0: P 1, R 1/2. Class 1: P 1/2, R 1. Class 2: nothing right.
  got = judged.mean_multiclass_f1([0, 0, 1, 2], [0, 1, 1, -1])['mean_3class_f1']
  assert got == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)


def test_matthews_is_its_formula():
  targets, predictions = [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]
  tp, tn, fp, fn = 2, 2, 1, 1
  want = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  assert judged.matthews(targets, predictions)['matthews_corrcoef'] == pytest.approx(100 * want)


def test_correlations_are_their_formulas():
  a, b = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 4.0, 3.0, 9.0])
  ranks = np.array([1, 3, 2, 4])
  got = judged.correlations(a, b)
  assert got['pearson_corrcoef'] == pytest.approx(100 * np.corrcoef(a, b)[0, 1])
  assert got['spearman_corrcoef'] == pytest.approx(100 * np.corrcoef([1, 2, 3, 4], ranks)[0, 1])


def example(**features):
  return {key: np.asarray(value) for key, value in features.items()}


def test_multirc_groups_by_question():
  """F1 over all answers; a question counts only if all its answers are right."""
  questions = [(0, 0), (0, 0), (0, 1), (1, 0)]
  settings = {'group': ('p', 'q'), 'value_fn': lambda text, **_: int(text)}
  targets, predictions = [], []
  for (p, q), wanted, got in zip(questions, '1011', '1110', strict=True):
    row = example(p=p, q=q)
    targets.append(judged.grouped(wanted, example=row, is_target=True, **settings))
    predictions.append(judged.grouped(got, example=row, **settings))
  got = judged.multirc(targets, predictions)
  # TP 2, FP 1, FN 1; of three questions the second alone is right.
  assert got == {'f1': pytest.approx(100 * 2 / 3), 'exact_match': pytest.approx(100 / 3)}


def test_record_judges_a_query_once():
  rows = [example(g=0, answers=[b'A', b'B'])] * 2 + [example(g=1, answers=[b'C D'])]
  settings = {'group': ('g',), 'value_fn': judged.all_answers}
  targets = [judged.grouped('', example=row, is_target=True, **settings) for row in rows]
  predictions = [
    judged.grouped(text, example=row, **settings)
    for text, row in zip(('b', 'wrong', 'C'), rows, strict=True)
  ]
  assert judged.record(targets, predictions) == {
    'em': pytest.approx(50.0),
    'f1': pytest.approx(100 * (1 + 2 / 3) / 2),
  }


def test_trivia_qa_puts_spaces_where_squad_drops():
  assert judged.trivia_qa([['The New-York']], ['new york'])['em'] == 100.0
  assert judged.trivia_qa([['rhythm \u2018n\u2019 blues', 'x']], ['Rhythm n blues'])['em'] == 100.0


@pytest.mark.parametrize(
  ('prediction', 'noun', 'want'),
  [
    ('Bob', 'Bob', 1),
    ('the fluffy rabbit', 'rabbit', 1),
    ('bunny', 'The fluffy bunny', 1),
    ('Bob', "Bob's hat", 0),
    ('Tom', 'Bob', 0),
    ('the', 'Bob', -1),
    ('', 'Bob', -1),
  ],
)
def test_a_prediction_names_the_noun(prediction, noun, want):
  row = {'targets_pretokenized': noun.encode(), 'label': 1}
  assert judged.names_referent(prediction, example=row) == want
  assert judged.names_referent(noun, example=row, is_target=True) == 1


def test_t5s_rouge_does_not_stem_and_splits_sentences():
  assert judged.t5_rouge(['cats run'], ['cat runs'])['rouge1'] == 0.0
  # As two sentences, each is found in the other order.
  got = judged.t5_rouge(['a b c . d e f .'], ['d e f . a b c .'])
  assert got['rougeLsum'] == pytest.approx(100.0)


def test_areas_under_curves_are_counts_of_pairs():
  targets, scores = [0, 1, 0, 1, 1], [0.1, 0.4, 0.5, 0.9, 0.5]
  pairs = [(s, t) for s, a in zip(scores, targets, strict=True) if a
           for t, b in zip(scores, targets, strict=True) if not b]  # fmt: skip
  want = 100 * np.mean([1.0 if s > t else 0.5 if s == t else 0.0 for s, t in pairs])
  got = judged.auc(targets, scores)
  assert got['auc-roc'] == pytest.approx(want)
  assert got['auc-pr'] == pytest.approx(100 * (1 / 3 * 1 + 1 / 3 * 2 / 3 + 1 / 3 * 3 / 4))
  assert judged.score_auc([0.2, 3.0, 1.0, 2.0, 2.5], scores, targets_threshold=2.0) == got


def choices(labels, scores, length=1):
  """Returns targets and scores of questions with a row of scores each, in another order."""
  rows = [
    (judged.ranked_choice(0.0, example=example(
      idx=[q, c], is_correct=c == label, targets=[0] * (length + c)), is_target=True), scores[q][c])
    for q, label in enumerate(labels) for c in range(len(scores[q]))
  ]  # fmt: skip
  return [list(column) for column in zip(*reversed(rows), strict=True)]


def test_the_likeliest_choice_is_the_answer():
  scores = [[-1.0, -2.0], [-3.0, -0.5], [-1.0, -1.5], [-2.0, -1.9]]
  targets, flat = choices([0, 1, 1, 0], scores)
  assert judged.rank_classification(targets, flat) == {'accuracy': 50.0}
  got = judged.rank_classification(targets, flat, num_classes=2)
  likely = [-1.0, 2.5, -0.5, 0.1]
  assert got == {'accuracy': 50.0, 'f1': 50.0, **judged.auc([0, 1, 1, 0], likely)}
  # By the token, -1/1 against -1.5/2: the last choice.
  targets, flat = choices([1], [[-1.0, -1.5]])
  settings = {'normalize_by_target_length': True}
  assert judged.rank_classification(targets, flat, **settings)['accuracy'] == 100.0
  assert judged.rank_classification(targets, flat)['accuracy'] == 0.0


def test_of_three_choices_f1_is_a_mean_and_a_missing_one_is_an_error():
  targets, flat = choices([0, 1, 2, 2], [[3, 1, 1], [1, 3, 1], [1, 1, 3], [1, 3, 1]])
  got = judged.rank_classification(targets, flat, num_classes=3)
  assert got == {'accuracy': 75.0, **judged.mean_multiclass_f1([0, 1, 2, 2], [0, 1, 2, 1])}
  with pytest.raises(ValueError, match='question 3 has 2 of 3 choices'):
    judged.rank_classification(targets[1:], flat[1:], num_classes=3)


def test_any_of_several_right_choices_counts_and_questions_have_weights():
  targets = [((0, 0), True, 3.0, 1), ((0, 1), True, 3.0, 1), ((1, 0), True, 1.0, 1)]
  targets += [((1, 1), False, 1.0, 1)]
  got = judged.rank_classification(targets, [0.0, 1.0, 0.0, 1.0], num_classes=2)
  assert got == {'accuracy': 75.0}


def test_targets_of_groups_are_known():
  assert judged.in_groups({'group': (0,), 'value': 1}) and judged.in_groups(
    choices([0], [[1, 2]])[0][0]
  )
  assert not any(map(judged.in_groups, ('text', ['a', 'b'], 1, {'answers': []}, ('a', 'b'), ())))


def test_spans_are_words_of_the_context():
  targets = [{'answers': ['the big-city life'], 'context': 'I like, the big-city life.'}] * 4
  predictions = ['start: 2 end: 5', 'start 2', 'start: two end: 5', 'start: 3 end: 3']
  got = judged.span_squad(targets, predictions)
  assert got['em'] == 0.0  # 'big city' are two words of the span
  assert got['f1'] == pytest.approx(100 * (0.4 + 0 + 0 + 0) / 4)
  assert judged.coqa_f1([['a cat', 'dogs']], ['The cat!']) == {'f1': 100.0}


def test_groups_are_averaged_or_their_first_taken():
  rows = [{'group': g, 'value': v} for g, v in ((0, 1), (0, 2), (1, 3))]
  got = [{**row, 'value': v} for row, v in zip(rows, (1, 0, 3), strict=True)]
  assert judged.mean_of_groups(judged.class_accuracy)(rows, got) == {'accuracy': 75.0}
  assert judged.deduplicated(judged.class_accuracy)(rows, got) == {'accuracy': 100.0}


# ---- Random values beside the formulas ---------------------------------------

SEEDS = pytest.mark.parametrize('seed', range(4))


@SEEDS
def test_scores_of_classes_are_their_formulas(seed):
  rng = np.random.default_rng(seed)
  wanted, got = rng.integers(0, 3, 50), rng.integers(-1, 4, 50)  # anything may be predicted
  assert judged.class_accuracy(wanted, got)['accuracy'] == pytest.approx(
    100 * (wanted == got).mean()
  )
  mean = np.mean([metric_cases.f1(wanted, got, label) for label in range(3)])
  assert judged.mean_multiclass_f1(wanted, got)['mean_3class_f1'] == pytest.approx(100 * mean)
  # The correlation of several classes (Gorodkin 2004): covariances of one-hot rows.
  a, b = (x[:, None] == np.arange(-1, 4) for x in (wanted, got))
  a, b = a - a.mean(axis=0), b - b.mean(axis=0)
  matthews = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
  found = judged.matthews(wanted, got)['matthews_corrcoef']
  assert found == pytest.approx(100 * matthews)


@SEEDS
def test_f1_with_invalid_predictions_is_t5s(seed):
  rng = np.random.default_rng(seed)
  wanted, got = rng.integers(0, 2, 50), rng.integers(-1, 3, 50)
  changed = [b if b in (0, 1) else 1 - a for a, b in zip(wanted, got, strict=True)]
  expected = 100 * metric_cases.f1(wanted, changed, 1)
  assert judged.binary_f1(wanted, got)['f1'] == pytest.approx(expected)
  groups = rng.integers(0, 20, 50)
  rows = [
    [{'value': int(x), 'group': (int(g),)} for x, g in zip(values, groups, strict=True)]
    for values in (wanted, got)
  ]
  exact = [(wanted == got)[groups == group].all() for group in set(groups)]
  assert judged.multirc(*rows) == {
    'f1': pytest.approx(expected),
    'exact_match': pytest.approx(100 * np.mean(exact)),
  }


@SEEDS
def test_correlations_of_equal_values_too(seed):
  rng = np.random.default_rng(seed)
  a = rng.normal(size=40).round(1)
  b = (a + rng.normal(size=40)).round(1)
  found = judged.correlations(a, b)
  assert found['pearson_corrcoef'] == pytest.approx(100 * np.corrcoef(a, b)[0, 1])
  # An equal value's rank is the mean of theirs: how many are smaller, and half of the others.
  ranks = [(x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2 for x in (a, b)]
  assert found['spearman_corrcoef'] == pytest.approx(100 * np.corrcoef(*ranks)[0, 1])


@SEEDS
def test_trivia_qa_and_record_are_t5s(seed):
  targets, predictions = metric_cases.pairs(seed, size=100)
  expected = metric_cases.question_answering(targets, predictions, metric_cases.trivia_qa_words)
  assert judged.trivia_qa(targets, predictions) == pytest.approx(expected)
  groups = np.random.default_rng(seed).integers(0, 30, 100).tolist()
  rows = [
    [{'value': x, 'group': (g,)} for x, g in zip(values, groups, strict=True)]
    for values in (targets, predictions)
  ]
  first = [groups.index(group) for group in set(groups)]
  expected = metric_cases.question_answering(
    *([values[i] for i in first] for values in (targets, predictions)), metric_cases.squad_words
  )
  assert judged.record(*rows) == pytest.approx(expected)


@SEEDS
def test_t5s_rouge_is_the_middle_of_its_bootstrap(seed):
  """t5 publishes the median of resampled means, a random number; ours is the mean itself."""
  targets, predictions = metric_cases.pairs(seed, most=1)
  kinds = ['rouge1', 'rouge2', 'rougeLsum']
  scorer, resampled = rouge_scorer.RougeScorer(kinds), scoring.BootstrapAggregator()
  np.random.seed(seed)
  for pair in zip(targets, predictions, strict=True):
    resampled.add_scores(scorer.score(*(text.replace(' . ', ' .\n') for text in pair)))
  found = judged.t5_rouge(targets, predictions)
  for kind, one in resampled.aggregate().items():
    error = (one.high.fmeasure - one.low.fmeasure) / (2 * 1.96)
    assert abs(found[kind] / 100 - one.mid.fmeasure) < 0.2 * error, kind
