"""Adafactor's second moments, between T5X's state and ours.

Both keep, of a matrix, one mean for each row and one for each column. Which of the two is called
v_row differs: T5X goes by size in an unrolled model and by logical axes in a scanned one, ours
always by the size of one layer's matrix. Here they are called by the dim of the layer's matrix that
they keep.

Sources: t5x/adafactor.py _factored_dims, _parse_rule, init_param_state; t5x_lite/adafactor.py
factoring.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite.interop import t5x, tensor_names
from t5x_lite.interop.tensors import Tensor, of_array
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees
from t5x_lite.training import adafactor, optimizers

# The least dims that are factored, T5X's default and ours.
MIN_DIM = 128
_FIELDS = ('v_row', 'v_col', 'v', 'm')


@dataclasses.dataclass(frozen=True)
class Moment:
  """The second moment of one layer's parameter: whole, or two means of it.

  Attributes:
    whole: of the parameter's shape, or None.
    means: of the shape of its first and of its second dim, or None.
  """

  whole: np.ndarray | None = None
  means: tuple[np.ndarray, np.ndarray] | None = None

  def as_whole(self) -> np.ndarray:
    """Returns the estimate that the update divides by."""
    if self.whole is not None:
      return self.whole
    assert self.means is not None
    first, second = self.means
    # A new state is all zeros.
    scale = np.mean(first) or 1.0
    return np.outer(first, second) / scale

  def as_means(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over columns and over rows."""
    if self.means is not None:
      return self.means
    assert self.whole is not None
    return self.whole.mean(1), self.whole.mean(0)


Moments = Mapping[str, Moment]


def new(cfg: T5Config) -> dict[str, Moment]:
  """Returns the moments of an optimizer that has not seen a gradient."""
  return {
    name: Moment(means=(np.zeros(shape[0], 'f4'), np.zeros(shape[1], 'f4')))
    if _is_factored(shape)
    else Moment(np.zeros(shape, 'f4'))
    for name, shape in tensor_names.shapes(cfg).items()
  }


def _is_factored(shape: Sequence[int]) -> bool:
  return len(shape) == 2 and min(shape) >= MIN_DIM


def _row_dim(shape: Sequence[int]) -> int:
  """Returns the dim that v_row keeps where size decides: the smaller one."""
  return 0 if shape[0] <= shape[1] else 1


# ---- T5X --------------------------------------------------------------------


def _scanned_row_dim(name: str) -> int:
  """Returns the dim that v_row keeps in a scanned model: 'embed'."""
  return 1 if re.search(r'/(out|wo)/kernel$', name) else 0


def _is_scanned_factored(name: str) -> bool:
  """True for matrices whose axes are a row and a column, of any size."""
  return name.endswith('/kernel')


def of_t5x(found: Mapping[str, Tensor], cfg: T5Config) -> dict[str, Moment]:
  """Returns T5X's second moments; empty if the optimizer is another one.

  Args:
    found: by T5X's names, 'state/param_states/...' among them.
    cfg: the model.
  """
  result = {}
  for name, shape in tensor_names.shapes(cfg).items():
    moment = _of_t5x_unrolled(found, tensor_names.t5x_name(name, cfg), shape)
    moment = moment or _of_t5x_scanned(found, name)
    if moment is None:
      return {}
    result[name] = moment
  return result


def _read(found: Mapping[str, Tensor], name: str) -> dict[str, np.ndarray] | None:
  """Returns the arrays of one parameter that are in use."""
  state = {
    field: found[place]
    for field in _FIELDS
    if (place := f'{t5x.PARAM_STATES}{name}/{field}') in found
  }
  if not {'v_row', 'v_col', 'v'} <= state.keys():
    return None
  return {f: t.read() for f, t in state.items() if t.shape != (1,)}


