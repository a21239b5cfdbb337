"""Writes a model in any format; what is half written never gets its name."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, check_one_of
from t5x_lite.interop import adafactor_moments, hf_export, t5x, tensor_names, zarr
from t5x_lite.interop.adapters import FORMATS as ADAPTERS
from t5x_lite.interop.adapters import check_methods, merge_lora, write_alone
from t5x_lite.interop.checkpoint_source import FORMATS, Source
from t5x_lite.interop.hf_tokenizer import check_vocabulary
from t5x_lite.interop.tensors import Progress, Tensor, of_array
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees
from t5x_lite.runs import checkpoints, run_directory

log = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
TARGETS = (*FORMATS, *ADAPTERS)
# Of legacy T5X, whose scanned networks are stacked on this axis, and fields it has no name for.
_T5X_VERSION, _T5X_SCAN_AXIS = 3, 1
_T5X_COMPRESSOR = {'id': 'gzip', 'level': 1}
_T5X_FIXED = (
  'scale_logits relpos_max_distance layer_norm_epsilon pad_id eos_id decoder_start_id'.split()
)


def check_destination(destination: str | os.PathLike) -> epath.Path:
  """Returns where a new directory will be; UsageError if something is there already."""
  target = epath.Path(destination)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UsageError(f'{target} is already there; name a new directory')
  return target


def check_target(cfg: T5Config, to: str, vocabulary: VocabularyConfig | None = None) -> None:
  """Raises UsageError if there is no such format, or it has no such model or vocabulary."""
  check_one_of('the format to write', to, TARGETS)
  cfg.check_writable()
  check_methods(cfg, to)
  if to == 'hf':
    hf_export.model_config(cfg, cfg.param_dtype)
    if vocabulary is not None:
      check_vocabulary(vocabulary)
  elif to == 't5x':
    _check_t5x(cfg)


def _check_t5x(cfg: T5Config) -> None:
  """Raises UsageError if T5X has no such model."""
  if cfg.share_encoder_decoder or cfg.architecture == 'encoder':
    what = 'share_encoder_decoder=True' if cfg.share_encoder_decoder else "architecture='encoder'"
    raise UsageError(f'{what}: T5X has no such network; save it as t5x_lite')
  for name in _T5X_FIXED:
    if (value := getattr(cfg, name)) != (fixed := T5Config.__dataclass_fields__[name].default):
      raise UsageError(f'{name} is {value}: T5X has {fixed} alone; save it as t5x_lite')
  if cfg.param_dtype not in ('float32', 'bfloat16'):
    raise UsageError(f'dtype is {cfg.param_dtype!r}; T5X saves parameters in float32 or bfloat16')


def write(
  target: epath.Path,
  source: Source,
  *,
  to: str,
  second_moments: adafactor_moments.Moments | None = None,
  origin: str = '',
  shard_bytes: int = hf_export.SHARD_BYTES,
) -> None:
  """Writes a directory, which does not exist or is empty, of one of TARGETS.

  Half-written ones never get the name. The source may be open or in memory; its param_dtype is what
  is written; LoRA is added to its matrices in 'hf' and 't5x'. No vocabulary means ids without text.
  The second_moments are Adafactor's or none; origin is kept for the record; shard_bytes: of 'hf'.
  """
  temporary = target.parent / f'.{target.name}.tmp-{os.getpid()}'
  temporary.mkdir(parents=True)
  if to in ('hf', 't5x'):
    source = merge_lora(source)
  cfg, progress = source.config, _progress()
  try:
    if to in ADAPTERS:
      write_alone(temporary, source, to=to, progress=progress)
    elif to == 'hf':
      hf_export.write(temporary, source, shard_bytes=shard_bytes, progress=progress)
    elif to == 't5x':
      # T5X restores only with an optimizer's state; a new one, if need be.
      states = adafactor_moments.to_t5x(second_moments or adafactor_moments.new(cfg), cfg)
      _write_t5x(temporary, source, states, progress)
    else:
      _write_run(temporary, source, second_moments, origin, progress)
    if target.is_dir():
      target.rmdir()
    temporary.rename(target)
  except BaseException:
    temporary.rmtree()
    raise


def _write_run(
  directory: epath.Path,
  source: Source,
  second_moments: adafactor_moments.Moments | None,
  origin: str,
  progress: Progress,
) -> None:
  """Writes a run with one checkpoint, layer by layer: the same files as Checkpointer's.

  In Orbax's form of one directory an array; Orbax itself would want the whole model in memory.
  """
  cfg, step = source.config, source.step
  moments = adafactor_moments.to_run(second_moments, cfg, step) if second_moments else {}
  root = directory / checkpoints.CHECKPOINTS / str(step)
  state = root / 'state'
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
  handlers = {'state': ocp.StandardCheckpointHandler, 'meta': ocp.JsonCheckpointHandler}
  named = {item: handler.typestr() for item, handler in handlers.items()}
  items = {'item_handlers': named, 'custom_metadata': {}}
  (root / zarr.ITEMS).write_text(json.dumps(items))
  run_directory.write_run(
    str(directory),
    model=cfg,
    vocabulary=source.vocabulary or VocabularyConfig(kind='passthrough', size=cfg.vocab_size),
    lengths=source.lengths,
    config={'converted_from': origin} if origin else None,
  )


def _write_t5x(
  directory: epath.Path, source: Source, param_states: Mapping[str, Any], progress: Progress
) -> None:
  """Writes a legacy T5X checkpoint_STEP directory: one msgpack file, and zarr beside it.

  As t5x/checkpoints.py Checkpointer.save does, array by array: version 3, float32 or bfloat16,
  unrolled layers, or scanned on axis 1 where a relative position bias belongs to each layer, for
  which T5X has only the scanned network. The param_states are the optimizer's, a tree of arrays by
  T5X's names.
  """
  cfg, root = source.config, directory / f'{t5x.PREFIX}{source.step}'
  root.mkdir()
  target = []
  for name, names in tensor_names.t5x_arrays(cfg).items():
    place = f'target.{name.replace("/", ".")}'
    axis = _T5X_SCAN_AXIS if cfg.relpos_per_layer and '/layers_' in names[0] else None
    parts, dtype = [source.tensors[part] for part in names], np.dtype(cfg.param_dtype)
    array, _ = zarr.write(str(root / place), parts, dtype, _T5X_COMPRESSOR, axis)
    full = array.spec().to_json()
    # What stands for the array in the msgpack file; its path is relative.
    spec = {'driver': 'zarr', 'dtype': full['dtype']}
    spec['kvstore'] = {'driver': 'file', 'path': f'{place}/'}
    spec['metadata'] = {key: full['metadata'][key] for key in ('chunks', 'compressor', 'shape')}
    target.append((name.split('/'), spec))
    progress(f'target/{name}')
  state = {'step': np.asarray(source.step, np.int32), 'param_states': dict(param_states)}
  optimizer = {'state': state, 'target': pytrees.nested(target)}
  contents = {'version': _T5X_VERSION, 'optimizer': optimizer}
  # Last: without this file there is no checkpoint.
  (root / t5x.FILE).write_bytes(serialization.msgpack_serialize(contents))


def _progress() -> Progress:
  """Returns what counts an array as written, and says every few seconds how far it is."""
  count, said = 0, time.monotonic()

  def progress(name: str) -> None:
    nonlocal count, said
    count += 1
    if time.monotonic() - said > REPORT_SECONDS:
      said = time.monotonic()
      log.info('%d arrays written, last %s', count, name)

  return progress
