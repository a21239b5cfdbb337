"""Writes legacy T5X checkpoints: one msgpack file, and zarr beside it.

As t5x/checkpoints.py Checkpointer.save does, array by array: version 3, float32 or bfloat16,
unrolled layers, or scanned on axis 1 where a relative position bias belongs to each layer, for
which T5X has only the scanned network.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import serialization

from t5x_lite.errors import UsageError
from t5x_lite.interop import t5x, tensor_names, zarr
from t5x_lite.interop.checkpoint_source import Source
from t5x_lite.interop.tensors import Progress
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees

VERSION, SCAN_AXIS = 3, 1
_COMPRESSOR = {'id': 'gzip', 'level': 1}
# Fields of T5Config that T5X has no name for.
_FIXED = (
  'scale_logits relpos_max_distance layer_norm_epsilon pad_id eos_id decoder_start_id'.split()
)


def check(cfg: T5Config, dtype: str) -> None:
  """Raises UsageError if T5X has no such model."""
  if cfg.share_encoder_decoder or cfg.architecture == 'encoder':
    what = 'share_encoder_decoder=True' if cfg.share_encoder_decoder else "architecture='encoder'"
    raise UsageError(f'{what}: T5X has no such network; save it as t5x_lite')
  for name in _FIXED:
    if (value := getattr(cfg, name)) != (fixed := T5Config.__dataclass_fields__[name].default):
      raise UsageError(f'{name} is {value}: T5X has {fixed} alone; save it as t5x_lite')
  if dtype not in ('float32', 'bfloat16'):
    raise UsageError(f'dtype is {dtype!r}; T5X saves parameters in float32 or bfloat16')


def write(
  directory: epath.Path, source: Source, *, param_states: Mapping[str, Any], progress: Progress
) -> None:
  """Writes a checkpoint_STEP directory into an empty one.

  The param_states are the optimizer's, a tree of arrays by T5X's names; the rest is as in
  `export.write`.
  """
  cfg, root = source.config, directory / f'{t5x.PREFIX}{source.step}'
  root.mkdir()
  target = []
  for name, names in tensor_names.t5x_arrays(cfg).items():
    place = f'target.{name.replace("/", ".")}'
    axis = SCAN_AXIS if cfg.relpos_per_layer and '/layers_' in names[0] else None
    parts, dtype = [source.tensors[part] for part in names], np.dtype(cfg.param_dtype)
    array, _ = zarr.write(str(root / place), parts, dtype, _COMPRESSOR, axis)
    full = array.spec().to_json()
    # What stands for the array in the msgpack file; its path is relative.
    spec = {'driver': 'zarr', 'dtype': full['dtype']}
    spec['kvstore'] = {'driver': 'file', 'path': f'{place}/'}
    spec['metadata'] = {key: full['metadata'][key] for key in ('chunks', 'compressor', 'shape')}
    target.append((name.split('/'), spec))
    progress(f'target/{name}')
  state = {'step': np.asarray(source.step, np.int32), 'param_states': dict(param_states)}
  optimizer = {'state': state, 'target': pytrees.nested(target)}
  contents = {'version': VERSION, 'optimizer': optimizer}
  # Last: without this file there is no checkpoint.
  (root / t5x.FILE).write_bytes(serialization.msgpack_serialize(contents))
