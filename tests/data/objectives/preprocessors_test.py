"""Preprocessors over data sets of tokens: shaping and the objectives."""

import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data.objectives import preprocessors
from t5x_lite.errors import UsageError

BYTES = seqio.ByteVocabulary(extra_ids=100)
FEATURES = {'inputs': seqio.Feature(BYTES), 'targets': seqio.Feature(BYTES)}


def documents(*lengths):
  """Documents whose tokens are all different, so that order shows."""
  starts = np.cumsum([0, *lengths])
  return [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(starts)]


def dataset(docs, key='targets'):
  return tf.data.Dataset.from_generator(
    lambda: ({key: doc} for doc in docs),
    output_signature={key: tf.TensorSpec([None], docs[0].dtype)},
  )


def run(fn, docs, *args, seed=0, **kwargs):
  with seqio.map_seed_manager(seed):
    return list(fn(dataset(docs), *args, **kwargs).as_numpy_iterator())


# ---- Shaping ----


def test_reduce_concat_keeps_zeros_and_order():
  docs = [np.array(d, np.int32) for d in ([5, 0, 7], [], [0], [8, 9])]
  out = run(preprocessors.reduce_concat_tokens, docs, batch_size=3)
  assert [e['targets'].tolist() for e in out] == [[5, 0, 7, 0], [8, 9]]


@pytest.mark.parametrize('minimum', [None, 2])
def test_split_tokens_keeps_every_token_once_in_order(minimum):
  docs = documents(10, 0, 3, 4, 1)
  out = run(
    preprocessors.split_tokens, docs, max_tokens_per_segment=4, min_tokens_per_segment=minimum
  )
  segments = [e['targets'] for e in out]
  assert np.concatenate(segments).tolist() == list(range(18))
  assert all(0 < len(s) <= 4 for s in segments)
  if minimum is None:
    assert [len(s) for s in segments] == [4, 4, 2, 3, 4, 1]


def test_select_random_chunk_takes_one_whole_chunk():
  docs = documents(100) * 60 + documents(5, 0)
  out = run(preprocessors.select_random_chunk, docs, max_length=30)
  assert len(out) == 61
  assert out.pop()['targets'].tolist() == list(range(5))
  starts = [int(e['targets'][0]) for e in out]
  assert {starts.count(s) > 4 for s in (0, 30, 60, 90)} == {True}
  for start, example in zip(starts, out, strict=True):
    assert example['targets'].tolist() == list(range(start, min(start + 30, 100)))


# ---- Objectives ----


def bytes_documents(n=40, seed=0):
  generator = np.random.default_rng(seed)
  return [
    generator.integers(3, 259, size=generator.integers(1, 90)).astype(np.int32) for _ in range(n)
  ]


OBJECTIVES = {
  'span': (preprocessors.span_corruption, {}, 50),
  'replace': (preprocessors.iid_denoising, {}, 50),
  'drop': (preprocessors.iid_denoising, {'style': 'drop'}, 50),
  'mass': (preprocessors.iid_denoising, {'style': 'mass'}, 50),
  'bert': (preprocessors.iid_denoising, {'style': 'bert'}, 50),
  'deshuffling': (preprocessors.deshuffling, {}, 50),
  'prefix_lm': (preprocessors.prefix_lm, {}, 50),
}
WHOLE_TARGETS = ('mass', 'bert', 'deshuffling')


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objectives_hold_every_token_once(name):
  fn, settings, length = OBJECTIVES[name]
  docs = bytes_documents()
  lengths = {'inputs': length, 'targets': length}
  out = run(fn, docs, lengths, FEATURES, **settings)
  features = ('targets',) if name in WHOLE_TARGETS else ('inputs', 'targets')
  held = np.concatenate([e[f] for e in out for f in features])
  text = np.concatenate(docs)
  assert sorted(held[held < 259]) == sorted(text)
  # EOS follows, and must still fit.
  assert max(len(e['inputs']) for e in out) <= length - 1
  assert max(len(e['targets']) for e in out) <= length - 1
  assert {e['inputs'].dtype for e in out} == {np.dtype('int32')}
  if name in WHOLE_TARGETS:
    assert np.concatenate([e['targets'] for e in out]).tolist() == text.tolist()
  if name != 'span':
    return
  again = run(fn, docs, lengths, FEATURES, **settings)
  other = run(fn, docs, lengths, FEATURES, seed=99, **settings)
  same, moved = (
    [np.array_equal(a['inputs'], b['inputs']) for a, b in zip(out, others, strict=False)]
    for others in (again, other)
  )
  assert all(same) and not all(moved)


def test_span_corruption_fills_the_inputs_and_targets_exactly():
  docs = [np.full(5000, 7, np.int32)]
  out = run(preprocessors.span_corruption, docs, {'inputs': 512, 'targets': 114}, FEATURES)
  # One less than the paper's, for EOS.
  assert {(len(e['inputs']), len(e['targets'])) for e in out[:-1]} == {(511, 113)}
  assert len(out) == 9  # 5,000 tokens in segments of 568
  reserved = run(
    preprocessors.span_corruption,
    docs,
    {'inputs': 512, 'targets': 114},
    FEATURES,
    reserved_for_packing=100,
  )
  assert len(reserved[0]['inputs']) == 411


