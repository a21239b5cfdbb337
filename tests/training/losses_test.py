import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_lite.errors import UsageError
from t5x_lite.training import losses

B, L, D, V = 4, 6, 5, 11


def draw(seed=0):
  """Returns logits, targets and weights, as numpy float64 and int64."""
  rng = np.random.default_rng(seed)
  logits = 3 * rng.standard_normal((B, L, V))
  targets = rng.integers(0, V, (B, L))
  weights = rng.uniform(0, 2, (B, L)) * (rng.uniform(size=(B, L)) < 0.8)
  return logits, targets, weights


def reference(logits, targets, z_loss, label_smoothing):
  """Returns loss, z-loss and d loss / d logits, written out from the papers.

  Cross entropy against the smoothed distribution q (Szegedy et al. 2016) less
  the entropy of q, plus z_loss log(Z)^2 (Mesh TensorFlow).
  """
  z = np.log(np.sum(np.exp(logits), axis=-1))
  log_p = logits - z[..., None]
  q = np.full(logits.shape, label_smoothing / (V - 1))
  np.put_along_axis(q, targets[..., None], 1 - label_smoothing, axis=-1)
  entropy = -np.sum(np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0), -1)
  extra = z_loss * z**2
  loss = -np.sum(q * log_p, axis=-1) - entropy + extra
  grad = (1 + 2 * z_loss * z)[..., None] * np.exp(log_p) - q
  return loss, extra, grad


SETTINGS = [(0.0, 0.0), (1e-4, 0.0), (0.0, 0.1), (1e-2, 0.3)]


@pytest.mark.parametrize(('z_loss', 'label_smoothing'), SETTINGS)
def test_cross_entropy_is_the_formula(z_loss, label_smoothing):
  logits, targets, weights = draw()
  loss, extra, grad = reference(logits, targets, z_loss, label_smoothing)
  kwargs = {'z_loss': z_loss, 'label_smoothing': label_smoothing}
  x = jnp.asarray(logits, jnp.float32)

  got_loss, got_extra = losses.cross_entropy_with_logits(x, targets, **kwargs)
  np.testing.assert_allclose(got_loss, loss, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got_extra, extra, rtol=1e-5, atol=1e-7)

  def total(x):
    return jnp.sum(losses.cross_entropy_with_logits(x, targets, **kwargs)[0] * weights)

  got = jax.grad(total)(x)
  np.testing.assert_allclose(got, grad * weights[..., None], atol=2e-6)


def test_the_z_loss_output_has_a_gradient_of_its_own():
  logits, targets, _ = draw()
  x = jnp.asarray(logits, jnp.float32)

  def z_only(x):
    return jnp.sum(losses.cross_entropy_with_logits(x, targets, z_loss=0.5)[1])

  z = jax.nn.logsumexp(x, axis=-1, keepdims=True)
  np.testing.assert_allclose(jax.grad(z_only)(x), z * jax.nn.softmax(x), rtol=1e-4, atol=1e-6)


def test_a_perfect_smoothed_prediction_costs_nothing():
  targets = jnp.zeros((1, 1), jnp.int32)
  q = jnp.full((1, 1, V), 0.2 / (V - 1)).at[..., 0].set(0.8)
  loss, _ = losses.cross_entropy_with_logits(jnp.log(q), targets, label_smoothing=0.2)
  np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_huge_logits_stay_finite_and_bfloat16_is_computed_in_float32():
  logits, targets, _ = draw()
  huge = jnp.asarray(logits * 1e4, jnp.float32)
  loss, grad = jax.value_and_grad(
    lambda x: jnp.sum(losses.cross_entropy_with_logits(x, targets)[0])
  )(huge)
  assert np.isfinite(loss) and np.all(np.isfinite(grad))

  low = jnp.asarray(logits, jnp.bfloat16)
  loss, _ = losses.cross_entropy_with_logits(low, targets)
  assert loss.dtype == jnp.float32
  want, _, _ = reference(np.asarray(low, np.float64), targets, 0, 0)
  np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-5)
  grad = jax.grad(lambda x: jnp.sum(losses.cross_entropy_with_logits(x, targets)[0]))(low)
  assert grad.dtype == jnp.bfloat16


def test_sums_count_and_weigh():
  logits, targets, weights = draw()
  loss, extra, _ = reference(logits, targets, 1e-2, 0)
  sums = losses.loss_sums(
    jnp.asarray(logits, jnp.float32), targets, jnp.asarray(weights), z_loss=1e-2
  )
  np.testing.assert_allclose(sums['loss'], np.sum(loss * weights), rtol=1e-5)
  np.testing.assert_allclose(sums['z_loss'], np.sum(extra * weights), rtol=1e-5)
  right = (logits.argmax(-1) == targets) & (weights > 0)
  assert sums['num_correct'] == right.sum() > 0
  assert sums['num_tokens'] == (weights > 0).sum()


