"""The config refuses what cannot be built, and names the published sizes."""

import pytest

from t5x_lite.errors import UsageError
from t5x_lite.models import config


def test_named_config_takes_overrides():
  cfg = config.named_config('t5_1_1_small', dropout_rate=0.1)
  assert (cfg.emb_dim, cfg.num_heads, cfg.dropout_rate) == (512, 6, 0.1)


def test_unknown_name_suggests():
  with pytest.raises(UsageError, match='did you mean t5_1_1_small'):
    config.named_config('t5_1_1_smal')


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('vocab_size', 0),
    ('dtype', 'float64'),
    ('remat_policy', 'some'),
    ('attention', 'flash'),
    ('mlp_activations', ('tanh',)),
    ('dropout_rate', 1.0),
    ('num_encoder_layers', 0),
    ('architecture', 'both'),
  ],
)
def test_bad_values_are_named(field, value):
  with pytest.raises(UsageError, match=field):
    config.T5Config(**{field: value})


def test_sharing_needs_equal_depth():
  with pytest.raises(UsageError, match='as many'):
    config.T5Config(share_encoder_decoder=True, num_decoder_layers=2)


def test_lists_from_gin_stay_hashable():
  cfg = config.T5Config(mlp_activations=['relu'])
  assert hash(cfg) == hash(config.T5Config(mlp_activations=('relu',)))
