"""Optimizers by name: optax transforms giving updates at learning rate 1.

The step multiplies them by the one learning rate that it also logs. What an optimizer keeps beside
the parameters gets logical axes here, so that it is sharded by the same rules.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_lite.errors import UsageError, check_fields, check_one_of, refusing
from t5x_lite.models import transfer
from t5x_lite.parallel import pytrees
from t5x_lite.training import adafactor as adafactor_lib
from t5x_lite.training.schedules import ScheduleConfig

# Optax's optimizers whose step is proportional to the learning rate of the same step alone, as
# "updates at learning rate 1" needs; a test checks each.
_PROPORTIONAL = (
  'adabelief adadelta adagrad adam adamax adamaxw adamw adan amsgrad lamb lion nadam nadamw '
  'novograd optimistic_gradient_descent radam rmsprop sgd sign_sgd signum sm3 yogi'
).split()
# Those that keep the learning rate inside, such as in their momentum.
_RATE_INSIDE = ('fromage', 'lars')
# optax's adafactor and what needs the loss's value are not among them.
OPTIMIZERS = ('adafactor', 'adamw_scale', *_PROPORTIONAL, *_RATE_INSIDE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """How parameters are updated.

  Attributes:
    name: 'adafactor' (T5X's), 'adamw', 'adamw_scale', 'sgd', 'lion', ...: one of OPTIMIZERS.
    schedule: the learning rate.
    weight_decay: decoupled, times the learning rate (AdamW's). Adafactor's own, independent of the
      learning rate, is kwargs weight_decay_rate.
    weight_decay_exclude: regular expression searched in 'a/b/c' parameter paths; what it matches is
      not decayed. Norms and relative position biases by default.
    global_norm_clip: gradients' largest global norm, or None.
    trainable: regular expression searched in parameter paths; what it does not match is frozen: no
      update, no optimizer state, no part in the global norm. None trains all; of a model with LoRA,
      adapters or a prompt, those, and with adapters the norms.
    unfreeze_every: updates after which one more layer trains, from the top down; see
      `unfreeze_gradually`. None trains all from the start.
    b1: the optimizer's momentum, if not its default (Adafactor's beta1).
    b2: the optimizer's second-moment decay, if not its default.
    eps: the optimizer's epsilon, if not its default.
    master_weights: keep float32 copies of the parameters and update those; for T5Config.param_dtype
      'bfloat16'.
    kwargs: any other arguments of the optimizer, by its own names.
  """

  name: str = 'adafactor'
  schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
  weight_decay: float = 0.0
  weight_decay_exclude: str = r'(^|/)(scale|bias|rel_embedding)$'
  global_norm_clip: float | None = None
  trainable: str | None = None
  unfreeze_every: int | None = None
  b1: float | None = None
  b2: float | None = None
  eps: float | None = None
  master_weights: bool = False
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    check_one_of('OptimizerConfig.name', self.name, OPTIMIZERS)
    clip, every = self.global_norm_clip, self.unfreeze_every
    check_fields(
      self,
      weight_decay=(0 <= self.weight_decay < math.inf, '0 or more'),
      global_norm_clip=(clip is None or clip > 0, 'positive, or None for no clipping'),
      unfreeze_every=(every is None or every >= 1, 'a number of steps, from 1, or None'),
    )
    for name in ('trainable', 'weight_decay_exclude'):
      what = f'is {getattr(self, name)!r}, which is no regular expression'
      with refusing(f'OptimizerConfig.{name} {what}', re.error):
        re.compile(getattr(self, name) or '')
    _arguments(self)


def _factory(name: str) -> Callable[..., optax.GradientTransformation]:
  own = {'adafactor': adafactor_lib.adafactor, 'adamw_scale': adamw_scale}
  return own[name] if name in own else getattr(optax, name)


def _arguments(config: OptimizerConfig) -> dict[str, Any]:
  """Returns the keyword arguments of the optimizer's factory, checked."""
  accepted = set(inspect.signature(_factory(config.name)).parameters)
  # These are set by other fields, or not at all.
  accepted -= {'axes', 'learning_rate', 'mask', 'weight_decay', 'weight_decay_mask'}
  arguments = {}
  for field in ('b1', 'b2', 'eps'):
    if (value := getattr(config, field)) is not None:
      most, allowed = (math.inf, 'at least 0') if field == 'eps' else (1, 'at least 0, less than 1')
      check_fields(config, **{field: (0 <= value < most, allowed)})
      arguments['beta1' if (config.name, field) == ('adafactor', 'b1') else field] = value
  arguments |= config.kwargs
  for name in arguments:
    check_one_of(f'An argument of {config.name} in OptimizerConfig', name, accepted)
  return arguments


def make_optimizer(
  config: OptimizerConfig, axes: Any, params: Any
) -> optax.GradientTransformationExtraArgs:
  """Returns a transform whose updates are for learning rate 1, already negated.

  The step is params + learning_rate * updates, with updates, state = tx.update(grads, state,
  params, learning_rate=learning_rate); the extra argument serves what is not proportional to the
  learning rate. For params and axes see `opt_state_axes`, for a UsageError `trainable_mask`.
  """
  # Named: where the optimizer's state lies in a checkpoint must not depend on what is before it.
  parts: dict[str, optax.GradientTransformation] = {}
  if config.global_norm_clip is not None:
    parts['clip'] = optax.clip_by_global_norm(config.global_norm_clip)

  def decayed(tree):
    excluded = config.weight_decay_exclude
    return _map_paths(lambda name: not (excluded and re.search(excluded, name)), tree)

  factory = _factory(config.name)
  accepted = inspect.signature(factory).parameters
  arguments = _arguments(config)
  if 'axes' in accepted:
    arguments['axes'] = axes
  if 'learning_rate' in accepted and config.name not in _RATE_INSIDE:
    arguments['learning_rate'] = 1.0
  mask = next((n for n in ('mask', 'weight_decay_mask') if n in accepted), None)
  native_decay = 'weight_decay' in accepted and mask is not None
  if native_decay:
    # Even where it is 0: optax's own defaults are not.
    arguments |= {'weight_decay': config.weight_decay, mask: decayed}
  make = functools.partial(factory, **arguments)
  parts['optimizer'] = _per_unit_rate(make) if config.name in _RATE_INSIDE else make()
  if config.weight_decay and not native_decay:
    parts['weight_decay'] = optax.add_decayed_weights(-config.weight_decay, decayed)
  tx = optax.named_chain(*parts.items())
  if config.master_weights:
    tx = master_weights(tx)
  mask = trainable_mask(config, params)
  if mask is not None:
    labels = jax.tree.map(lambda trained: 'trained' if trained else 'frozen', mask)
    tx = optax.partition({'trained': tx, 'frozen': optax.set_to_zero()}, labels)
  if config.unfreeze_every is not None:
    state_axes = opt_state_axes(tx, params, axes)
    tx = unfreeze_gradually(tx, config.unfreeze_every, params, axes, state_axes)
  return tx


def _per_unit_rate(
  make: Callable[..., optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """Returns make(learning_rate=...) as updates divided by the learning rate."""

  def update(updates, state, params=None, *, learning_rate=None, **extra_args):
    if learning_rate is None:
      raise ValueError('This optimizer needs update(..., learning_rate=...).')
    # A rate of 0 must not divide 0 by 0: the caller multiplies by it again.
    rate = jnp.maximum(learning_rate, jnp.finfo(jnp.float32).tiny)
    updates, state = make(learning_rate=rate).update(updates, state, params)
    return jax.tree.map(lambda u: u / rate, updates), state

  return optax.GradientTransformationExtraArgs(make(learning_rate=1.0).init, update)


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` applied to float32 copies of parameters, of which bfloat16 ones lose no update.

  The updates that come out lead from the parameters to the rounded copies, whatever `learning_rate`
  they will be multiplied by, which update needs as an extra argument.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    master = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return {'master': master, 'inner': inner.init(master)}

  def update(updates, state, params=None, *, learning_rate=None, **extra_args):
    if params is None or learning_rate is None:
      raise ValueError('master_weights needs update(grads, state, params, learning_rate=...).')
    rate = jnp.float32(learning_rate)
    safe_rate = jnp.maximum(rate, jnp.finfo(jnp.float32).tiny)
    updates = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    old = state['master']
    steps, new = inner.update(updates, state['inner'], old, learning_rate=rate, **extra_args)
    master = jax.tree.map(lambda m, u: m + rate * u, old, steps)
    # From each parameter to its copy: added, it rounds as the copy does. At rate 0 nothing moved.
    result = jax.tree.map(
      lambda m, p: jnp.where(rate > 0, (m - p.astype(jnp.float32)) / safe_rate, 0.0), master, params
    )
    return result, {'master': master, 'inner': new}

  return optax.GradientTransformationExtraArgs(init, update)


def trainable_mask(config: OptimizerConfig, params: Any) -> Any:
  """Returns params' tree with True where config trains, None if all; UsageError if nowhere."""
  names = list(pytrees.flatten_names(params))
  pattern = config.trainable
  if pattern is None and (pattern := transfer.trained_pattern(names)) is None:
    return None
  mask = _map_paths(lambda name: bool(re.search(pattern, name)), params)
  if not any(jax.tree.leaves(mask)):
    there = f'the {len(names)} parameters, such as {", ".join(names[:3])}.'
    raise UsageError(f'OptimizerConfig.trainable is {pattern!r}, which matches none of {there}')
  return mask


def _map_paths(fn: Callable[[str], Any], tree: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: fn(pytrees.path_name(path)), tree)


def adamw_scale(
  learning_rate: float = 1.0,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  epsilon2: float = 1e-3,
  weight_decay: float = 0.0,
  mask: Any = None,
  mu_dtype: Any = None,
  axes: Any = None,
) -> optax.GradientTransformation:
  """Returns nanoT5's AdamW, whose step is relative to the parameter's RMS.

  The learning rate is relative to max(epsilon2, rms(p)), of each layer of a stack; nanoT5 peaks at
  2e-2. The weight decay is decoupled and not scaled by rms(p). All else is as in optax.adamw.

  Source: AdamWScale of nanoT5 (Nawrot 2023, arXiv 2309.02373); RMS: Shazeer and Stern 2018, 8.
  """
  return optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype),
    adafactor_lib.scale_by_parameter_rms(axes=axes, epsilon2=epsilon2),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale(-learning_rate),
  )


def opt_state_axes(tx: optax.GradientTransformation, params: Any, axes: Any) -> Any:
  """Returns the logical axes of every array in the state of any optax transform.

  A leaf belongs to the parameter whose path its own path ends with. One of the parameter's shape
  has the parameter's axes; a factored second moment those that are left; one with dims added in
  front has None for those; anything else, and what belongs to no parameter, such as a count, is
  replicated: it has None for each dim. Params may be shapes; axes are params' tree with tuples of
  names. The state has tuples too: map over it first, jax.tree.map(fn, state, opt_state_axes(...)).
  """
  found = pytrees.leaves_with_axes(params, axes)
  known = {path: (leaf.shape, names) for path, leaf, names in found}

  def find(path, leaf) -> adafactor_lib.Axes:
    path = pytrees.names_of(path)
    start = next((i for i in range(len(path)) if path[i:] in known), None)
    if start is None:
      return (None,) * leaf.ndim
    shape, names = known[path[start:]]
    added = leaf.ndim - len(shape)
    if added >= 0 and leaf.shape[added:] == shape:
      return (None,) * added + names
    if start and path[start - 1] in ('v_row', 'v_col'):
      layout = adafactor_lib.factoring(shape, names, min_dim_size_to_factor=0)
      gone = layout.moments.get(path[start - 1], ())
      dims = [i for i in range(len(shape)) if i not in gone]
      if leaf.shape == tuple(shape[i] for i in dims):
        return tuple(names[i] for i in dims)
    return (None,) * leaf.ndim

  return jax.tree_util.tree_map_with_path(find, jax.eval_shape(tx.init, params))


def unfreeze_gradually(
  tx: optax.GradientTransformation, every: int, params: Any, axes: Any, state_axes: Any
) -> optax.GradientTransformationExtraArgs:
  """Returns tx for layers that are trained: from the top down, one more after `every` updates.

  A stack's shared position bias belongs to its first layer, as in Mesh TensorFlow's variables;
  embedding, head and final norms train from the start. The others get no update at all.

  Gradients of frozen layers are 0 for tx, in the global norm too, but are computed: one compiled
  step serves for all of training. Axes are logical ones, of parameters and of all that tx keeps.

  Source: Raffel et al. 2020, section 3.5.1 (every 2^18 / 12 of 2^18 steps).
  """
  tx = optax.with_extra_args_support(tx)
  depths = _stack_depths(params, axes)

  def init(params):
    return {'count': jnp.zeros((), jnp.int32), 'inner': tx.init(params)}

  def update(updates, state, params=None, **extra_args):
    opened = state['count'] // every + 1

    def choose(path, new, old, names):
      needed = _layers_needed(pytrees.names_of(path), names, depths)
      return new if needed is None else jnp.where(opened >= needed, new, old)

    def masked(tree):
      zeros = jax.tree.map(jnp.zeros_like, tree)
      return jax.tree_util.tree_map_with_path(choose, tree, zeros, axes)

    old = state['inner']
    updates, inner = tx.update(masked(updates), old, params, **extra_args)
    # Made for all at the start: a frozen layer's stays so; that of none, a count, goes on.
    inner = jax.tree_util.tree_map_with_path(choose, inner, old, state_axes)
    return masked(updates), {'count': state['count'] + 1, 'inner': inner}

  return optax.GradientTransformationExtraArgs(init, update)


def _stack_depths(params: Any, axes: Any) -> dict[str, int]:
  depths: dict[str, int] = {}
  for (side, *rest), leaf, names in pytrees.leaves_with_axes(params, axes):
    if rest[0] != 'layers':
      continue
    count = leaf.shape[names.index('layers')] if 'layers' in names else int(rest[1]) + 1
    depths[side] = max(count, depths.get(side, 0))
  return depths


def _layers_needed(path, names, depths: dict[str, int]) -> np.ndarray | int | None:
  """Returns how many layers train when this one does, or each of a stack; None for no layer."""
  for i, side in enumerate(path[:-1]):
    if side not in depths:
      continue
    if path[i + 1] == 'relpos_bias':
      return depths[side]
    if path[i + 1] == 'layers':
      if 'layers' in names:
        shape = [-1 if name == 'layers' else 1 for name in names]
        return np.arange(depths[side], 0, -1).reshape(shape)
      if path[i + 2].isdigit():
        return depths[side] - int(path[i + 2])
  return None