def test_no_buffer_beside_the_logits_and_their_gradient():
  # T5X's keeps a one-hot and two softmaxes of [B, L, V] for the backward pass.
  shape = (8, 16, 1024)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  targets = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
  weights = jax.ShapeDtypeStruct(shape[:2], jnp.float32)
  step = jax.jit(
    jax.value_and_grad(lambda x, t, w: (s := losses.loss_sums(x, t, w))['loss'] + 0 * s['z_loss'])
  )
  memory = step.lower(x, targets, weights).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.1 * 4 * math.prod(shape)


# ---- Weights and denominator ----

# Two rows: examples of 3 and 5 tokens, and one of 6; 2 positions of padding.
PACKED = {
  'decoder_target_tokens': np.array([[3, 4, 1, 5, 6, 7, 8, 1], [2, 3, 4, 5, 6, 1, 0, 0]]),
  'decoder_segment_ids': np.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0]]),
  'decoder_positions': np.array([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0]]),
  'decoder_loss_weights': np.array([[1.0] * 8, [1.0] * 6 + [0.0] * 2], np.float32),
}
UNPACKED = {
  'decoder_target_tokens': np.array([[3, 4, 1, 0, 0, 0], [5, 6, 7, 8, 1, 0], [2, 3, 4, 5, 6, 1]]),
  'decoder_loss_weights': np.array([[1] * 3 + [0] * 3, [1] * 5 + [0], [1] * 6], np.float32),
}


@pytest.mark.parametrize(
  ('rule', 'want'),
  [
    (None, 1),
    (2048 * 114, 2048 * 114),
    ('NUM_REAL_TARGET_TOKENS', 14),
    ('num_real_target_tokens', 14),
    ('NUM_TOTAL_TARGET_TOKENS', 16),
    ('AVERAGE_PER_SEQUENCE', 3),
  ],
)
def test_normalizing_rules(rule, want):
  weights, normalizer = losses.loss_weights_and_normalizer(PACKED, rule)
  assert float(normalizer) == pytest.approx(want)
  if rule != 'AVERAGE_PER_SEQUENCE':
    np.testing.assert_array_equal(weights, PACKED['decoder_loss_weights'])


@pytest.mark.parametrize('batch', [PACKED, UNPACKED])
def test_average_per_sequence_weighs_examples_alike(batch):
  weights, normalizer = losses.loss_weights_and_normalizer(batch, 'AVERAGE_PER_SEQUENCE')
  thirds, fifths, sixths = 1 / 3, 1 / 5, 1 / 6
  want = [thirds] * 3 + [fifths] * 5 + [sixths] * 6
  np.testing.assert_allclose(weights[weights > 0], want, rtol=1e-6)
  np.testing.assert_allclose(normalizer, 3, rtol=1e-6)


def test_average_per_sequence_with_weights_of_an_example_all_zero():
  # T5X divides by 0 there and repairs the NaN after; so must this.
  batch = dict(PACKED)
  batch['decoder_loss_weights'] = PACKED['decoder_loss_weights'] * (
    PACKED['decoder_segment_ids'] != 2
  )
  weights, normalizer = losses.loss_weights_and_normalizer(batch, 'AVERAGE_PER_SEQUENCE')
  assert np.all(np.isfinite(weights))
  np.testing.assert_allclose(normalizer, 2, rtol=1e-6)


def test_a_batch_of_padding_has_loss_zero():
  batch = {k: np.zeros_like(v) for k, v in PACKED.items()}
  for rule in (None, *losses.NORMALIZING_RULES):
    weights, normalizer = losses.loss_weights_and_normalizer(batch, rule)
    assert float(normalizer) > 0 and not np.any(weights)


def test_without_weights_real_tokens_count():
  unpacked = {'decoder_target_tokens': UNPACKED['decoder_target_tokens']}
  weights, _ = losses.loss_weights_and_normalizer(unpacked, None)
  np.testing.assert_array_equal(weights, UNPACKED['decoder_loss_weights'])
  # Packed, id 0 may be a token; the segment says what is real.
  packed = {k: v for k, v in PACKED.items() if 'weights' not in k}
  packed['decoder_target_tokens'] = np.zeros_like(PACKED['decoder_positions'])
  weights, _ = losses.loss_weights_and_normalizer(packed, None)
  np.testing.assert_array_equal(weights, PACKED['decoder_loss_weights'])


@pytest.mark.parametrize('rule', [None, 100.0, *losses.NORMALIZING_RULES])
def test_microbatches_add_up_to_the_whole_batch(rule):
  # T5X normalises each microbatch, so its loss depends on their number
  # (t5x/trainer.py accumulate_grads_microbatched).
  logits, targets, weights = draw()
  weights[0] = 0  # one microbatch without a single token
  batch = {'decoder_target_tokens': targets, 'decoder_loss_weights': weights.astype(np.float32)}
  weights, normalizer = losses.loss_weights_and_normalizer(batch, rule)

  def loss(x, targets, weights):
    return losses.loss_sums(x, targets, weights)['loss'] / normalizer

  x = jnp.asarray(logits, jnp.float32)
  whole, grad = jax.value_and_grad(loss)(x, targets, weights)
  parts = [
    jax.value_and_grad(loss)(x[i : i + 1], targets[i : i + 1], weights[i : i + 1]) for i in range(B)
  ]
  np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-6)
  np.testing.assert_allclose(jnp.concatenate([p[1] for p in parts]), grad, rtol=1e-6, atol=1e-9)


