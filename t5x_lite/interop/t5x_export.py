"""Writes legacy T5X checkpoints: one msgpack file, and zarr beside it.

What T5X's own Checkpointer writes, array by array: version 3, float32 or bfloat16, unrolled layers,
or scanned on axis 1 where a relative position bias belongs to each layer, for which T5X has only
the scanned network.

Source: t5x/checkpoints.py Checkpointer.save.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import serialization

from t5x_lite.errors import UsageError
from t5x_lite.interop import run_export, t5x, tensor_names, zarr
from t5x_lite.interop.tensors import Tensor, Tensors, blocks
from t5x_lite.models.config import T5Config

VERSION = 3
SCAN_AXIS = 1
_COMPRESSOR = {'id': 'gzip', 'level': 1}
_PART = 1 << 26  # elements in memory at a time


def check(cfg: T5Config, dtype: str) -> None:
  """Raises UsageError if T5X has no such model."""
  if cfg.share_encoder_decoder or cfg.architecture == 'encoder':
    what = 'share_encoder_decoder=True' if cfg.share_encoder_decoder else "architecture='encoder'"
    raise UsageError(f'{what}: T5X has no such network; save it as t5x_lite')
  if dtype not in ('float32', 'bfloat16'):
    raise UsageError(f'dtype is {dtype!r}; T5X saves parameters in float32 or bfloat16')


def write(
  directory: epath.Path,
  *,
  tensors: Tensors,
  cfg: T5Config,
  dtype: str,
  step: int = 0,
  param_states: Mapping[str, Any],
  progress: Callable[[str], None] = lambda name: None,
) -> None:
  """Writes a checkpoint_STEP directory.

  Args:
    directory: exists, and is empty.
    tensors: checked, by canonical name.
    cfg: the model.
    dtype: 'float32' or 'bfloat16', of the parameters on disk.
    step: updates made so far.
    param_states: the optimizer's, a tree of arrays by T5X's names.
    progress: called with each array's name once it is written.
  """
  check(cfg, dtype)
  root = directory / f'{t5x.PREFIX}{step}'
  root.mkdir()
  kind = run_export.numpy_dtype(dtype)
  target: dict[str, Any] = {}
  for name, parts in arrays(tensors, cfg).items():
    place = f'target.{name.replace("/", ".")}'
    array = _create(root / place, parts, kind, scanned=_is_scanned(name, cfg))
    _insert(target, name, _spec(array, place))
    progress(f'target/{name}')
  state = {'step': np.asarray(step, np.int32)}
  contents = {
    'version': VERSION,
    'optimizer': {'state': {**state, 'param_states': dict(param_states)}, 'target': target},
  }
  # Last: without this file there is no checkpoint.
  (root / t5x.FILE).write_bytes(serialization.msgpack_serialize(contents))


def arrays(tensors: Tensors, cfg: T5Config) -> dict[str, list[Tensor]]:
  """Returns the layers of each of T5X's arrays, by its name below 'target/'."""
  result: dict[str, list[Tensor]] = {}
  for name in tensor_names.shapes(cfg):
    if cfg.relpos_per_layer:
      place, _ = tensor_names.t5x_scanned_name(name)
    else:
      place = tensor_names.t5x_name(name, cfg)
    result.setdefault(place, []).append(tensors[name])
  return result


def _is_scanned(name: str, cfg: T5Config) -> bool:
  side, _, rest = name.partition('/')
  return cfg.relpos_per_layer and rest.startswith(f'{side}/')


def _create(path: epath.Path, parts: Sequence[Tensor], dtype: np.dtype, *, scanned: bool) -> Any:
  """Writes the layers of one array and returns it."""
  shape = list(parts[0].shape)
  chunks = zarr.chunk_shape(shape, dtype.itemsize)
  if scanned:
    shape.insert(SCAN_AXIS, len(parts))
    chunks.insert(SCAN_AXIS, 1)
  array = zarr.create(str(path), shape, dtype, chunks, _COMPRESSOR)
  for layer, part in enumerate(parts):
    for index in blocks(part.shape, _PART):
      where: list[Any] = list(index)
      if scanned:
        where.insert(SCAN_AXIS, layer)
      array[tuple(where)].write(part.read(index).astype(dtype)).result()
  return array


def _spec(array: Any, place: str) -> dict[str, Any]:
  """Returns what stands for an array in the msgpack file; its path relative."""
  full = array.spec().to_json()
  return {
    'driver': 'zarr',
    'dtype': full['dtype'],
    'kvstore': {'driver': 'file', 'path': f'{place}/'},
    'metadata': {key: full['metadata'][key] for key in ('chunks', 'compressor', 'shape')},
  }


def _insert(tree: dict[str, Any], name: str, value: Any) -> None:
  *parents, last = name.split('/')
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = value