def test_span_corruption_of_short_texts():
  docs = documents(1, 2, 3)
  docs = [doc + 3 for doc in docs]
  out = run(
    preprocessors.span_corruption,
    docs,
    {'inputs': 512, 'targets': 114},
    FEATURES,
    merge_examples_to_reduce_padding=False,
  )
  assert len(out) == 3
  for doc, example in zip(docs, out, strict=True):
    held = np.concatenate([example['inputs'], example['targets']])
    assert sorted(held[held < 259]) == doc.tolist()


def test_byt5_reuses_its_last_bytes():
  features = dict.fromkeys(('inputs', 'targets'), seqio.Feature(seqio.ByteVocabulary()))
  docs = [np.full(100, 7, np.int32)]
  out = run(
    preprocessors.span_corruption,
    docs,
    {'inputs': 64, 'targets': 64},
    features,
    mean_noise_span_length=20.0,
  )
  assert 258 in out[0]['inputs'] and out[0]['targets'][0] == 258


def test_full_lm_marks_the_ends_of_documents():
  docs = [doc + 3 for doc in documents(5, 3, 4)]
  out = run(preprocessors.full_lm, docs, {'targets': 6}, {'targets': FEATURES['targets']})
  tokens = np.concatenate([e['targets'] for e in out]).tolist()
  assert tokens == [3, 4, 5, 6, 7, 1, 8, 9, 10, 1, 11, 12, 13, 14, 1]
  assert [len(e['targets']) for e in out] == [6, 6, 3]


def test_iid_denoising_never_runs_out_of_sentinels():
  features = dict.fromkeys(('inputs', 'targets'), seqio.Feature(seqio.ByteVocabulary(extra_ids=13)))
  docs = [np.full(5000, 7, np.int32)]
  out = run(preprocessors.iid_denoising, docs, {'inputs': 100, 'targets': 100}, features)
  lowest = min(int(e[f][e[f] > 7].min()) for e in out for f in ('inputs', 'targets'))
  assert lowest == 259
  held = np.concatenate([e[f] for e in out for f in ('inputs', 'targets')])
  assert (held == 7).sum() == 5000


@pytest.mark.parametrize(
  ('fn', 'lengths', 'settings', 'message'),
  [
    ('span', {'inputs': 512, 'targets': 113}, {}, 'targets of 114 .*has 113'),
    ('span', {'inputs': 2048, 'targets': 512}, {}, 'needs 114 sentinels'),
    ('span', None, {}, "needs the length of 'inputs'"),
    ('span', {'inputs': 512}, {}, "needs the length of 'targets'"),
    ('span', {'inputs': 9, 'targets': 9}, {'num_sentinels': 0}, 'num_sentinels'),
    ('span', {'inputs': 512, 'targets': 512}, {'noise_density': 1.5}, '1.5'),
    ('mass', {'inputs': 64, 'targets': 32}, {}, 'targets of 64'),
    ('deshuffling', {'inputs': 64, 'targets': 32}, {}, 'targets of 64'),
    ('prefix_lm', {'inputs': 128, 'targets': 64}, {'noise_density': 0.25}, 'targets of 65'),
    (
      'replace',
      {'inputs': 512, 'targets': 512},
      {'noise_density': 0.5},
      'needs 128 sentinels per sequence and the vocabulary has 100',
    ),
    ('replace', {'inputs': 64, 'targets': 64}, {'style': 'mask'}, "is 'mask'"),
  ],
)
def test_what_cannot_work_is_said_before_any_example(fn, lengths, settings, message):
  function, defaults, _ = OBJECTIVES[fn]
  with pytest.raises(UsageError, match=message):
    function(dataset(documents(9)), lengths, FEATURES, **defaults | settings)


@pytest.mark.parametrize(('density', 'targets'), [(0.1, 27), (0.25, 65), (0.5, 127), (0.9, 127)])
def test_targets_of_the_shortest_prefix_fit(density, targets):
  lengths, docs = {'inputs': 128, 'targets': targets}, [np.full(127 * 512, 7, np.int32)]
  out = run(preprocessors.prefix_lm, docs, lengths, FEATURES, noise_density=density)
  assert max(len(e['targets']) for e in out) == targets - 1  # EOS follows


def test_masks_need_a_sentinel():
  features = dict.fromkeys(('inputs', 'targets'), seqio.Feature(seqio.PassThroughVocabulary(50, 1)))
  with pytest.raises(UsageError, match=r'needs 1 sentinels .* has 0'):
    preprocessors.iid_denoising(
      dataset(documents(9)), {'inputs': 64, 'targets': 64}, features, style='mass'
    )


def test_reused_ids_lift_the_limit():
  run(
    preprocessors.iid_denoising,
    bytes_documents(2),
    {'inputs': 512, 'targets': 512},
    FEATURES,
    noise_density=0.5,
    num_sentinels=200,
  )


def test_denoising_needs_one_vocabulary():
  features = {'inputs': seqio.Feature(seqio.ByteVocabulary()), 'targets': FEATURES['targets']}
  with pytest.raises(UsageError, match=r'one vocabulary'):
    run(preprocessors.span_corruption, documents(9), {'inputs': 64, 'targets': 64}, features)