# ---- Chunks ----


def head_problem(seed=0):
  _, targets, weights = draw(seed)
  rng = np.random.default_rng(seed + 1)
  hidden = jnp.asarray(rng.standard_normal((B, L, D)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
  return hidden, kernel, jnp.asarray(targets), jnp.asarray(weights, jnp.float32)


def head_loss(kernel, hidden, targets, weights, chunk):
  def project(h):
    return (h * 0.5) @ kernel

  kwargs = {'z_loss': 1e-2, 'label_smoothing': 0.1}
  if chunk is None:
    sums = losses.loss_sums(project(hidden), targets, weights, **kwargs)
  else:
    sums = losses.chunked_cross_entropy(project, hidden, targets, weights, chunk=chunk, **kwargs)
  return sums['loss'] / 7, sums


@pytest.mark.parametrize('chunk', [1, 2, 4, 6, 100])
def test_chunked_is_unchunked(chunk):
  hidden, kernel, targets, weights = head_problem()
  grad_fn = jax.jit(jax.value_and_grad(head_loss, (0, 1), has_aux=True), static_argnums=4)
  (_, want), want_grads = grad_fn(kernel, hidden, targets, weights, None)
  (_, got), got_grads = grad_fn(kernel, hidden, targets, weights, chunk)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)
  for g, w in zip(got_grads, want_grads, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-7)
  # And where nothing is differentiated, as in evaluation.
  _, plain = head_loss(kernel, hidden, targets, weights, chunk)
  np.testing.assert_allclose(plain['loss'], want['loss'], rtol=1e-6)


def test_chunked_gradient_keeps_dtypes():
  hidden, kernel, targets, weights = head_problem()
  grads = jax.grad(lambda k, h: head_loss(k, h, targets, weights, 2)[0], (0, 1))(
    kernel.astype(jnp.bfloat16), hidden.astype(jnp.bfloat16)
  )
  assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]


def test_chunked_never_holds_all_logits():
  batch, length, dim, vocab = 4, 64, 8, 512
  shapes = [
    jax.ShapeDtypeStruct((dim, vocab), jnp.float32),
    jax.ShapeDtypeStruct((batch, length, dim), jnp.float32),
    jax.ShapeDtypeStruct((batch, length), jnp.int32),
    jax.ShapeDtypeStruct((batch, length), jnp.float32),
  ]

  def temporaries(chunk):
    step = jax.jit(jax.grad(lambda *a: head_loss(*a, chunk)[0], (0, 1)))
    compiled = step.lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * batch * length * vocab
  assert temporaries(None) >= logits
  assert temporaries(4) < logits / 3


@pytest.mark.parametrize('chunk', [None, 3])
def test_sharded_vocabulary_and_batch(chunk):
  vocab = 64
  rng = np.random.default_rng(0)
  arrays = (
    jnp.asarray(rng.standard_normal((D, vocab)), jnp.float32),
    jnp.asarray(rng.standard_normal((8, L, D)), jnp.float32),
    jnp.asarray(rng.integers(0, vocab, (8, L))),
    jnp.asarray(rng.uniform(size=(8, L)), jnp.float32),
  )
  mesh = jax.make_mesh((2, 4), ('data', 'model'), (AxisType.Auto,) * 2)
  specs = (P(None, 'model'), P('data'), P('data'), P('data'))
  sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]

  @jax.jit
  def step(*args):
    return jax.value_and_grad(lambda *a: head_loss(*a, chunk), (0, 1), has_aux=True)(*args)

  (_, want), want_grads = step(*arrays)
  (_, got), got_grads = step(*sharded)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
  for g, w in zip(got_grads, want_grads, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
  # Logits stay cut over the vocabulary: nothing of their size is gathered.
  text = step.lower(*sharded).compile().as_text()
  positions = L if chunk is None else chunk
  assert f'{positions},{vocab // 4}]' in text
  assert f'{positions},{vocab}]' not in text


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    ({'label_smoothing': 1.0}, 'label_smoothing is 1.0'),
    ({'z_loss': -1.0}, 'z_loss is -1.0'),
    ({'chunk': 0}, 'chunk is 0'),
    ({'loss_normalizing_factor': 'TOKENS'}, 'AVERAGE_PER_SEQUENCE'),
    ({'loss_normalizing_factor': 0}, 'positive number'),
  ],
)
def test_bad_settings(kwargs, match):
  with pytest.raises(UsageError, match=match):
    losses.LossConfig(**kwargs)
