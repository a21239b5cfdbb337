"""A DatasetConfig is checked when it is made."""

import subprocess
import sys

import numpy as np
import pytest

from t5x_lite.data.config import DatasetConfig, batch_spec
from t5x_lite.errors import UsageError

LENGTHS = {'inputs': 24, 'targets': 16}


def config(**kwargs):
  values = {'mixture_or_task_name': 'any', 'task_feature_lengths': LENGTHS, 'batch_size': 4}
  return DatasetConfig(**values | kwargs)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'batch_size': 0}, 'batch_size is 0; it must be at least 1'),
    ({'feature_converter': 'encdec'}, "is 'encdec'; it must be one of"),
    ({'host_sharding': 'no'}, "host_sharding is 'no'; it must be source or"),
    ({'task_feature_lengths': {'inputs': 3}}, 'must be .*with inputs and targets'),
    ({'task_feature_lengths': 5}, 'must map names to lengths'),
    ({'task_feature_lengths': LENGTHS | {'inputs': 0}}, "'inputs', 0.*at least 1 each"),
    ({'num_epochs': 0}, 'num_epochs is 0'),
    ({'segment_ids': False}, 'pack is True; it must be False without segment_ids'),
  ],
)
def test_config_checks_itself(kwargs, message):
  with pytest.raises(UsageError, match=message):
    config(**kwargs)


def test_config_is_hashable_and_takes_pairs():
  assert hash(config()) == hash(config())
  pairs = tuple(LENGTHS.items())
  assert config(task_feature_lengths=pairs) == config()


def test_batch_spec_is_of_the_global_batch():
  spec = batch_spec(config(pack=False))
  assert spec['encoder_input_tokens'] == ((4, 24), np.int32)
  assert spec['decoder_loss_weights'] == ((4, 16), np.float32)
  assert sorted(set(batch_spec(config())) - set(spec)) == [
    'decoder_positions',
    'decoder_segment_ids',
    'encoder_positions',
    'encoder_segment_ids',
  ]
  prefix_lm = batch_spec(config(feature_converter='prefix_lm'))
  assert prefix_lm['decoder_causal_attention'] == ((4, 40), np.int32)


def test_replicated_when_asked_or_finite():
  assert not config().replicated
  assert config(host_sharding='replicated').replicated
  assert config(num_epochs=2).replicated


def test_a_config_does_not_load_tensorflow():
  code = 'import sys, t5x_lite.data.config; print("tensorflow" in sys.modules)'
  output = subprocess.check_output([sys.executable, '-c', code], text=True)
  assert output == 'False\n'
