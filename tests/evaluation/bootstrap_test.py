import numpy as np
import pytest
import sacrebleu

from t5x_lite.data import metrics
from t5x_lite.evaluation import bootstrap

TARGETS = [f'the {word} house of {n} men' for n, word in enumerate(['red', 'old', 'new'] * 9)]
PREDICTIONS = [t if i % 3 else t.replace('house', 'hut') for i, t in enumerate(TARGETS)]


def directly(measure, name, num_sets):
  """Every set is measured, with nothing kept from one to the next."""
  rng, found = np.random.default_rng(bootstrap.SEED), []
  for _ in range(num_sets):
    chosen = rng.integers(len(TARGETS), size=len(TARGETS))
    drawn = [[column[i] for i in chosen] for column in (TARGETS, PREDICTIONS)]
    found.append(measure(*drawn)[name])
  return np.percentile(found, [2.5, 97.5])


@pytest.mark.parametrize(
  'metric, name',
  [
    (metrics.accuracy, 'accuracy'),
    (metrics.squad, 'f1'),
    (metrics.bleu, 'bleu'),
    (metrics.f1, 'f1_macro'),
  ],
)
def test_as_measured_on_every_set(metric, name):
  found = bootstrap.measured(metric, (TARGETS, PREDICTIONS), 40)
  low, high = directly(metric, name, 40)
  assert found[name] == metric(TARGETS, PREDICTIONS)[name]
  assert (found[f'{name}_low'], found[f'{name}_high']) == pytest.approx((low, high), abs=1e-9)
  assert found[f'{name}_low'] < found[name] < found[f'{name}_high']


def test_as_sacrebleu_finds_it():
  """Its own generator draws other sets, so only nearly."""
  bleu = sacrebleu.BLEU(tokenize='intl')
  theirs = bleu.corpus_score(PREDICTIONS, [TARGETS], n_bootstrap=300)
  found = bootstrap.measured(metrics.bleu, (TARGETS, PREDICTIONS), 300)
  ours = (found['bleu_high'] - found['bleu_low']) / 2
  assert ours == pytest.approx(theirs._ci, rel=0.15)


def test_the_mean_of_a_normal_distribution():
  """The interval is that of the textbook: 1.96 standard errors to both sides."""
  values = np.random.default_rng(1).normal(size=1000)
  found = bootstrap.measured(lambda x: {'mean': float(np.mean(x))}, (values.tolist(),), 4000)
  error = values.std() / np.sqrt(1000)
  wanted = (values.mean() - 1.96 * error, values.mean() + 1.96 * error)
  assert (found['mean_low'], found['mean_high']) == pytest.approx(wanted, abs=0.1 * error)


def test_what_some_set_has_no_value_for_has_no_interval():
  def correlation(x):
    if len(set(x)) < 2:
      raise ValueError('constant')
    return {'count': float(len(x)), 'spread': float(np.std(x))}

  found = bootstrap.measured(correlation, ([0.0] * 4 + [1.0],), 100)
  assert found == {'count': 5.0, 'spread': 0.4}
  assert bootstrap.measured(lambda x: {'n': 1.0}, ([1, 2],), 0) == {'n': 1.0}
