"""The GPU kernel without a GPU: lowered to Triton, on a mesh, its memory.

Its results are compared in pallas_attention_test.py.
"""

import functools

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

from t5x_lite.models import attention, model_sharding, pallas_gpu_attention
from t5x_lite.models.attention_inputs import Visibility
from t5x_lite.parallel.partitioning import MeshConfig
from tests.models import attention_cases, tiny


def gradient(causal: bool):
  """Returns a function of (q, k, v, values) and segments that runs all kernels."""

  def loss(arguments, segments):
    visibility = Visibility(segments=segments, causal=causal)
    return jnp.sum(pallas_gpu_attention.attention(*arguments, visibility).astype(jnp.float32))

  return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(('L', 'K'), [(512, 64), (8192, 128)])
def test_forward_and_backward_lower_to_triton(L, K):
  """At lengths and widths of the family: three kernels and the bias' own, none of every pair."""
  if jaxlib.version.__version_info__ > (0, 10, 2):
    pytest.skip('from jaxlib 0.11 on lowering compiles, which needs a GPU plugin')
  B, H = 2, 12
  vector = jax.ShapeDtypeStruct((B, L, H, K), jnp.bfloat16)
  values = jax.ShapeDtypeStruct((H, 2 * L - 1), jnp.float32)
  segments = (jax.ShapeDtypeStruct((B, L), jnp.int32),) * 2
  traced = gradient(causal=L == 512).trace((vector, vector, vector, values), segments)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('@__gpu$xla.gpu.triton') == 4
  assert f'x{L}x{L}x' not in text


def test_devices_share_rows_and_heads(monkeypatch):
  """By the config field, on a mesh."""
  interpreted = functools.partial(pallas_gpu_attention.attention, interpret=True)
  monkeypatch.setattr(pallas_gpu_attention, 'attention', interpreted)
  monkeypatch.setitem(attention.PLATFORMS, 'pallas_gpu', ('cpu',))
  (q, k, v, values), visibility = attention_cases.problem(kind='causal', B=2, L=9, M=9, H=4, K=4)
  cfg = tiny.config(attention='pallas_gpu')

  def run(*arguments):
    return attention.attention(*arguments, visibility, cfg.attention)

  expected = attention_cases.dense(q, k, v, values, visibility)
  with model_sharding.place_model(cfg, MeshConfig(data=2, model=4)).active():
    np.testing.assert_allclose(jax.jit(run)(q, k, v, values), expected, atol=1e-5)
