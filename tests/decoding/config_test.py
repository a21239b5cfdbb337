import pytest

from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError


@pytest.mark.parametrize(
  'field',
  [
    {'max_decode_length': 0},
    {'temperature': -1.0},
    {'top_k': -1},
    {'top_p': 0.0},
  ],
)
def test_bad_values_are_named(field):
  with pytest.raises(UsageError, match=next(iter(field))):
    DecodingConfig(**field)
