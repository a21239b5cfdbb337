"""What is generated and scored, through the Python interface."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import api
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.decoding import automaton, prediction, processors
from t5x_lite.errors import UsageError
from t5x_lite.parallel.partitioning import MeshConfig
from tests.models import tiny

TEXTS = ['abc', 'a longer input', 'z']


@pytest.fixture(scope='module')
def model():
  # A byte has an id of its own, so that every output is a text.
  cfg = tiny.config(vocab_size=384)
  return api.Model(cfg, tiny.params(cfg), VocabularyConfig(kind='byte'))


def test_n_best_come_best_first(model):
  outputs, scores, log_probs = model.generate(
    TEXTS,
    max_new_tokens=6,
    num_beams=4,
    num_return_sequences=3,
    length_penalty=0.6,
    return_scores=True,
    return_log_probs=True,
  )
  assert [len(n_best) for n_best in outputs] == [3, 3, 3]
  for row in range(3):
    assert scores[row] == sorted(scores[row], reverse=True)
    for score, each in zip(scores[row], log_probs[row], strict=True):
      assert score == pytest.approx(sum(each) / len(each) ** 0.6, rel=1e-4)
  best = model.generate(TEXTS[0], max_new_tokens=6, num_beams=4, length_penalty=0.6)
  assert best == outputs[0][0]


def test_a_prefix_is_returned_and_does_not_count(model):
  rows = [[5, 6, 7, 1], [9, 1]]
  plain = model.generate(rows, max_new_tokens=6)
  # Greedy search goes on as it did.
  prefixes = [plain[0][:2], plain[1][:3]]
  again = model.generate(rows, max_new_tokens=3, prefix=prefixes)
  assert again == [plain[0][:5], plain[1][:6]]
  assert model.generate('abc', prefix='xy', max_new_tokens=2).startswith('xy')


def test_one_of_the_labels(model):
  labels = ['yes', 'no', 'yesterday', 'other']
  assert set(model.generate(TEXTS, labels=labels)) <= set(labels)
  # A beam that can hold all of them finds the likeliest.
  found = model.generate(
    TEXTS, labels=labels, num_beams=8, length_penalty=0.0, early_stopping='never'
  )
  best, scores = model.classify(TEXTS, labels, return_scores=True)
  assert found == best
  assert scores.shape == (3, 4)
  normalized = model.classify(TEXTS, labels, length_normalized=True)
  counts = np.asarray([len(label) + 1 for label in labels])
  assert normalized == [labels[i] for i in (scores / counts).argmax(axis=1)]
  assert model.classify('abc', labels) == best[0]


def test_words_are_forbidden_and_texts_are_cut(model):
  plain = model.generate('abc', max_new_tokens=20, min_new_tokens=20)
  word = plain[3:5]
  assert word not in model.generate(
    'abc', max_new_tokens=20, min_new_tokens=20, forbidden_words=[word]
  )
  cut = model.generate('abc', max_new_tokens=20, min_new_tokens=20, stop_strings=[word, 'nowhere'])
  assert cut == plain[: plain.index(word)]


@pytest.mark.parametrize('draft', [False, True])
def test_what_stops_is_written_and_scored_up_to_there(model, draft):
  """Rows end with the token that completes a stop string; what comes after has no part in it."""
  more = {'max_new_tokens': 20, 'min_new_tokens': 20, 'return_log_probs': True}
  rows = [[*model.vocabulary.encode(text), 1] for text in TEXTS]
  tokens, log_probs = model.generate(rows, **more)
  words = [model.vocabulary.decode(tokens[0][3:5])]
  more |= {'draft': model} if draft else {}
  shorter, scores, kept = model.generate(rows, stop_strings=words, return_scores=True, **more)
  ends = [automaton.stopping(tuple(words), model.vocabulary)] * len(rows)
  for row, all_of_them, score, own, every, stopper in zip(
    shorter, tokens, scores, kept, log_probs, ends, strict=True
  ):
    [count], _ = processors.read_until(stopper, jnp.asarray([all_of_them]), np.asarray([20]))
    assert row == all_of_them[:count]
    np.testing.assert_allclose(own, every[:count], atol=1e-4)
    assert score == pytest.approx(sum(every[:count]), abs=1e-3)
  assert len(shorter[0]) == 5
  # In the prefix it is no end.
  found = model.generate('abc', prefix=words[0], stop_strings=words, max_new_tokens=6)
  assert found.startswith(words[0])
  # Of the best of several samples the length counts up to the end.
  settings = {'temperature': 1.0, 'best_of': 3, 'length_penalty': 1.0, 'seed': 1}
  settings |= {'return_scores': True, 'return_log_probs': True, 'max_new_tokens': 20}
  _, [score], [own] = model.generate(rows[:1], stop_strings=['a', 'e', 'o'], **settings)
  assert score == pytest.approx(sum(own) / len(own), abs=1e-4)


def test_seeds_and_temperatures_belong_to_rows(model):
  arguments = dict(max_new_tokens=8, min_new_tokens=8)
  all_of_them = model.generate(TEXTS, temperature=1.0, seed=[3, 4, 5], **arguments)
  alone = model.generate(TEXTS[2:], temperature=1.0, seed=[5], **arguments)
  assert alone == all_of_them[2:]
  mixed = model.generate(TEXTS, temperature=[0.0, 1.0, 1.0], seed=[3, 4, 5], **arguments)
  assert mixed[1:] == all_of_them[1:]
  assert mixed[0] == model.generate(TEXTS[0], **arguments)
  seeds = [[-1, 2, 3], [2**32 - 1, 2**32 + 2, 3]]  # are taken modulo 2**32
  one, same = (model.generate(TEXTS, temperature=1.0, seed=x, **arguments) for x in seeds)
  assert one == same
  several = model.generate('abc', temperature=1.0, num_return_sequences=4, **arguments)
  assert len(set(several)) > 1


def test_a_processor_of_ones_own(model):
  seen = []

  def never(logits, history):
    seen.append(logits.shape)
    return logits.at[:, 68].set(-np.inf)

  arguments = dict(max_new_tokens=5, temperature=1.0, num_return_sequences=20)
  rows = model.generate([[5, 1]], processors=[never], **arguments)[0]
  assert all(68 not in row for row in rows) and seen
  count = len(seen)
  model.generate([[6, 1]], processors=[never], **arguments)
  assert len(seen) == count, 'compiled again'


def test_scoring_in_batches_is_scoring_alone(model):
  inputs = ['abc', 'a' * 40, 'z', 'some words', 'b' * 18]
  targets = ['x', 'yes, a long target', 'no', '', 'c' * 20]
  together = model.score(inputs, targets, batch_size=2)
  alone = [model.score([i], [t])[0] for i, t in zip(inputs, targets, strict=True)]
  np.testing.assert_allclose(together, alone, rtol=1e-5)
  normalized = model.score(inputs, targets, length_normalized=True)
  np.testing.assert_allclose(normalized, together / [len(t) + 1 for t in targets], rtol=1e-5)


def test_perplexity_and_bits_per_byte(model):
  inputs, targets = ['abc', 'z'], ['xyz', 'é']
  found = model.perplexity(inputs, targets)
  total = -model.score(inputs, targets).sum()
  assert found['tokens'] == 4 + 3 and found['bytes'] == 3 + 2
  assert found['perplexity'] == pytest.approx(math.exp(total / 7), rel=1e-4)
  assert found['bits_per_byte'] == pytest.approx(total / math.log(2) / 5, rel=1e-4)
  assert 'bytes' not in model.perplexity([[5, 1]], [[6, 1]])


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m: m.generate(TEXTS, seed=[1]), '3 inputs and 1 of seed'),
    (lambda m: m.generate(TEXTS, prefix=['a']), '3 inputs and 1 prefixes'),
    (lambda m: m.generate(TEXTS, temperature=[1.0, -1.0, 0.0]), 'temperature has -1.0; it must'),
    (lambda m: m.classify(TEXTS, []), 'at least one label'),
    (lambda m: m.logits([[5000, 1]], [[0, 5]]), 'ids .B, L. below'),
    (lambda m: m.logits([5, 1], [0, 5]), 'must be ids'),
    (lambda m: m.score('a', 'b', batch_size=0), 'batch_size'),
    (lambda m: m.generate('a', num_beams=2, temperature=1.0), 'searched, not sampled'),
  ],
)
def test_mistakes(model, call, message):
  with pytest.raises(UsageError, match=message):
    call(model)


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'temperature': 1.0, 'seed': 3, 'forced_eos_id': 1},
    {'temperature': 1.0, 'best_of': 3, 'length_penalty': 1.0},
    {'num_beams': 3, 'num_return_sequences': 2, 'early_stopping': 'never'},
    {'num_beams': 4, 'num_beam_groups': 2, 'diversity_penalty': 0.5},
    {'num_beams': 2, 'forced_eos_id': 1},
    {'draft': True},
  ],
)
def test_another_limit_compiles_nothing_and_is_exact(model, settings):
  """Limits up to one size share a program; outputs are those of a program of that very length."""
  settings = {name: model if name == 'draft' else value for name, value in settings.items()}
  more = {**settings, 'return_scores': True, 'return_log_probs': True}
  found = {n: model.generate(TEXTS, max_new_tokens=n, **more) for n in (5, 16, 11)}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prediction, 'padded_length', lambda n, *args, **kwargs: n)
    for n, (texts, scores, log_probs) in found.items():
      alone = model.generate(TEXTS, max_new_tokens=n, **more)
      assert texts == alone[0]
      for x, y in ((scores, alone[1]), (log_probs, alone[2])):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        np.testing.assert_allclose(jax.tree.leaves(x), jax.tree.leaves(y), atol=1e-4)


@pytest.mark.parametrize('mesh', [None, MeshConfig(data=4, model=2)])
def test_labels_are_scored_as_pairs_are(model, mesh, tmp_path):
  """Though an input is encoded once; of any number of labels, inputs and rows of a batch."""
  labels = ['no', 'a', 'perhaps', 'yes', 'b', 'never']
  model.save(str(tmp_path / 'model'))
  one = api.load(str(tmp_path / 'model'), mesh=mesh)
  pairs = [(text, label) for text in TEXTS for label in labels]
  want = model.score(*map(list, zip(*pairs, strict=True))).reshape(len(TEXTS), -1)
  for size in (1, 4, 7, 64):
    found, scores = one.classify(TEXTS, labels, batch_size=size, return_scores=True)
    np.testing.assert_allclose(scores, want, rtol=1e-4)
    assert found == [labels[i] for i in want.argmax(axis=1)]
