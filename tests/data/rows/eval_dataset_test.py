"""Rows and raw examples of an evaluation belong together."""

import numpy as np
import pytest

from t5x_lite.data.rows.eval_dataset import EvalDataset
from tests.data import small_tasks
from tests.data.small_tasks import FIRST_ID, LENGTHS, NUM_EXAMPLES, config


@pytest.fixture(scope='module', autouse=True)
def tasks():
  with small_tasks.registered():
    yield


@pytest.mark.parametrize('name', ['dt_plain', 'dt_mixture'])
def test_eval_dataset_pairs_rows_with_raw_examples(name):
  cfg = config(name, batch_size=64, task_feature_lengths=LENGTHS | {'inputs': 5})
  for _ in range(2):  # it can be iterated again
    seen = []
    for batch, examples in EvalDataset(cfg):
      assert batch['encoder_input_tokens'].shape == (64, 5)
      assert 'encoder_segment_ids' not in batch
      for row, example in enumerate(examples):
        target = batch['decoder_target_tokens'][row, 0]
        number = int(example['targets_pretokenized'])
        assert target == number + FIRST_ID
        assert len(example['inputs']) == 1 + number % 11  # untrimmed
        seen.append(number)
      assert not batch['decoder_loss_weights'][len(examples) :].any()
    if name == 'dt_plain':
      assert seen == list(range(NUM_EXAMPLES))
    else:  # task after task, by name, each to its end
      assert seen == [*range(200, 300), *range(100)]


def test_eval_hosts_have_the_rows_of_one_host():
  cfg = config(batch_size=64)
  whole = list(EvalDataset(cfg))
  parts = [list(EvalDataset(cfg, process_index=index, process_count=2)) for index in range(2)]
  for (batch, examples), (a, _), (b, others) in zip(whole, *parts, strict=True):
    assert len(examples) == len(others)
    for name in batch:
      np.testing.assert_array_equal(batch[name], np.concatenate([a[name], b[name]]))
