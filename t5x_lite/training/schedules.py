"""Learning-rate schedules: T5X's product of factors, and the modern shapes."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from t5x_lite.errors import UsageError, check_fields, check_one_of

_WARMED_UP = ('linear_warmup', 'linear_decay', 'rsqrt_decay', 'rsqrt_normalized_decay')
FACTORS = ('constant', *_WARMED_UP, 'decay_every', 'cosine_decay')
SHAPES = ('factors', 'constant', 'linear', 'cosine', 'wsd')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """The learning rate as a function of the step, counted from 0.

  Attributes:
    shape: 'factors' for T5X's product, or linear warm-up and then 'constant', 'linear' or 'cosine'
      decay, or 'wsd' (warm-up, stable, decay).
    factors: T5X's factors, joined by '*'; for shape 'factors' only. The default with 10,000 warm-up
      steps is T5's: 0.01, then 1 / sqrt(step).
    base_learning_rate: the peak, or for rsqrt_decay what sqrt(step) divides.
    warmup_steps: length of the warm-up; for rsqrt_decay, steps before decay.
    decay_factor: linear_decay's slope, or what decay_every multiplies by.
    steps_per_decay: for decay_every.
    steps_per_cycle: for cosine_decay.
    step_offset: step at which the schedule starts, such as that of the checkpoint fine-tuned from.
    min_learning_rate: T5X's floor; for shape 'factors' only.
    total_steps: where 'linear', 'cosine' and 'wsd' end, from step_offset; None is the program's.
    decay_steps: for 'wsd', length of the last, falling part.
    final_learning_rate: what the decay of 'linear', 'cosine', 'wsd' ends at.

  Source: t5x/utils.py create_learning_rate_scheduler; Hu et al. 2024 (MiniCPM, arXiv 2404.06395)
  for wsd.
  """

  shape: str = 'factors'
  factors: str = 'constant * rsqrt_decay'
  base_learning_rate: float = 1.0
  warmup_steps: int = 10_000
  decay_factor: float = 0.5
  steps_per_decay: int = 20_000
  steps_per_cycle: int = 100_000
  step_offset: int = 0
  min_learning_rate: float = 1e-8
  total_steps: int | None = None
  decay_steps: int | None = None
  final_learning_rate: float = 0.0

  def __post_init__(self):
    check_one_of('ScheduleConfig.shape', self.shape, SHAPES)
    for name in ('base_learning_rate', 'final_learning_rate', 'min_learning_rate', 'warmup_steps'):
      check_fields(self, **{name: (0 <= getattr(self, name) < math.inf, '0 or more')})
    for name in ('steps_per_decay', 'steps_per_cycle', 'total_steps', 'decay_steps'):
      value = getattr(self, name)
      check_fields(self, **{name: (value is None or value >= 1, 'a positive number')})
    for name in _split(self.factors) if self.shape == 'factors' else ():
      check_one_of('A factor of ScheduleConfig.factors', name, FACTORS)
      if self.warmup_steps < 1 and name in _WARMED_UP:
        what = f'warmup_steps is {self.warmup_steps}; the factors {self.factors!r} need at least 1.'
        raise UsageError(f'ScheduleConfig.{what}')
    if self.shape == 'wsd' and self.decay_steps is None:
      fix = 'set it to the length of the last, falling part.'
      raise UsageError(f"ScheduleConfig.shape is 'wsd' and decay_steps is not set; {fix}")


def _split(factors: str) -> list[str]:
  return [name.strip() for name in factors.split('*')]


def make_schedule(
  config: ScheduleConfig, total_steps: int | None = None
) -> Callable[[ArrayLike], Array]:
  """Returns the learning rate, a float32 scalar, as a function of the step.

  It ends at total_steps if config.total_steps is None. UsageError if the shape needs one of them,
  or its parts are longer.
  """
  if config.shape == 'factors':
    return lambda step: _product(config, _steps(config, step))
  if config.shape == 'constant':
    return lambda step: config.base_learning_rate * _warmup(config, _steps(config, step))

  total = config.total_steps
  if total is None and total_steps is not None:
    total = total_steps - config.step_offset
  if total is None:
    fix = 'set ScheduleConfig.total_steps to the step at which it ends.'
    raise UsageError(f'ScheduleConfig.shape is {config.shape!r} and total_steps is not set; {fix}')
  start = config.warmup_steps
  if config.shape == 'wsd':
    start = total - (config.decay_steps or 0)
  if not config.warmup_steps <= start < total:
    parts = f'{config.warmup_steps} warmup_steps and {config.decay_steps or 0} decay_steps'
    fix = 'together they must be fewer.'
    raise UsageError(f'ScheduleConfig has {parts} in {total} total_steps; {fix}')

  def schedule(step):
    step = _steps(config, step)
    progress = jnp.clip((step - start) / (total - start), 0.0, 1.0)
    left = _half_cosine(progress) if config.shape == 'cosine' else 1 - progress
    fall = config.base_learning_rate - config.final_learning_rate
    return _warmup(config, step) * (config.final_learning_rate + fall * left)

  return schedule


def _steps(config: ScheduleConfig, step: ArrayLike) -> Array:
  return jnp.maximum(jnp.asarray(step, jnp.float32) - config.step_offset, 0.0)


def _warmup(config: ScheduleConfig, step: Array) -> Array:
  """Returns 0 at step 0 (as optax and HF do) and 1 from warmup_steps on."""
  warmup_steps = config.warmup_steps
  return jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else jnp.ones_like(step)


def _half_cosine(progress: Array) -> Array:
  """Returns the fall of the cosine from 1 to 0 while progress goes from 0 to 1."""
  return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _product(config: ScheduleConfig, step: Array) -> Array:
  """Returns the product of T5X's factors, each as T5X has it."""
  c = config
  rate = jnp.ones((), jnp.float32)
  for name in _split(c.factors):
    if name == 'constant':
      rate *= c.base_learning_rate
    elif name == 'linear_warmup':
      rate *= jnp.minimum(1.0, step / c.warmup_steps)
    elif name == 'linear_decay':  # T5X's already holds constant and warm-up
      rate *= c.base_learning_rate * jnp.minimum(
        step / c.warmup_steps, 1 + c.decay_factor * (c.warmup_steps - step)
      )
    elif name in ('rsqrt_decay', 'rsqrt_normalized_decay'):
      rate *= math.sqrt(c.warmup_steps) if name == 'rsqrt_normalized_decay' else 1.0
      rate /= jnp.sqrt(jnp.maximum(step, c.warmup_steps))
    elif name == 'decay_every':
      rate *= c.decay_factor ** jnp.floor(step / c.steps_per_decay)
    elif name == 'cosine_decay':
      progress = jnp.maximum(0.0, (step - c.warmup_steps) / c.steps_per_cycle)
      rate *= jnp.maximum(0.0, _half_cosine(progress % 1.0))
  return jnp.maximum(rate, c.min_learning_rate)
