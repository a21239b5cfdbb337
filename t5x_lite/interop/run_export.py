"""Writes a run directory of ours, layer by layer.

The same files that Checkpointer writes through Orbax, in Orbax's form of one directory an array:
Orbax itself would want the whole model in memory.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import tensor_names, zarr
from t5x_lite.interop.checkpoint_source import Source
from t5x_lite.interop.tensors import Progress, Tensor, of_array
from t5x_lite.runs import checkpoints, run_directory

STATE = 'state'
_HANDLER = 'orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler'
_JSON_HANDLER = 'orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler'


def write(
  directory: epath.Path,
  source: Source,
  *,
  moments: Mapping[tuple[str, ...], Tensor],
  origin: str,
  progress: Progress,
) -> None:
  """Writes a run with one checkpoint into an empty directory.

  The vocabulary's files are copied; moments are the optimizer's state by the keys below
  'opt_state'; the rest is as in `export.write`.
  """
  cfg, step = source.config, source.step
  root = directory / checkpoints.CHECKPOINTS / str(step)
  state = root / STATE
  state.mkdir(parents=True)
  shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
  sums: dict[str, int] = {}

  def save(keys: tuple[str, ...], parts: Sequence[Tensor], dtype: np.dtype, stacked: bool = False):
    name = '.'.join(keys)
    axis = 0 if stacked else None
    array, sums[name] = zarr.write(str(state / name), parts, dtype, zarr.ORBAX_COMPRESSOR, axis)
    shapes[keys] = tuple(array.shape)
    progress(name)

  for path, _, names in tensor_names.leaves(cfg):
    parts, stacked = [source.tensors[name] for name in names], tensor_names.is_stacked(cfg, path)
    save(('params', *path), parts, np.dtype(cfg.param_dtype), stacked)
  count = of_array(np.asarray(step, np.int32))
  save(('step',), [count], count.dtype)
  for keys, tensor in moments.items():
    save(('opt_state', *keys), [tensor], tensor.dtype)
  (state / zarr.METADATA).write_text(zarr.orbax_metadata(shapes))
  (root / 'meta').mkdir()
  (root / 'meta' / 'metadata').write_text(json.dumps(checkpoints.make_meta(step, sums)))
  items = {'item_handlers': {STATE: _HANDLER, 'meta': _JSON_HANDLER}, 'custom_metadata': {}}
  (root / '_CHECKPOINT_METADATA').write_text(json.dumps(items))
  run_directory.write_run(
    str(directory),
    model=cfg,
    vocabulary=source.vocabulary or VocabularyConfig(kind='passthrough', size=cfg.vocab_size),
    lengths=source.lengths,
    config={'converted_from': origin} if origin else None,
  )
