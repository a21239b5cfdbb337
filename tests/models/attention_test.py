"""Hand-written backward passes, and whole models with each implementation."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.decoding import steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import attention, blocked_attention, layers, model_sharding, t5
from t5x_lite.models.attention_inputs import Visibility
from t5x_lite.parallel.partitioning import MeshConfig
from tests.models import tiny

B, L, M, H, K = 2, 5, 7, 3, 4


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def plain_attention(q, k, v, bias, mask):
  logits = jnp.einsum('BLHK,BMHK->BHLM', q, k)
  if bias is not None:
    logits += jnp.broadcast_to(bias, logits.shape)
  if mask is not None:
    logits = jnp.where(mask, logits, -1e10)
  return jnp.einsum('BHLM,BMHK->BLHK', jax.nn.softmax(logits), v)


def assert_same(fn, reference, arguments, rtol=1e-5):
  """Compares values and the gradients of a random projection."""
  g = draw(99, *reference(*arguments).shape)
  value, vjp = jax.vjp(fn, *arguments)
  expected, expected_vjp = jax.vjp(reference, *arguments)
  np.testing.assert_allclose(value, expected, rtol, 1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 2e-6), vjp(g), expected_vjp(g))


@pytest.mark.parametrize('lead', [(), (6,), (2, 3)])
def test_matmul(lead):
  arguments = draw(0, *lead, 4), draw(1, 4, 5)
  assert_same(layers.matmul, lambda x, w: x @ w, arguments)


@pytest.mark.parametrize('bias_shape', [None, (1, H, L, M), (B, H, 1, M)])
@pytest.mark.parametrize('mask_shape', [None, (B, 1, 1, M), (B, 1, L, M)])
def test_attention(bias_shape, mask_shape):
  """Rows that see nothing are among the masks."""
  mask = None
  if mask_shape is not None:
    mask = jax.random.bernoulli(jax.random.key(5), 0.6, mask_shape)
    mask = mask.at[0, :, 0].set(False)
  q, k, v = draw(0, B, L, H, K), draw(1, B, M, H, K), draw(2, B, M, H, K)
  bias = None if bias_shape is None else draw(3, *bias_shape)
  assert_same(
    lambda q, k, v, bias: attention.attention(q, k, v, bias, mask),
    lambda q, k, v, bias: plain_attention(q, k, v, bias, mask),
    (q, k, v, bias),
  )


def test_gradients_have_the_dtypes_of_their_arguments():
  q = draw(0, B, L, H, K).astype(jnp.bfloat16)
  k, v = (draw(i, B, M, H, K).astype(jnp.bfloat16) for i in (1, 2))
  bias = draw(3, 1, H, L, M)
  y, vjp = jax.vjp(attention.attention, q, k, v, bias)
  assert y.dtype == jnp.bfloat16
  dtypes = [x.dtype for x in vjp(y)[:4]]
  assert dtypes == [jnp.bfloat16] * 3 + [jnp.float32]


def test_attention_keeps_no_logits_for_the_backward_pass():
  """One array of B H L M entries is kept: the weights."""
  arguments = (
    draw(0, B, L, H, K),
    draw(1, B, M, H, K),
    draw(2, B, M, H, K),
    draw(3, 1, H, L, M),
    jnp.ones((B, 1, 1, M), bool),
  )
  _, vjp = jax.vjp(lambda *a: attention.attention(*a, arguments[4]), *arguments[:4])
  kept = [x for x in jax.tree.leaves(vjp) if getattr(x, 'shape', ()) == (B, H, L, M)]
  assert len(kept) == 1


# ---- In a model ----

MODELS = {
  'packed, dropout': ({'dropout_rate': 0.2, 'remat_policy': 'full'}, True, False),
  'shared, per layer, unrolled': (
    {'share_encoder_decoder': True, 'relpos_per_layer': True, 'scan_layers': False},
    False,
    False,
  ),
  'packed prefix': ({'architecture': 'decoder', 'remat_policy': 'minimal'}, True, True),
}


def value_and_grads(cfg, params, batch, placement=None):
  graphdef, _, _ = t5.abstract_params(cfg)

  def loss(params):
    logits = nnx.merge(graphdef, params)(batch, dropout_key=jax.random.key(1))
    targets = jax.nn.one_hot(batch['decoder_target_tokens'], cfg.vocab_size)
    weights = batch['decoder_loss_weights'][..., None]
    return -jnp.sum(jax.nn.log_softmax(logits) * targets * weights) / jnp.sum(weights)

  with contextlib.nullcontext() if placement is None else placement.active():
    return jax.jit(jax.value_and_grad(loss))(params)


def assert_trees_close(one, other):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


@pytest.mark.parametrize('name', MODELS)
def test_a_model_trains_the_same_with_blocked_attention(name, monkeypatch):
  """Loss and every gradient, the bias tables' included, over several blocks."""
  monkeypatch.setattr(blocked_attention, 'BLOCK', 8)
  fields, packed, prefix = MODELS[name]
  cfg = tiny.config(num_encoder_layers=1, num_decoder_layers=1, **fields)
  batch = tiny.batch(B=4, M=17, L=13)
  if prefix:
    batch['decoder_causal_attention'] = np.tile(np.arange(13) < 5, (4, 1)).astype(np.int32)
  if packed:
    batch = tiny.pack(batch, rows=2)
  params = tiny.params(cfg)
  assert_trees_close(
    value_and_grads(cfg.replace(attention='blocked'), params, batch),
    value_and_grads(cfg.replace(attention='dense'), params, batch),
  )


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(
  ('architecture', 'policy', 'prefix'),
  [
    ('encoder', 'none', False),
    ('encoder', 'full', False),
    ('encoder_decoder', 'minimal', False),
    ('decoder', 'full', False),
    ('decoder', 'none', True),
  ],
)
def test_a_scanned_model_holds_no_array_of_every_pair(architecture, policy, prefix, packed):
  """JAX would move what does not depend on the layer out of the scan, causal masks included."""
  fields = {'attention': 'blocked', 'remat_policy': policy, 'num_heads': 8, 'head_dim': 4}
  cfg, M = tiny.config(architecture=architecture, **fields), 4096
  graphdef, shapes, _ = t5.abstract_params(cfg)
  names = ['encoder_input_tokens'] * cfg.has_encoder + ['encoder_segment_ids'] * packed
  if cfg.has_decoder:
    names += ['decoder_input_tokens', 'decoder_target_tokens', *['decoder_segment_ids'] * packed]
  names += ['decoder_causal_attention'] * prefix
  batch = {name: jax.ShapeDtypeStruct((1, M), jnp.int32) for name in names}

  def loss(params, batch):
    model = nnx.merge(graphdef, params)
    if cfg.has_decoder:
      return jnp.sum(model.hidden(batch) ** 2)
    segments = {'encoder_segment_ids': batch['encoder_segment_ids']} if packed else {}
    return jnp.sum(model.encode(batch['encoder_input_tokens'], **segments) ** 2)

  stats = jax.jit(jax.grad(loss)).lower(shapes, batch).compile().memory_analysis()
  assert stats.temp_size_in_bytes < cfg.num_heads * M * M / 2  # an eighth of one in float32


