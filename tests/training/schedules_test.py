import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.training.schedules import ScheduleConfig, make_schedule


def rate(step, program_steps=None, **kwargs):
  return float(make_schedule(ScheduleConfig(**kwargs), program_steps)(step))


def test_default_is_t5s_pretraining():
  # t5x/configs/runs/pretrain.gin: 0.01 for 10,000 steps, then 1 / sqrt(step).
  assert rate(0) == pytest.approx(0.01)
  assert rate(9_999) == pytest.approx(0.01)
  assert rate(40_000) == pytest.approx(1 / 200)
  assert rate(1_000_000) == pytest.approx(1e-3)


@pytest.mark.parametrize(
  ('kwargs', 'want'),
  [
    ({'factors': 'constant'}, lambda s: 0.5),
    (
      {'factors': 'constant * linear_warmup * rsqrt_decay'},
      lambda s: 0.5 * min(1, s / 10) / math.sqrt(max(s, 10)),
    ),
    ({'factors': 'constant*rsqrt_normalized_decay'}, lambda s: 0.5 / math.sqrt(max(s / 10, 1))),
    (
      {'factors': 'linear_decay', 'decay_factor': 0.02},
      lambda s: 0.5 * min(s / 10, 1 + 0.02 * (10 - s)),
    ),
    (
      {'factors': 'constant * decay_every', 'steps_per_decay': 7, 'decay_factor': 0.3},
      lambda s: 0.5 * 0.3 ** (s // 7),
    ),
    (
      {'factors': 'constant * cosine_decay', 'steps_per_cycle': 20},
      lambda s: 0.5 * 0.5 * (1 + math.cos(math.pi * (max(0, (s - 10) / 20) % 1))),
    ),
  ],
)
@pytest.mark.parametrize('step_offset', [0, 5])
def test_factors_are_t5xs(kwargs, want, step_offset):
  # Formulas of t5x/utils.py create_learning_rate_scheduler, floor included.
  kwargs = {'base_learning_rate': 0.5, 'warmup_steps': 10, 'step_offset': step_offset, **kwargs}
  for step in range(0, 70, 3):
    s = max(0, step - step_offset)
    assert rate(step, **kwargs) == pytest.approx(max(want(s), 1e-8), rel=1e-5), step


def test_modern_shapes_are_optaxs():
  kwargs = {'base_learning_rate': 0.3, 'warmup_steps': 10, 'total_steps': 50}
  up = optax.linear_schedule(0.0, 0.3, 10)
  cases = {
    'constant': optax.join_schedules([up, optax.constant_schedule(0.3)], [10]),
    'linear': optax.join_schedules([up, optax.linear_schedule(0.3, 0.1, 40)], [10]),
    'cosine': optax.warmup_cosine_decay_schedule(0.0, 0.3, 10, 50, 0.1),
    'wsd': optax.join_schedules(
      [up, optax.constant_schedule(0.3), optax.linear_schedule(0.3, 0.1, 15)], [10, 35]
    ),
  }
  for shape, want in cases.items():
    for step in range(60):
      got = rate(step, shape=shape, final_learning_rate=0.1, decay_steps=15, **kwargs)
      assert got == pytest.approx(float(want(step)), rel=1e-5), (shape, step)


def test_no_warmup_starts_at_the_peak():
  kwargs = {'base_learning_rate': 0.3, 'warmup_steps': 0, 'total_steps': 10}
  for shape in ('constant', 'linear', 'cosine'):
    assert rate(0, shape=shape, **kwargs) == pytest.approx(0.3)
  assert rate(10, shape='linear', **kwargs) == 0


def test_total_steps_come_from_the_program_unless_set():
  kwargs = {'shape': 'linear', 'base_learning_rate': 1.0, 'warmup_steps': 0}
  assert rate(50, 100, **kwargs) == pytest.approx(0.5)
  assert rate(50, 100, total_steps=200, **kwargs) == pytest.approx(0.75)
  # The program counts from 0, the schedule from step_offset.
  assert rate(150, 200, step_offset=100, **kwargs) == pytest.approx(0.5)


def test_runs_under_jit_in_float32():
  for shape in ('factors', 'constant', 'linear', 'cosine', 'wsd'):
    schedule = make_schedule(ScheduleConfig(shape=shape, warmup_steps=5, decay_steps=5), 20)
    got = jax.jit(schedule)(jnp.int32(7))
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, schedule(7), rtol=1e-6)


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    ({'shape': 'cosin'}, 'did you mean cosine'),
    ({'factors': 'constant * rsqt_decay'}, 'did you mean rsqrt_decay'),
    ({'base_learning_rate': -1.0}, 'base_learning_rate is -1.0'),
    ({'base_learning_rate': math.nan}, 'base_learning_rate is nan'),
    ({'warmup_steps': 0}, 'need at least 1'),
    ({'steps_per_decay': 0}, 'steps_per_decay is 0'),
    ({'shape': 'wsd'}, 'decay_steps is not set'),
    ({'shape': 'linear'}, 'total_steps is not set'),
    ({'shape': 'linear', 'warmup_steps': 9, 'total_steps': 9}, 'must be fewer'),
  ],
)
def test_bad_settings(kwargs, match):
  with pytest.raises(UsageError, match=match):
    make_schedule(ScheduleConfig(**kwargs))
