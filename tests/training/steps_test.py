"""Microbatches, packing and unrolling change nothing; metrics are right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.models import t5
from t5x_lite.training import losses, optimizers, steps, train_state
from tests.models import tiny

LOSS = losses.LossConfig(z_loss=1e-2, label_smoothing=0.1)
KEY = jax.random.key(7)


def setup(cfg, optimizer='sgd'):
  graphdef, shapes, axes = t5.abstract_params(cfg)
  tx = optimizers.make_optimizer(optimizers.OptimizerConfig(name=optimizer), axes, shapes)
  params = tiny.params(cfg)
  if not cfg.scan_layers:
    params = tiny.unstack(tiny.params(cfg.replace(scan_layers=True)), cfg)
  state = train_state.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
  return graphdef, tx, state


def train(cfg, batch, loss=LOSS, optimizer='sgd', lr=0.1, trainable=None, **kwargs):
  _, _, state = setup(cfg, optimizer)
  make = jitted if trainable is None else functools.partial(jitted.__wrapped__, trainable=trainable)
  return make(cfg, loss, optimizer, **kwargs)(state, batch, KEY, lr)


@functools.lru_cache(maxsize=32)
def jitted(cfg, loss, optimizer, **kwargs):
  """One program for all tests that take the same step."""
  graphdef, tx, _ = setup(cfg, optimizer)

  @jax.jit
  def step(state, batch, key, lr):
    return steps.make_train_step(graphdef, tx, lambda s: lr, loss, **kwargs)(state, batch, key)

  return step


def assert_same(a, b, atol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize('rule', ['NUM_REAL_TARGET_TOKENS', 'AVERAGE_PER_SEQUENCE', None])
def test_microbatches_change_nothing(rule):
  """Rows differ in length, so a mean of means would show."""
  loss = dataclasses.replace(LOSS, loss_normalizing_factor=rule)
  cfg, batch = tiny.config(), tiny.batch(B=8)
  lr = 0.1 if rule else 1e-3
  one, metrics = train(cfg, batch, loss, lr=lr)
  four, metrics4 = train(cfg, batch, loss, lr=lr, num_microbatches=4)
  assert_same(one.params, four.params)
  for name in metrics:
    np.testing.assert_allclose(metrics[name], metrics4[name], rtol=1e-4)


def test_packed_loss_and_gradient_are_unpacked():
  cfg, batch = tiny.config(), tiny.batch(B=8)
  packed = tiny.pack(batch, rows=2)
  for rule in ('NUM_REAL_TARGET_TOKENS', 'AVERAGE_PER_SEQUENCE'):
    loss = dataclasses.replace(LOSS, loss_normalizing_factor=rule)
    a, metrics_a = train(cfg, batch, loss)
    b, metrics_b = train(cfg, packed, loss)
    assert_same(a.params, b.params)
    for name in ('loss', 'accuracy', 'target_tokens', 'input_tokens'):
      np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-5)


def test_scanned_update_is_unrolled_update():
  """For Adafactor, whose norms must not span the stacked layers."""
  cfg, batch = tiny.config(num_encoder_layers=1, num_decoder_layers=2), tiny.batch()
  a, _ = train(cfg, batch, optimizer='adafactor')
  b, _ = train(cfg.replace(scan_layers=False), batch, optimizer='adafactor')
  assert_same(tiny.unstack(a.params, cfg), b.params)


def test_a_stack_unrolled_in_the_step_is_the_scanned_one():
  cfg = tiny.config(
    relpos_per_layer=True,
    dropout_rate=0.1,
    remat_policy='minimal',
    share_encoder_decoder=True,
    num_decoder_layers=2,
  )
  batch = tiny.batch()
  a, metrics_a = train(cfg, batch)
  b, metrics_b = train(cfg, batch, unroll=True)
  assert_same(a.params, b.params)
  assert_same(metrics_a, metrics_b, 1e-4)


def test_chunked_loss_is_the_loss():
  cfg, batch = tiny.config(), tiny.batch()
  a, _ = train(cfg, batch)
  b, _ = train(cfg, batch, dataclasses.replace(LOSS, chunk=4))
  assert_same(a.params, b.params)


def test_metrics_by_hand():
  cfg, batch = tiny.config(), tiny.batch()
  loss = losses.LossConfig()
  state, metrics = train(cfg, batch, loss, lr=0.5)
  logits = tiny.apply(cfg, tiny.params(cfg), '__call__', batch)
  targets = batch['decoder_target_tokens']
  real = targets != 0
  log_probs = jax.nn.log_softmax(logits)
  nll = -np.take_along_axis(np.asarray(log_probs), targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(metrics['loss'], nll[real].mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['cross_entropy'], metrics['loss'])
  right = np.asarray(logits.argmax(-1) == targets)[real]
  np.testing.assert_allclose(metrics['accuracy'], right.mean(), rtol=1e-5)
  assert metrics['target_tokens'] == real.sum()
  assert metrics['input_tokens'] == (batch['encoder_input_tokens'] != 0).sum()
  assert metrics['learning_rate'] == 0.5
  assert int(state.step) == 1
  # sgd: the update is the learning rate times the gradient.
  np.testing.assert_allclose(metrics['update_norm'], 0.5 * metrics['grad_norm'], rtol=1e-5)


def test_frozen_parameters_have_no_gradient_and_no_part_in_its_norm():
  cfg, batch = tiny.config(), tiny.batch()
  _, _, state = setup(cfg)
  only = optimizers.OptimizerConfig(name='sgd', trainable='^decoder/')
  mask = optimizers.trainable_mask(only, state.params)
  rate = 0.1
  free, everything = train(cfg, batch, lr=rate)
  frozen, metrics = train(cfg, batch, lr=rate, trainable=mask)

  def moved(new):
    return jax.tree.map(lambda a, b: (a - b) / rate, new.params, state.params)

  expected = jax.tree.map(lambda train, d: d * train, mask, moved(free))
  assert_same(moved(frozen), expected)
  norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(expected)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-4)
  assert metrics['grad_norm'] < everything['grad_norm']


def test_eval_step_has_no_dropout_smoothing_or_z_loss():
  cfg = tiny.config(dropout_rate=0.5)
  graphdef, _, state = setup(cfg)
  batch = tiny.batch()
  sums = jax.jit(steps.make_eval_step(graphdef, LOSS))(state.params, batch)
  _, metrics = train(cfg.replace(dropout_rate=0.0), batch, losses.LossConfig())
  np.testing.assert_allclose(sums['loss'] / sums['weight'], metrics['loss'], rtol=1e-5)


def test_dropout_differs_by_step_and_repeats_by_key():
  cfg = tiny.config(dropout_rate=0.5)
  _, _, state = setup(cfg)
  step, batch = jitted(cfg, LOSS, 'sgd'), tiny.batch()
  _, first = step(state, batch, KEY, 0.0)
  _, again = step(state, batch, KEY, 0.0)
  later = dataclasses.replace(state, step=state.step + 1)
  _, second = step(later, batch, KEY, 0.0)
  assert first['loss'] == again['loss']
  assert first['loss'] != second['loss']


def test_steps_do_not_retrace_for_another_batch():
  cfg = tiny.config()
  graphdef, tx, state = setup(cfg)
  traces = []

  def counted(*args):
    traces.append(1)
    return steps.make_train_step(graphdef, tx, lambda s: 0.1, LOSS)(*args)

  step = jax.jit(counted)
  for seed in range(3):
    state, _ = step(state, tiny.batch(seed=seed), KEY)
  assert len(traces) == 1
  assert nnx.merge(graphdef, state.params).cfg == cfg


def test_updates_that_are_not_finite_can_be_left_out():
  cfg, batch = tiny.config(), tiny.batch()
  graphdef, tx, state = setup(cfg, 'adam')
  good = jax.tree.map(lambda x: x, state.params)
  layers = state.params['encoder']['layers']
  wi = np.array(layers['mlp']['wi_0']['kernel'])
  wi[0, 0, 0] = np.nan
  layers['mlp']['wi_0']['kernel'] = wi
  step = steps.make_train_step(graphdef, tx, lambda s: 0.1, LOSS, skip_nonfinite=True)
  after, metrics = jax.jit(step)(state, batch, KEY)
  assert metrics['skipped'] == 1.0 and int(after.step) == 1
  for old, new in zip(
    jax.tree.leaves((state.params, state.opt_state)),
    jax.tree.leaves((after.params, after.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(old, new)
  # One that is finite is the update as ever.
  plain = steps.make_train_step(graphdef, tx, lambda s: 0.1, LOSS)
  state = train_state.TrainState(state.step, good, tx.init(good))
  after, metrics = jax.jit(step)(state, batch, KEY)
  wanted, _ = jax.jit(plain)(state, batch, KEY)
  assert metrics['skipped'] == 0.0
  assert_same(after.params, wanted.params, atol=0)


def test_norms_of_groups_add_up():
  _, metrics = train(tiny.config(), tiny.batch())
  groups = {k: v for k, v in metrics.items() if k.startswith(steps.GROUP_NORM)}
  assert f'{steps.GROUP_NORM}encoder/layers' in groups and len(groups) > 4
  total = np.sqrt(sum(float(value) ** 2 for value in groups.values()))
  np.testing.assert_allclose(total, metrics['grad_norm'], rtol=1e-5)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_norms_are_float32_whatever_the_parameters(dtype):
  _, metrics = train(tiny.config(param_dtype=dtype, vocab_size=2**17), tiny.batch())
  norms = {k: v for k, v in metrics.items() if k.endswith('_norm') or k.startswith('grad_norm')}
  assert {v.dtype for v in norms.values()} == {np.dtype(np.float32)}
  assert np.isfinite(list(norms.values())).all()  # the embedding alone overflows float16


def test_histograms_count_every_gradient_once():
  rng = np.random.default_rng(0)
  sizes = 10.0 ** rng.uniform(-14, 5, (3, 50))
  grads = {
    'encoder': {'a': jnp.asarray(sizes * rng.choice([-1, 1], sizes.shape), jnp.float32)},
    'decoder': {'b': jnp.zeros(7), 'c': jnp.asarray([[0.02]])},
  }
  found = jax.device_get(jax.jit(steps.group_histograms)(grads))
  clipped = np.clip(np.log10(sizes), -12.4, 3.4)
  expected, _ = np.histogram(clipped, steps.HISTOGRAM_BOUNDS)
  np.testing.assert_array_equal(found['grad_log10/encoder/a'], expected)
  np.testing.assert_array_equal(np.flatnonzero(found['grad_log10/decoder/b']), [0])
  assert found['grad_log10/decoder/b'][0] == 7
  (place,) = np.flatnonzero(found['grad_log10/decoder/c'])
  assert steps.HISTOGRAM_BOUNDS[place : place + 2].tolist() == [-2.0, -1.5]


def test_histograms_are_there_only_when_asked_for_and_change_nothing():
  cfg = tiny.config()
  batch = tiny.batch()
  plain, metrics = train(cfg, batch)
  state, more = train(cfg, batch, histograms=True)
  assert_same(plain, state)
  extra = more.keys() - metrics.keys()
  assert not [name for name in metrics if name.startswith(steps.GROUP_HISTOGRAM)]
  norms = {name.removeprefix(steps.GROUP_NORM) for name in metrics if '/' in name}
  assert {name.removeprefix(steps.GROUP_HISTOGRAM) for name in extra} == norms
  count = sum(x.size for x in jax.tree.leaves(plain.params))
  assert sum(float(more[name].sum()) for name in extra) == count


@pytest.mark.parametrize('settings', [{}, {'num_microbatches': 2, 'chunk': 4}])
def test_losses_of_tasks_are_those_of_their_tokens(settings):
  """Each is what a batch of that task's tokens alone has; the update is the same."""
  settings = dict(settings)
  loss = dataclasses.replace(LOSS, label_smoothing=0.0, chunk=settings.pop('chunk', None))
  cfg, batch = tiny.config(), tiny.batch(B=12)
  batch = {
    **batch,
    'decoder_task_ids': np.arange(12)[:, None] % 3 + 0 * batch['decoder_target_tokens'],
  }
  state, metrics = train(cfg, batch, loss, task_names=('a', 'b', 'c'), **settings)
  plain, plain_metrics = train(cfg, batch, loss, **settings)
  assert_same(state.params, plain.params, atol=0)
  assert set(metrics) - set(plain_metrics) == {
    f'{kind}/{name}' for kind in ('task_loss', 'task_weight') for name in 'abc'
  }
  for number, name in enumerate('abc'):
    alone = {key: value[number::3] for key, value in batch.items()}
    _, want = train(cfg, alone, loss)
    np.testing.assert_allclose(metrics[f'task_weight/{name}'], want['target_tokens'])
    got = metrics[f'task_loss/{name}'] / metrics[f'task_weight/{name}']
    np.testing.assert_allclose(got, want['cross_entropy'], rtol=1e-4)
