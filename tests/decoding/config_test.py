import pytest

from t5x_lite.decoding.config import DecodingConfig, decoding_config
from t5x_lite.errors import UsageError


@pytest.mark.parametrize(
  'field',
  [
    {'max_decode_length': 0},
    {'temperature': -1.0},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 0.9},
    {'top_k': 5},
  ],
)
def test_bad_values_are_named(field):
  with pytest.raises(UsageError, match=next(iter(field))):
    DecodingConfig(**field)


def test_an_unknown_setting_says_what_there_is():
  config = decoding_config(5, temperature=0.5, top_p=0.9)
  assert (config.max_decode_length, config.top_p) == (5, 0.9)
  with pytest.raises(UsageError, match=r"'num_beams'.*temperature.*no beam"):
    decoding_config(5, num_beams=4)