def _of_t5x_unrolled(found: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Moment | None:
  state = _read(found, name)
  if state is None:
    return None
  if 'v' in state:
    return Moment(state['v'])
  if not {'v_row', 'v_col'} <= state.keys():
    return None
  means = (state['v_row'], state['v_col'])
  return Moment(means=means if _row_dim(shape) == 0 else means[::-1])


def _of_t5x_scanned(found: Mapping[str, Tensor], name: str) -> Moment | None:
  place, layer = tensor_names.t5x_scanned_name(name)
  state = None if layer is None else _read(found, place)
  if state is None:
    return None
  if 'v' in state:
    return Moment(state['v'][:, layer])
  if not {'v_row', 'v_col'} <= state.keys():
    return None
  first, second = state['v_row'], state['v_col']
  if _scanned_row_dim(name):
    first, second = second, first
  # [first dim, layers] and [layers, second dim].
  return Moment(means=(first[:, layer], second[layer]))


def to_t5x(moments: Moments, cfg: T5Config) -> dict[str, Any]:
  """Returns T5X's param_states, a tree of arrays."""
  groups: dict[str, list[str]] = {}
  scanned = cfg.relpos_per_layer
  for name in moments:
    place = tensor_names.t5x_name(name, cfg)
    if scanned:
      place, _ = tensor_names.t5x_scanned_name(name)
    groups.setdefault(place, []).append(name)
  tree: dict[str, Any] = {}
  for place, members in groups.items():
    found = [moments[name] for name in members]
    if scanned and '/layers_' in members[0]:
      state = _stacked_t5x(members[0], found)
    else:
      state = _unrolled_t5x(found[0])
    node = tree
    for key in place.split('/'):
      node = node.setdefault(key, {})
    node.update({f: state.get(f, np.zeros(1, 'f4')) for f in _FIELDS})
  return tree


def _unrolled_t5x(moment: Moment) -> dict[str, np.ndarray]:
  shape = _shape(moment)
  if not _is_factored(shape):
    return {'v': moment.as_whole()}
  means = moment.as_means()
  row, column = means if _row_dim(shape) == 0 else means[::-1]
  return {'v_row': row, 'v_col': column}


def _stacked_t5x(name: str, found: Sequence[Moment]) -> dict[str, np.ndarray]:
  if not _is_scanned_factored(name):
    return {'v': np.stack([m.as_whole() for m in found], 1)}
  first = np.stack([m.as_means()[0] for m in found], 1)
  second = np.stack([m.as_means()[1] for m in found], 0)
  if _scanned_row_dim(name):
    first, second = second, first
  return {'v_row': first, 'v_col': second}


def _shape(moment: Moment) -> tuple[int, ...]:
  if moment.whole is not None:
    return moment.whole.shape
  assert moment.means is not None
  return (moment.means[0].size, moment.means[1].size)


# ---- Ours -------------------------------------------------------------------


def of_run(stored: Mapping[str, Tensor], cfg: T5Config) -> dict[str, Moment]:
  """Returns a run's second moments; empty if its optimizer is another one.

  Args:
    stored: by Orbax's names, 'opt_state....' among them.
    cfg: the model.
  """
  fields: dict[tuple[str, str], Tensor] = {}
  for name, tensor in stored.items():
    match = re.fullmatch(
      r'opt_state\.(?:.+\.)?(v_row|v_col|v)\.'
      r'((?:token_embedder|encoder|decoder)\..+)',
      name,
    )
    if match:
      fields[match[1], match[2]] = tensor
  result: dict[str, Moment] = {}
  for path, leaf, axes, found in _leaves(cfg):
    place = '.'.join(path)
    stacked = cfg.scan_layers and 'layers' in path
    if ('v', place) in fields:
      arrays = [fields['v', place].read()]
    elif ('v_row', place) in fields and ('v_col', place) in fields:
      arrays = [fields[f, place].read() for f in ('v_row', 'v_col')]
      layout = adafactor.factoring(leaf.shape, axes)
      if layout.row_dims[0] != int(stacked):
        arrays = arrays[::-1]
    else:
      return {}
    for i, name in enumerate(found):
      parts = [a[i] if stacked else a for a in arrays]
      result[name] = Moment(parts[0]) if len(parts) == 1 else Moment(means=(parts[0], parts[1]))
  return result


def _leaves(cfg: T5Config):
  """Yields (path, shape and dtype, axes, canonical names) of our tree."""
  _, shapes, axes = t5.abstract_params(cfg)
  leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
  for (keys, leaf), one in zip(leaves, treedef.flatten_up_to(axes), strict=True):
    path = pytrees.names_of(keys)
    yield (path, leaf, one, tensor_names.leaf_names(path, tensor_names.num_layers(cfg, path)))


def to_run(moments: Moments, cfg: T5Config, step: int) -> dict[tuple[str, ...], Tensor]:
  """Returns the state of OptimizerConfig()'s Adafactor, by keys.

  Args:
    moments: of every parameter.
    cfg: the model.
    step: updates made so far.
  """
  _, shapes, axes = t5.abstract_params(cfg)
  tx = optimizers.make_optimizer(optimizers.OptimizerConfig(), axes, shapes)
  by_path = {path: found for path, _, _, found in _leaves(cfg)}
  layouts = {path: adafactor.factoring(leaf.shape, one) for path, leaf, one, _ in _leaves(cfg)}

  def value(keys: tuple[str, ...], leaf: Any) -> np.ndarray:
    for start in range(len(keys)):
      path = keys[start:]
      if path not in by_path:
        continue
      stacked = cfg.scan_layers and 'layers' in path
      found = [moments[name] for name in by_path[path]]
      field = keys[start - 1]
      if field == 'v':
        parts = [m.as_whole() for m in found]
      else:
        layout = layouts[path]
        dims = layout.row_dims if field == 'v_row' else layout.column_dims
        parts = [m.as_means()[dims[0] - int(stacked)] for m in found]
      return np.stack(parts) if stacked else parts[0]
    assert keys[-1] == 'count', keys
    return np.asarray(step, leaf.dtype)

  state = pytrees.to_plain(jax.eval_shape(tx.init, shapes))
  result = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    keys = pytrees.names_of(path)
    array = value(keys, leaf).astype(leaf.dtype)
    assert array.shape == leaf.shape, (keys, array.shape, leaf.shape)
    result[keys] = of_array(array, '.'.join(keys))
  return result
