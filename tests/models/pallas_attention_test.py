"""The kernels, interpreted, against dense attention."""

import functools
import itertools

import pytest
from hypothesis import given, settings

from t5x_lite.models import pallas_gpu_attention, pallas_tpu_attention
from tests.models import attention_cases

KERNELS = {
  'tpu': functools.partial(pallas_tpu_attention.attention, block=128, interpret=True),
  'gpu': functools.partial(pallas_gpu_attention.attention, block=32, interpret=True),
}
# Interpreted GPU kernels take seconds to compile; the other two kinds run every part of them.
SLOW = (('gpu', 'encoder'), ('gpu', 'prefix'))
PAIRS = [
  pytest.param(*pair, marks=pytest.mark.slow if pair in SLOW else ())
  for pair in itertools.product(KERNELS, attention_cases.KINDS)
]


@pytest.mark.slow
@pytest.mark.parametrize('kernel', KERNELS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(case=attention_cases.cases(max_length=300))
def test_a_kernel_is_dense(kernel, case):
  """On lengths that are no multiple of a block, with rows that see nothing."""
  attention_cases.check(KERNELS[kernel], {**case, 'H': min(case['H'], 2)})


@pytest.mark.parametrize(('kernel', 'kind'), PAIRS)
def test_every_kind_of_visibility(kernel, kind):
  M = 112 if kind == 'cross' else 150  # whole halves of a block too
  attention_cases.check(
    KERNELS[kernel],
    dict(kind=kind, B=1, L=150, M=M, H=2, K=8, packed=kind != 'prefix') | dict(dtype='float32'),
  )
