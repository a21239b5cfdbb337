"""Invariants of the model: scan, packing, caches, causality, remat, dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.models import t5
from tests.models import tiny

VARIANTS = {
  't5_1_1': {},
  't5_1_0': {'mlp_activations': ('relu',), 'logits_via_embedding': True},
  'umt5': {'relpos_per_layer': True},
  'shared': {'share_encoder_decoder': True, 'num_decoder_layers': 2},
}


@pytest.fixture(scope='module', params=VARIANTS)
def model(request):
  cfg = tiny.config(**VARIANTS[request.param])
  return cfg, tiny.params(cfg)


def test_every_parameter_has_axes_of_its_rank(model):
  cfg, params = model
  for scan in (True, False):
    _, shapes, axes = t5.abstract_params(cfg.replace(scan_layers=scan))
    jax.tree.map(lambda s, a: 1 / (len(a) == len(s.shape)), shapes, axes)
  _, shapes, _ = t5.abstract_params(cfg)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


def test_scanned_is_unrolled(model):
  cfg, params = model
  b = tiny.batch()
  scanned = tiny.apply(cfg, params, '__call__', b)
  unrolled = tiny.apply(cfg.replace(scan_layers=False), tiny.unstack(params, cfg), '__call__', b)
  np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def test_scanned_dropout_is_unrolled_dropout():
  cfg = tiny.config(dropout_rate=0.3, num_encoder_layers=1, num_decoder_layers=2)
  params, b = tiny.params(cfg), tiny.batch()
  key = jax.random.key(1)
  scanned = tiny.apply(cfg, params, '__call__', b, dropout_key=key)
  unrolled = tiny.apply(
    cfg.replace(scan_layers=False), tiny.unstack(params, cfg), '__call__', b, dropout_key=key
  )
  np.testing.assert_allclose(scanned, unrolled, atol=1e-5)
  plain = tiny.apply(cfg, params, '__call__', b)
  assert np.abs(scanned - plain).max() > 0.1


def test_init_does_not_depend_on_scanning():
  cfg = tiny.config(num_encoder_layers=1, num_decoder_layers=2)
  init = jax.jit(t5.init_params, static_argnums=0)
  scanned = init(cfg, jax.random.key(3))
  unrolled = init(cfg.replace(scan_layers=False), jax.random.key(3))
  jax.tree.map(np.testing.assert_array_equal, tiny.unstack(scanned, cfg), unrolled)


def test_packed_is_unpacked(model):
  cfg, params = model
  b = tiny.batch(B=8)
  b['encoder_input_tokens'][2] = 0  # no inputs: must not see its neighbours'
  packed = tiny.pack(b, rows=2)
  logits = tiny.apply(cfg, params, '__call__', b)
  packed_logits = tiny.apply(cfg, params, '__call__', packed)
  for i in range(8):
    n = int((b['decoder_target_tokens'][i] != 0).sum())
    row, segment = divmod(i, 4)
    where = packed['decoder_segment_ids'][row] == segment + 1
    assert where.sum() == n
    np.testing.assert_allclose(packed_logits[row][where], logits[i, :n], atol=1e-5)


def test_token_zero_inside_a_segment_is_real():
  cfg = tiny.config()
  params, b = tiny.params(cfg), tiny.batch(B=1)
  b['encoder_segment_ids'] = np.ones_like(b['encoder_input_tokens'])
  b['decoder_segment_ids'] = np.ones_like(b['decoder_input_tokens'])
  b['encoder_input_tokens'][0, 3] = 0
  with_ids = tiny.apply(cfg, params, '__call__', b)
  for name in ('encoder_segment_ids', 'decoder_segment_ids'):
    del b[name]
  without = tiny.apply(cfg, params, '__call__', b)
  assert np.abs(with_ids - without).max() > 1e-3


def test_cached_decode_is_full_decode(model):
  cfg, params = model
  b = tiny.batch()
  b['encoder_input_tokens'][1] = 0
  full = tiny.apply(cfg, params, '__call__', b)
  for scan in (True, False):
    c = cfg.replace(scan_layers=scan)
    graphdef, _, _ = t5.abstract_params(c)
    tree = params if scan else tiny.unstack(params, cfg)

    @jax.jit
    def run(tree, b, graphdef=graphdef):
      m = nnx.merge(graphdef, tree)
      inputs = b['encoder_input_tokens']
      cache = m.init_cache(m.encode(inputs), inputs, batch_size=4, max_decode_length=6)

      def body(cache, tokens):
        logits, cache = m.decode_step(tokens, cache)
        return cache, logits

      _, logits = jax.lax.scan(body, cache, b['decoder_input_tokens'].T)
      return logits.swapaxes(0, 1)

    np.testing.assert_allclose(run(tree, b), full, atol=1e-5)


def test_cache_with_a_position_per_row():
  """Rows at different positions, as after prompts of different lengths."""
  cfg = tiny.config()
  params, b = tiny.params(cfg), tiny.batch()
  full = tiny.apply(cfg, params, '__call__', b)
  graphdef, _, _ = t5.abstract_params(cfg)
  inputs = b['encoder_input_tokens']

  @jax.jit
  def run(params, tokens):
    m = nnx.merge(graphdef, params)
    cache = m.init_cache(m.encode(inputs), inputs, batch_size=4, max_decode_length=6)
    cache = dataclasses.replace(cache, index=jnp.zeros(4, jnp.int32))
    found = []
    for t in range(3):
      logits, cache = m.decode_step(tokens[:, t], cache)
      found.append(logits)
    return jnp.stack(found, axis=1)

  np.testing.assert_allclose(run(params, b['decoder_input_tokens']), full[:, :3], atol=1e-5)


def test_decoder_is_causal_and_encoder_is_not():
  cfg = tiny.config()
  params, b = tiny.params(cfg), tiny.batch(B=1)
  graphdef, _, _ = t5.abstract_params(cfg)

  def hidden(table_rows, position):
    """Gradient of one position's output by each input position's embedding."""
    m = nnx.merge(graphdef, params)
    m._embed = lambda tokens, key: table_rows
    m.encode = lambda *args, **kwargs: jnp.zeros((1, 9, 16))
    return m.hidden(b)[0, position].sum()

  rows = jax.random.normal(jax.random.key(0), (1, 6, 16))
  gradient = jax.jit(jax.grad(hidden))
  for position in range(6):
    grad = np.abs(gradient(rows, position)).sum((0, 2))
    assert (grad[: position + 1] > 0).all()
    assert (grad[position + 1 :] == 0).all()


def test_encoder_padding_changes_nothing():
  cfg = tiny.config()
  params, b = tiny.params(cfg), tiny.batch()
  longer = dict(b)
  longer['encoder_input_tokens'] = np.pad(b['encoder_input_tokens'], ((0, 0), (0, 5)))
  np.testing.assert_allclose(
    tiny.apply(cfg, params, '__call__', b), tiny.apply(cfg, params, '__call__', longer), atol=1e-5
  )


def test_prefix_sees_itself_in_both_directions():
  cfg = tiny.config(architecture='decoder')
  params = tiny.params(cfg)
  b = tiny.batch(B=1)
  base = {'decoder_input_tokens': b['decoder_input_tokens']}
  prefix = np.array([[1, 1, 1, 0, 0, 0]], np.int32)
  changed = base['decoder_input_tokens'].copy()
  changed[0, 2] += 1

  def logits(tokens, **kwargs):
    return tiny.apply(cfg, params, '__call__', {'decoder_input_tokens': tokens, **kwargs})

  causal = logits(base['decoder_input_tokens']) - logits(changed)
  assert np.abs(causal[0, :2]).max() == 0
  both = logits(base['decoder_input_tokens'], decoder_causal_attention=prefix) - logits(
    changed, decoder_causal_attention=prefix
  )
  assert np.abs(both[0, 0]).max() > 1e-4


@pytest.mark.parametrize('scan', [True, False])
def test_remat_changes_no_gradient(scan):
  cfg = tiny.config(dropout_rate=0.1, num_encoder_layers=1, num_decoder_layers=1)
  params = tiny.params(cfg)
  if not scan:
    params, cfg = tiny.unstack(params, cfg), cfg.replace(scan_layers=False)
  b = tiny.batch()

  def grads(cfg):
    graphdef, _, _ = t5.abstract_params(cfg)

    def loss(p):
      logits = nnx.merge(graphdef, p)(b, dropout_key=jax.random.key(1))
      return jnp.mean(jnp.square(logits))

    return jax.jit(jax.grad(loss))(params)

  plain = grads(cfg)
  for policy in ('minimal', 'save_names', 'full'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
      plain,
      grads(cfg.replace(remat_policy=policy)),
    )


def test_cross_attention_made_ahead_changes_no_gradient():
  cfg = tiny.config(num_encoder_layers=1, num_decoder_layers=2, remat_policy='minimal')
  graphdef, _, _ = t5.abstract_params(cfg)
  params, b = tiny.params(cfg), tiny.batch()

  def loss(p, ahead):
    return jnp.mean(jnp.square(nnx.merge(graphdef, p).hidden(b, cross_ahead=ahead)))

  one, other = (jax.jit(jax.grad(loss), static_argnums=1)(params, x) for x in (False, True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), one, other)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
  cfg = tiny.config(dtype='bfloat16')
  params, b = tiny.params(cfg), tiny.batch()
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}
  logits = tiny.apply(cfg, params, '__call__', b)
  assert logits.dtype == jnp.float32
  exact = tiny.apply(cfg.replace(dtype='float32'), params, '__call__', b)
  assert np.abs(logits - exact).max() < 0.15 * np.abs(exact).max()


def test_encoder_alone():
  cfg = tiny.config(architecture='encoder')
  params = tiny.params(cfg)
  assert set(params) == {'token_embedder', 'encoder'}
  encoded = tiny.apply(cfg, params, 'encode', tiny.batch()['encoder_input_tokens'])
  assert encoded.shape == (4, 9, 16)