@pytest.mark.parametrize('rules', [(), (('length', 'model'),), (('heads', None), ('kv', 'model'))])
def test_8_devices_are_1(rules):
  cfg = tiny.config(num_encoder_layers=1, num_decoder_layers=1, attention='blocked')
  params, batch = tiny.params(cfg), tiny.pack(tiny.batch(B=8), rows=4)
  placement = model_sharding.place_model(
    cfg, MeshConfig(data=2, fsdp=2, model=2, additional_rules=rules)
  )
  assert_trees_close(
    value_and_grads(cfg, params, batch, placement), value_and_grads(cfg, params, batch)
  )


def test_encoding_and_prefill_take_blocks_too():
  """And a cache is read densely whatever the setting."""
  cfg = tiny.config(architecture='decoder', bidirectional_prefix=True, attention='blocked')
  params, tokens = tiny.params(cfg), tiny.batch()['decoder_input_tokens']
  lengths = jnp.asarray([5, 4, 6, 3])
  results = []
  for attention_ in ('blocked', 'dense'):
    graphdef, _, _ = t5.abstract_params(cfg.replace(attention=attention_))

    @jax.jit
    def run(params, tokens, graphdef=graphdef):
      model = nnx.merge(graphdef, params)
      cache = model.init_cache(None, None, batch_size=4, max_decode_length=8)
      logits, cache = model.prefill(cache, tokens, lengths)
      return logits, model.decode_step(jnp.argmax(logits, -1), cache)[0]

    results.append(run(params, tokens))
  assert_trees_close(*results)


