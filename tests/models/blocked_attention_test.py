"""Blocked attention against dense attention: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.models import blocked_attention
from tests.models import attention_cases


@settings(max_examples=6, deadline=None, derandomize=True)
@given(attention_cases.cases(), st.sampled_from([8, 16, 64]))
def test_blocked_is_dense(case, block):
  """On lengths that are no multiple of a block, with rows that see nothing."""
  attention_cases.check(lambda *a: blocked_attention.attention(*a, block=block), case)


@pytest.mark.parametrize('kind', attention_cases.KINDS)
@pytest.mark.parametrize('packed', [False, True])
def test_every_kind_of_visibility(kind, packed):
  case = dict(kind=kind, B=2, L=37, M=21 if kind == 'cross' else 37, H=2, K=4, packed=packed)
  attention_cases.check(
    lambda *a: blocked_attention.attention(*a, block=8), {**case, 'dtype': 'float32'}
  )


def test_no_array_has_an_entry_for_every_pair():
  """Neither forward nor backward, at a length of many blocks."""
  L, block = 4096, 64
  arguments, visibility = attention_cases.problem(kind='encoder', B=1, L=L, M=L, H=1, K=4)

  def loss(arguments):
    return jnp.sum(blocked_attention.attention(*arguments, visibility, block=block) ** 2)

  stats = jax.jit(jax.grad(loss)).lower(arguments).compile().memory_analysis()
  assert stats.temp_size_in_bytes < L * L  # a quarter of one float32 array of all pairs


def test_lengths_are_cut_evenly():
  assert blocked_attention.cut(600, 512) == 304
  assert blocked_attention.cut(512, 512) == 512
  assert blocked_attention.cut(5, 512) == 8
  x = blocked_attention.pad(np.ones((2, 5)), 1, 8)
  assert x.shape == (2, 8) and x.sum() == 10
