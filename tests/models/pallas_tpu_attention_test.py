"""The TPU kernel, interpreted, against dense attention."""

import pytest
from hypothesis import given, settings

from t5x_lite.errors import UsageError
from t5x_lite.models import pallas_tpu_attention
from tests.models import attention_cases


def interpreted(*args):
  return pallas_tpu_attention.attention(*args, block=128, interpret=True)


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True)
@given(attention_cases.cases(max_length=300))
def test_the_kernel_is_dense(case):
  """On lengths that are no multiple of a block, with rows that see nothing."""
  attention_cases.check(interpreted, {**case, 'H': min(case['H'], 2)})


@pytest.mark.parametrize('kind', attention_cases.KINDS)
def test_every_kind_of_visibility(kind):
  M = 100 if kind == 'cross' else 150
  attention_cases.check(
    interpreted,
    dict(kind=kind, B=1, L=150, M=M, H=2, K=8, packed=kind != 'prefix') | dict(dtype='float32'),
  )


def test_more_queries_than_the_chip_holds():
  arguments, visibility = attention_cases.problem(kind='cross', B=1, L=70000, M=1, H=1, K=128)
  with pytest.raises(UsageError, match="does not hold 70000 queries of 128 dims: use 'blocked'"):
    interpreted(*arguments, visibility)