def test_beams_with_a_prompt_decode_alike_whatever_the_setting():
  """Several queries with a cache: masks are arrays, whatever was asked for."""
  cfg, batch = tiny.config(), tiny.batch()
  inputs = {
    'encoder_input_tokens': batch['encoder_input_tokens'],
    'decoder_prompt_tokens': batch['decoder_input_tokens'][:, :3],
    'decoder_prompt_lengths': np.asarray([3, 2, 1, 3], np.int32),
  }
  found = []
  for attention_ in ('blocked', 'dense'):
    graphdef, _, _ = t5.abstract_params(cfg.replace(attention=attention_))
    config = DecodingConfig(num_beams=3, max_decode_length=6)
    step = jax.jit(steps.make_predict_step(graphdef, config))
    found.append(step(tiny.params(cfg), inputs))
  np.testing.assert_array_equal(found[0].tokens_BnL, found[1].tokens_BnL)
  np.testing.assert_allclose(found[0].scores_Bn, found[1].scores_Bn, rtol=1e-4)


# ---- The choice ----


def test_auto_is_dense_until_it_is_long():
  assert attention.choose('auto', 512, 512, 'cpu') == 'dense'
  assert attention.choose('auto', 8192, 8192, 'cpu') == 'blocked'
  assert attention.choose('auto', 1024, 1024, 'cpu') == 'blocked'
  assert attention.choose('auto', 1024, 1024, 'tpu') == 'dense'
  assert attention.choose('auto', 8192, 114, 'tpu') == 'dense'
  assert attention.choose('blocked', 1, 8192, 'cpu') == 'dense'
  assert attention.choose('cudnn', 512, 512, 'gpu') == 'cudnn'
  assert attention.choose('cudnn', 512, 229, 'gpu') == 'dense'  # it trains no odd lengths


@pytest.mark.parametrize('segments', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_cudnn_is_asked_for_what_it_takes(segments, bias, monkeypatch):
  """JAX's own checks of shapes, which run without a GPU; the numbers need one."""
  from jax._src.cudnn import fused_attention_stablehlo

  class Versions:
    cudnn_get_version = staticmethod(lambda: 91100)

  monkeypatch.setattr(fused_attention_stablehlo, 'cuda_versions', Versions)
  monkeypatch.setitem(attention.PLATFORMS, 'cudnn', ('cpu',))
  B, L, M, H, K = 2, 64, 32, 4, 64
  q, k = jnp.zeros((B, L, H, K), jnp.bfloat16), jnp.zeros((B, M, H, K), jnp.bfloat16)
  ids = [jnp.ones((B, n), jnp.int32) for n in (L, M)]
  seen = Visibility(key_seen_BM=ids[1] > 0, segments=tuple(ids) if segments else None)
  bias_1HLM = jnp.zeros((1, H, L, M)) if bias else None

  def loss(q, k, bias):
    mask = attention.mask('cudnn', seen, L, M)
    return jnp.sum(attention.attention(q, k, k, bias, mask, 'cudnn')).astype(jnp.float32)

  found = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2) if bias else (0, 1)), q, k, bias_1HLM)
  assert [one.shape for one in found] == [q.shape, k.shape, *[(1, H, L, M)] * bias]


def test_description_names_each_attention():
  assert (
    attention.describe('auto', 8192, 512, 'tpu') == 'encoder blocked, decoder dense, cross blocked'
  )
  assert attention.describe('auto', 0, 512, 'cpu') == 'decoder dense'


def test_what_the_platform_lacks_is_refused():
  for name, needs in (('cudnn', 'GPU'), ('pallas_gpu', 'GPU'), ('pallas_tpu', 'TPU')):
    with pytest.raises(UsageError, match=f"'{name}', which needs a {needs}; this is a CPU: use 'a"):
      attention.choose(name, 512, 512)
