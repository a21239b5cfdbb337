"""Writes a run directory of ours, layer by layer.

The same files that Checkpointer writes through Orbax, in Orbax's form of one directory an array:
Orbax itself would want the whole model in memory.
"""

import json
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from etils import epath

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import tensor_names, zarr
from t5x_lite.interop.tensors import Tensor, Tensors, blocks
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import checksums
from t5x_lite.runs import checkpoints, run_directory

STATE = 'state'
_HANDLER = 'orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler'
_JSON_HANDLER = 'orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler'
_PART = 1 << 26  # elements in memory at a time


def numpy_dtype(name: str) -> np.dtype:
  """Returns a dtype by T5Config's name for it."""
  return np.dtype(ml_dtypes.bfloat16 if name == 'bfloat16' else name)


def write(
  directory: epath.Path,
  *,
  tensors: Tensors,
  cfg: T5Config,
  vocabulary: VocabularyConfig,
  step: int = 0,
  moments: Mapping[tuple[str, ...], Tensor] | None = None,
  lengths: Mapping[str, int] | None = None,
  origin: str = '',
  progress: Callable[[str], None] = lambda name: None,
) -> None:
  """Writes a run with one checkpoint.

  Args:
    directory: exists, and is empty.
    tensors: checked, by canonical name.
    cfg: the model; its param_dtype is what is written.
    vocabulary: its files are copied.
    step: updates made so far.
    moments: the optimizer's state by the keys below 'opt_state'.
    lengths: task feature lengths, inference's defaults.
    origin: where it comes from, for the record.
    progress: called with each array's name once it is written.
  """
  root = directory / checkpoints.CHECKPOINTS / str(step)
  state = root / STATE
  state.mkdir(parents=True)
  dtype = numpy_dtype(cfg.param_dtype)
  shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
  sums: dict[str, int] = {}
  for path, leaf, found in tensor_names.leaves(cfg):
    stacked = cfg.scan_layers and 'layers' in path
    keys = ('params', *path)
    array = _create(state, keys, leaf.shape, dtype, int(stacked))
    for layer, name in enumerate(found):
      for index in blocks(tensors[name].shape, _PART):
        part = tensors[name].read(index).astype(dtype, copy=False)
        place = (layer, *index) if stacked else index
        array[place].write(part).result()
        start = [
          i if isinstance(i, int) else i.indices(n)[0]
          for i, n in zip(place, leaf.shape, strict=True)
        ]
        if stacked:
          part = part[None]
        name = '.'.join(keys)
        sums[name] = sums.get(name, 0) + checksums.of_block(part, leaf.shape, start)
    shapes[keys] = tuple(leaf.shape)
    progress('.'.join(keys))
  scalars = {('step',): np.asarray(step, np.int32)}
  for keys, value in scalars.items():
    _create(state, keys, value.shape, value.dtype, 0).write(value).result()
    shapes[keys] = value.shape
    sums['.'.join(keys)] = checksums.of_block(value, (), ())
  for path, tensor in (moments or {}).items():
    keys = ('opt_state', *path)
    array = _create(state, keys, tensor.shape, tensor.dtype, 0)
    whole = tensor.read()
    array.write(whole).result()
    shapes[keys] = tensor.shape
    sums['.'.join(keys)] = checksums.of_block(whole, tensor.shape, (0,) * whole.ndim)
    progress('.'.join(keys))
  (state / zarr.METADATA).write_text(zarr.orbax_metadata(shapes))
  sums = {name: total & 0xFFFFFFFF for name, total in sums.items()}
  (root / 'meta').mkdir()
  (root / 'meta' / 'metadata').write_text(json.dumps(checkpoints.make_meta(step, sums)))
  handlers = {STATE: _HANDLER, 'meta': _JSON_HANDLER}
  (root / '_CHECKPOINT_METADATA').write_text(
    json.dumps({'item_handlers': handlers, 'custom_metadata': {}})
  )
  run_directory.write_run(
    str(directory),
    model=cfg,
    vocabulary=vocabulary,
    lengths=lengths,
    config={'converted_from': origin} if origin else None,
  )


def _create(state, keys, shape, dtype, whole_dims):
  chunks = zarr.chunk_shape(shape, dtype.itemsize, whole_dims=whole_dims)
  return zarr.create(str(state / '.'.join(keys)), shape, dtype, chunks, zarr.ORBAX_COMPRESSOR)
