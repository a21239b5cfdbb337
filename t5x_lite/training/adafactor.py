"""Adafactor with T5X's semantics on logical axes, as an optax transform.

What is factored, averaged and clipped is a layer's parameter, not the array that holds it: a
stacked [layers, ...] parameter gets exactly the update that each of its layers would get alone.
optax.adafactor knows no logical axes and takes RMS, scale and largest dims over the stack.

Sources: Shazeer and Stern 2018 (arXiv 1804.04235); t5x/adafactor.py.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import DTypeLike

from t5x_lite.errors import UsageError
from t5x_lite.parallel import pytrees

Path = tuple[str, ...]
Axes = tuple[str | None, ...]


class AdafactorState(NamedTuple):
  """Moments in float32, each a nested dict of only the parameters that have it.

  A factored parameter is in v_row and v_col, any other in v. T5X has zeros((1,)) in unused places.
  """

  count: Array  # updates done, an int32 scalar
  m: dict  # momentum, of the parameter's shape; empty without
  v_row: dict  # second moment averaged over the column dims
  v_col: dict  # second moment averaged over the row dims
  v: dict  # second moment, of the parameter's shape


@dataclasses.dataclass(frozen=True)
class Factoring:
  """How one parameter is handled; dims are indices into its shape."""

  averaging_dims: tuple[int, ...]  # of RMS and parameter scale: all but that of a stack's layers
  row_dims: tuple[int, ...] = ()  # empty if it is not factored, as column_dims
  column_dims: tuple[int, ...] = ()

  @property
  def moments(self) -> dict[str, tuple[int, ...]]:
    """The second moments, fields of AdafactorState, and the dims that each of them lacks."""
    return {'v_row': self.column_dims, 'v_col': self.row_dims} if self.row_dims else {'v': ()}


def factoring(
  shape: Sequence[int],
  axes: Axes | None,
  *,
  factored: bool = True,
  min_dim_size_to_factor: int = 128,
) -> Factoring:
  """Returns how a parameter is factored, as T5X does for each of its layers.

  The dim of the layers of a stack set aside, what is left is one layer's parameter. It goes by
  size: of the two largest dims, if both reach min_dim_size_to_factor, the larger is the column
  (T5X's heuristic, adafactor.py:384).

  T5X itself goes by a table of logical axes for every stacked parameter, and so factors small ones,
  which it does not for the same layers unstacked. Here both forms give the same update. Axes of
  None mean no stack; the rest is as in `adafactor`.
  """
  dims = tuple(i for i in range(len(shape)) if axes is None or axes[i] != 'layers')
  if not factored or len(dims) < 2:
    return Factoring(dims)
  *_, row, column = sorted(dims, key=lambda i: shape[i])  # ties keep their order
  large = shape[row] >= min_dim_size_to_factor
  return Factoring(dims, (row,), (column,)) if large else Factoring(dims)


def adafactor(
  *,
  axes: Any = None,
  factored: bool = True,
  multiply_by_parameter_scale: bool | Sequence[tuple[str, bool]] = True,
  beta1: float | None = None,
  decay_rate: float = 0.8,
  step_offset: int = 0,
  clipping_threshold: float | None = 1.0,
  weight_decay_rate: float | None = None,
  weight_decay_rate_lr_exponent: float | None = None,
  min_dim_size_to_factor: int = 128,
  epsilon1: float = 1e-30,
  epsilon2: float = 1e-3,
  dtype_momentum: DTypeLike = jnp.float32,
  max_parameter_scale: float | None = None,
  skip_nan_updates: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Returns T5X's Adafactor; parameters + learning_rate * updates is its step.

  For a layer's parameter p and its gradient g at step t = 1, 2, ...:

    beta2 = 1 - (t - step_offset)^-decay_rate
    v     = beta2 v + (1 - beta2) (g^2 + epsilon1), kept as the means of its
            rows and columns and used as their outer product over the mean
    u     = g / sqrt(v);  u = u / max(1, rms(u) / clipping_threshold)
    step  = -learning_rate max(epsilon2, rms(p)) u

  Only if `factored`, and both dims of a matrix reach min_dim_size_to_factor, v is kept as means.
  Stacked parameters need `axes`, a tree of tuples of logical axes. multiply_by_parameter_scale:
  whether the step is relative to rms(p), at most max_parameter_scale, for all parameters or by
  (regular expression searched in 'a/b/c', bool) pairs, of which the first that matches counts.
  step_offset restarts the second moments at fine-tuning; clipping_threshold=None does not clip.
  beta1 is the momentum of the steps, kept in dtype_momentum; None for none and no memory for it.
  weight_decay_rate: p is also multiplied by 1 - weight_decay_rate, whatever the learning rate; with
  weight_decay_rate_lr_exponent the rate (1 if None) is times learning_rate to this power.
  skip_nan_updates: an element whose update or moment turns NaN keeps its old value.

  The transform's update needs params, and the extra argument learning_rate with momentum or weight
  decay, whose terms are not proportional to it.

  Source: t5x/adafactor.py Adafactor, arguments and defaults too, but for logical_factor_rules.
  """
  axes_of = {} if axes is None else dict(pytrees.leaves(axes, is_leaf=_is_axes))
  decays = weight_decay_rate is not None or weight_decay_rate_lr_exponent
  needs_rate = beta1 is not None or decays

  def layout_of(path, shape) -> Factoring:
    if axes is not None and path not in axes_of:
      raise UsageError(f'Adafactor was given no logical axes for {"/".join(path)}.')
    how = {'factored': factored, 'min_dim_size_to_factor': min_dim_size_to_factor}
    return factoring(shape, axes_of.get(path), **how)

  def has_scale(path) -> bool:
    whole = multiply_by_parameter_scale
    for pattern, value in [('', whole)] if isinstance(whole, bool) else whole:
      if re.search(pattern, '/'.join(path)):
        return value
    name = f'{"/".join(path)}; end with a (".*", True).'
    raise UsageError(f'No pattern of multiply_by_parameter_scale matches {name}')

  def init(params) -> AdafactorState:
    moments = {}
    for path, p in pytrees.leaves(params):
      moments[path] = {
        field: jnp.zeros(np.delete(p.shape, gone).tolist(), jnp.float32)
        for field, gone in layout_of(path, p.shape).moments.items()
      }
      if beta1 is not None:
        moments[path]['m'] = jnp.zeros(p.shape, dtype_momentum)
    return _state(jnp.zeros((), jnp.int32), moments)

  def update(updates, state, params=None, *, learning_rate=None, **extra_args):
    if params is None or (needs_rate and learning_rate is None):
      extra = ', with momentum or weight decay update(..., learning_rate=...)'
      raise ValueError(f'Adafactor needs update(grads, state, params){extra}.')
    # The caller multiplies by the rate: what is not proportional to it is divided by it, 0 or not.
    rate = jnp.float32(1.0 if learning_rate is None else learning_rate)
    safe_rate = jnp.maximum(rate, jnp.finfo(jnp.float32).tiny)
    step = jnp.asarray(state.count - step_offset, jnp.float32)
    beta2 = 1.0 - (step + 1.0) ** -decay_rate
    moments = _by_path(state)
    new_moments: dict[Path, dict[str, Array]] = {}

    def update_one(path, g, p):
      layout = layout_of(path, p.shape)
      g, p = g.astype(jnp.float32), p.astype(jnp.float32)
      old = moments[path]
      # The gradient's norm, taken elsewhere, squares it too.
      first = _again(g)
      new, factors = _second_moment(first, layout, old, beta2, epsilon1)
      u = math.prod(factors, start=g)
      if clipping_threshold is not None:
        again = math.prod(map(_again, factors), start=_again(_again(first)))
        u /= jnp.maximum(1.0, _rms(again, layout) / clipping_threshold)
      if has_scale(path):
        scale = jnp.maximum(_rms(p, layout), epsilon2)
        if max_parameter_scale is not None:
          scale = jnp.minimum(scale, max_parameter_scale)
        u *= scale
      if beta1 is not None:
        m = beta1 * old['m'].astype(jnp.float32) + (1 - beta1) * rate * u
        new['m'] = m.astype(dtype_momentum)
        u = m / safe_rate
      if decays:
        decay = 1.0 if weight_decay_rate is None else weight_decay_rate
        if weight_decay_rate_lr_exponent:
          decay *= rate**weight_decay_rate_lr_exponent
        u += decay / safe_rate * p
      if skip_nan_updates:
        u = jnp.where(jnp.isnan(u), 0.0, u)
        new = {k: jnp.where(jnp.isnan(x), old[k], x) for k, x in new.items()}
      new_moments[path] = new
      return -u

    steps = jax.tree_util.tree_map_with_path(
      lambda path, g, p: update_one(pytrees.names_of(path), g, p), updates, params
    )
    return steps, _state(state.count + 1, new_moments)

  return optax.GradientTransformationExtraArgs(init, update)


def _second_moment(
  g: Array, layout: Factoring, old: Mapping[str, Array], beta2: Array, epsilon1: float
) -> tuple[dict[str, Array], tuple[Array, ...]]:
  """Returns the new moment and factors whose product is its inverse root."""
  if not layout.row_dims:
    v = beta2 * old['v'] + (1 - beta2) * (g * g + epsilon1)
    return {'v': v}, (v**-0.5,)
  row_mean = jnp.mean(g * g, axis=layout.column_dims) + epsilon1
  g = _again(g)
  column_mean = jnp.mean(g * g, axis=layout.row_dims) + epsilon1
  v_row = beta2 * old['v_row'] + (1 - beta2) * row_mean
  v_col = beta2 * old['v_col'] + (1 - beta2) * column_mean
  row = jnp.expand_dims(v_row, layout.column_dims)
  column = jnp.expand_dims(v_col, layout.row_dims)
  # Two roots, as in T5X: the product of the moments could underflow.
  row /= jnp.mean(row, axis=layout.row_dims, keepdims=True)
  return {'v_row': v_row, 'v_col': v_col}, (row**-0.5, column**-0.5)


def _again(x: Array) -> Array:
  """Returns x, which XLA:CPU takes for another value.

  What several reductions share, such as g * g, it writes to memory once and reads often; made anew
  in each it costs nothing. This halves the update's time. XLA:TPU joins such reductions itself.
  """
  return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _rms(x: Array, layout: Factoring) -> Array:
  """Returns each layer's root mean square, as dims of size 1."""
  return jnp.sqrt(jnp.mean(x * x, axis=layout.averaging_dims, keepdims=True))


def scale_by_parameter_rms(
  *, axes: Any = None, epsilon2: float = 1e-3
) -> optax.GradientTransformation:
  """Returns updates times Adafactor's parameter scale max(epsilon2, rms(p)), layer by layer."""
  axes_of = {} if axes is None else dict(pytrees.leaves(axes, is_leaf=_is_axes))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('The parameter scale needs update(grads, state, params).')

    def scale(path, u, p):
      layout = factoring(p.shape, axes_of.get(pytrees.names_of(path)), factored=False)
      return u * jnp.maximum(_rms(p.astype(jnp.float32), layout), epsilon2)

    return jax.tree_util.tree_map_with_path(scale, updates, params), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def _is_axes(x: Any) -> bool:
  return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def _by_path(state: AdafactorState) -> dict[Path, dict[str, Array]]:
  """Returns {path of parameter: {field: moment}}."""
  result: dict[Path, dict[str, Array]] = {}
  for field in AdafactorState._fields[1:]:
    for path, moment in pytrees.leaves(getattr(state, field)):
      result.setdefault(path, {})[field] = moment
  return result


def _state(count: Array, moments: Mapping[Path, Mapping[str, Array]]) -> AdafactorState:
  """Returns the state with each field a nested dict; undoes _by_path."""
  fields = {
    field: pytrees.nested((path, own[field]) for path, own in moments.items() if field in own)
    for field in AdafactorState._fields[1:]
  }
  return AdafactorState(count=count, **fields)
