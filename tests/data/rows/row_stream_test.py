"""What cannot be read is refused, by name."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data.rows import dataset_iterator, eval_dataset
from t5x_lite.errors import UsageError
from tests.data import small_tasks
from tests.data.small_tasks import LENGTHS, batches, config


@pytest.fixture(scope='module', autouse=True)
def tasks():
  with small_tasks.registered():
    yield


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'name': 'dt_plian'}, "'dt_plian'; did you mean dt_plain"),
    ({'split': 'tset'}, "no split 'tset', only.*train"),
    ({'module': 'no_such_module'}, "'no_such_module' cannot be imported"),
    (
      {'task_feature_lengths': LENGTHS | {'answers': 3}},
      "names 'answers', but the output features of dt_plain are",
    ),
    ({'name': 'dt_float'}, "'inputs' of dt_float is float32"),
  ],
)
def test_wrong_tasks_are_refused_at_once(kwargs, message):
  with pytest.raises(UsageError, match=message):
    dataset_iterator.DatasetIterator(config(**kwargs))


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'name': 'dt_big_id'}, r"id 512 in 'targets' of dt_big_id.*\[0, 512\)"),
    ({'vocab_size': 100}, r"in 'inputs' of dt_plain.*\[0, 100\)"),
    (
      {'name': 'dt_zero', 'pack': False},
      "id 0 occurs inside 'inputs' of dt_zero.*segment_ids=True",
    ),
    ({'name': 'dt_stateful'}, 'RandomShuffle.*allow_stateful_ops=True'),
    ({'name': 'dt_none'}, "dt_none has no examples in split 'train'"),
    ({'name': 'dt_partly'}, 'dt_partly has no examples.*, or a task of it has none'),
  ],
)
def test_wrong_examples_are_refused_when_met(tmp_path, kwargs, message):
  iterator = dataset_iterator.DatasetIterator(config(**kwargs))
  with pytest.raises(UsageError, match=message):
    for _ in range(200):
      next(iterator)
  with pytest.raises(UsageError, match=message):
    iterator.save(tmp_path)  # the position would be after the bad window
  iterator.close()


def test_id_zero_is_kept():
  for batch in (
    batches(config('dt_zero'), 1)[0],
    batches(config('dt_zero', pack=False, segment_ids=True), 1)[0],
  ):
    assert batch['encoder_input_tokens'][0, :3].tolist() == [5, 0, 6]
    assert (batch['encoder_segment_ids'][0, :3] == 1).all()


@pytest.mark.parametrize('pack', [True, False])
def test_a_tasks_own_loss_weights_reach_the_batch(pack):
  """From a SeqIO task: each target weighs a hundredth of its id, EOS nothing."""

  def weigh(dataset):
    def add(example):
      weights = tf.cast(example['targets'], tf.float32) / 100
      return {**example, 'targets_loss_weights': tf.where(example['targets'] == 1, 0.0, weights)}

    return dataset.map(add)

  seqio.TaskRegistry.add(
    'dt_weighed',
    source=small_tasks._examples(),
    preprocessors=[weigh],
    output_features=small_tasks.FEATURES
    | {'targets_loss_weights': seqio.ContinuousFeature(dtype=tf.float32, rank=1)},
  )
  try:
    for batch in small_tasks.batches(small_tasks.config('dt_weighed', pack=pack), 3):
      tokens = batch['decoder_target_tokens']
      want = np.where(tokens == 1, 0, tokens / 100)
      np.testing.assert_allclose(batch['decoder_loss_weights'], want, rtol=1e-6)
      assert (batch['decoder_loss_weights'] > 0).any()
    cfg = small_tasks.config('dt_weighed')
    batch, _ = next(iter(eval_dataset.EvalDataset(cfg)))
    want = batch['decoder_target_tokens'][:, 0] / 100
    np.testing.assert_allclose(batch['decoder_loss_weights'][:, 0], want, rtol=1e-6)
  finally:
    seqio.TaskRegistry.remove('dt_weighed')
