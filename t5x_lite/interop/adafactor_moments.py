"""Adafactor's second moments, between T5X's state and ours.

Both keep, of a matrix, one mean for each row and one for each column. Which of the two is called
v_row differs: T5X goes by size in an unrolled model and by logical axes in a scanned one, ours
always by the size of one layer's matrix. Here they are called by the dim that they keep. Sources:
t5x/adafactor.py _factored_dims, _parse_rule, init_param_state; our adafactor.factoring.
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

_FIELDS = ('v_row', 'v_col', 'v', 'm')


@dataclasses.dataclass(frozen=True)
class Moment:
  """The second moment of one layer's parameter: whole, or two means of it."""

  first: np.ndarray  # of the parameter's shape; with a second, of the size of its first dim
  second: np.ndarray | None = None  # of the size of its second dim

  def as_whole(self) -> np.ndarray:
    """Returns the estimate that the update divides by."""
    if self.second is None:
      return self.first
    return np.outer(self.first, self.second) / (np.mean(self.first) or 1.0)  # new ones are all 0

  def as_means(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over columns and over rows."""
    if self.second is None:
      return self.first.mean(1), self.first.mean(0)
    return self.first, self.second


Moments = Mapping[str, Moment]


def new(cfg: T5Config) -> dict[str, Moment]:
  """Returns the moments of an optimizer that has not seen a gradient."""
  shapes = tensor_names.shapes(cfg).items()
  kept = {name: shape if _factoring(name, cfg).row_dims else [shape] for name, shape in shapes}
  return {name: Moment(*(np.zeros(s, 'f4') for s in kept[name])) for name in kept}


def _factoring(name: str, cfg: T5Config, least: int = 128) -> adafactor.Factoring:
  """Returns how one layer's parameter is factored, by default from T5X's and our least size on."""
  return adafactor.factoring(tensor_names.shapes(cfg)[name], None, min_dim_size_to_factor=least)


def _is_swapped(name: str, shape: Sequence[int], scanned: bool) -> bool:
  """True if T5X's v_row keeps the second dim: 'embed' in a scanned model, else the smaller one."""
  return name.endswith(('/out/kernel', '/wo/kernel')) if scanned else shape[0] > shape[1]


def of_t5x(found: Mapping[str, Tensor], cfg: T5Config) -> dict[str, Moment]:
  """Returns the second moments of T5X's tensors by name; empty if of another optimizer."""
  result = {}
  for name, shape in tensor_names.shapes(cfg).items():
    place, layer = tensor_names.t5x_scanned_name(name)
    unrolled = _read(found, tensor_names.t5x_name(name, cfg))
    scanned = [] if unrolled or layer is None else _read(found, place)
    parts = unrolled or scanned
    if not parts:
      return {}
    if len(parts) == 2 and _is_swapped(name, shape, bool(scanned)):
      parts = parts[::-1]
    if scanned:  # [first dim, layers] and [layers, second dim]
      parts = [parts[0][:, layer], *(second[layer] for second in parts[1:])]
    result[name] = Moment(*parts)
  return result


def _read(found: Mapping[str, Tensor], name: str) -> list[np.ndarray]:
  """Returns what T5X has of a parameter: v, or v_row and v_col, or nothing."""
  states = {field: found.get(f'{t5x.PARAM_STATES}{name}/{field}') for field in _FIELDS[:3]}
  if not all(states.values()):
    return []
  used = {field: state for field, state in states.items() if state and state.shape != (1,)}
  fields = ('v',) if 'v' in used else ('v_row', 'v_col')
  return [used[field].read() for field in fields] if used.keys() >= set(fields) else []


def to_t5x(moments: Moments, cfg: T5Config) -> dict[str, Any]:
  """Returns T5X's param_states, a tree of arrays."""
  leaves, unused = [], np.zeros(1, 'f4')
  for place, names in tensor_names.t5x_arrays(cfg).items():
    found, shape = [moments[name] for name in names], tensor_names.shapes(cfg)[names[0]]
    stacked = cfg.relpos_per_layer and '/layers_' in names[0]
    # A scanned matrix is factored whatever its size.
    if names[0].endswith('/kernel') if stacked else _factoring(names[0], cfg).row_dims:
      firsts, seconds = zip(*(moment.as_means() for moment in found), strict=True)
      means = (np.stack(firsts, 1), np.stack(seconds)) if stacked else (firsts[0], seconds[0])
      means = means[::-1] if _is_swapped(names[0], shape, stacked) else means
      state = dict(zip(('v_row', 'v_col'), means, strict=True))
    else:
      wholes = [moment.as_whole() for moment in found]
      state = {'v': np.stack(wholes, 1) if stacked else wholes[0]}
    leaves += [((*place.split('/'), field), state.get(field, unused)) for field in _FIELDS]
  return pytrees.nested(leaves)


def of_run(stored: Mapping[str, Tensor], cfg: T5Config) -> dict[str, Moment]:
  """Returns the second moments of Orbax's tensors by name; empty if of another optimizer."""
  pattern = r'opt_state\.(?:.+\.)?(v_row|v_col|v)\.((?:token_embedder|encoder|decoder)\..+)'
  matches = {name: re.fullmatch(pattern, name) for name in stored}
  fields = {match.groups(): stored[name] for name, match in matches.items() if match}
  result: dict[str, Moment] = {}
  for path, _, found in tensor_names.leaves(cfg):
    place, stacked = '.'.join(path), tensor_names.is_stacked(cfg, path)
    wanted = ('v',) if ('v', place) in fields else ('v_row', 'v_col')
    if not all((field, place) in fields for field in wanted):
      return {}
    arrays = [fields[field, place].read() for field in wanted]
    if len(arrays) == 2 and _factoring(found[0], cfg, least=1).row_dims == (1,):
      arrays = arrays[::-1]
    for i, name in enumerate(found):
      result[name] = Moment(*(array[i] if stacked else array for array in arrays))
  return result


def to_run(moments: Moments, cfg: T5Config, step: int) -> dict[tuple[str, ...], Tensor]:
  """Returns the state of OptimizerConfig()'s Adafactor, by keys."""
  _, shapes, axes = t5.abstract_params(cfg)
  tx = optimizers.make_optimizer(optimizers.OptimizerConfig(), axes, shapes)
  by_path = {path: names for path, _, names in tensor_names.leaves(cfg)}

  def value(keys: tuple[str, ...]) -> np.ndarray:
    start = next((i for i in range(len(keys)) if keys[i:] in by_path), None)
    if start is None:
      assert keys[-1] == 'count', keys
      return np.asarray(step)
    path, names = keys[start:], by_path[keys[start:]]
    found = [moments[name] for name in names]
    if keys[start - 1] == 'v':
      parts = [moment.as_whole() for moment in found]
    else:
      layout = _factoring(names[0], cfg)
      [dim] = layout.row_dims if keys[start - 1] == 'v_row' else layout.column_dims
      parts = [moment.as_means()[dim] for moment in found]
    return np.stack(parts) if tensor_names.is_stacked(cfg, path) else parts[0]

  result = {}
  for keys, leaf in pytrees.leaves(jax.eval_shape(tx.init, shapes)):
    array = value(keys).astype(leaf.dtype)
    assert array.shape == leaf.shape, (keys, array.shape, leaf.shape)
    result[keys] = of_array(array, '.'.join(keys))
  return result
