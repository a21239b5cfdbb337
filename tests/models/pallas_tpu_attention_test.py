"""What only the TPU kernel has; its results are compared in pallas_attention_test.py."""

import pytest

from t5x_lite.errors import UsageError
from t5x_lite.models import pallas_tpu_attention
from tests.models import attention_cases


def test_more_queries_than_the_chip_holds():
  arguments, visibility = attention_cases.problem(kind='cross', B=1, L=70000, M=1, H=1, K=128)
  with pytest.raises(UsageError, match="does not hold 70000 queries of 128 dims: use 'blocked'"):
    pallas_tpu_attention.attention(*arguments, visibility)
