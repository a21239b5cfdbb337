"""Reads T5X checkpoints: legacy ones (msgpack and zarr) and Orbax's.

A legacy checkpoint is one msgpack file that holds small arrays themselves and, in place of large
ones, TensorStore specs of zarr arrays beside it. Since 2023 T5X writes the same tree through Orbax.
Sources: t5x/checkpoints.py (VERSION, Checkpointer, OrbaxCheckpointManagerInterface),
t5x/checkpoint_utils.py detect_checkpoint_type.
"""

import re
from typing import Any

import numpy as np
from etils import epath
from flax import serialization, traverse_util

from t5x_lite.errors import UsageError, refusing
from t5x_lite.interop import zarr
from t5x_lite.interop.tensors import Tensor, Tensors, of_array
from t5x_lite.models.config import T5Config

FILE, STATE, PREFIX = 'checkpoint', 'state', 'checkpoint_'
VERSIONS = (2, 3)
TARGET, PARAM_STATES = 'target/', 'state/param_states/'
_PLACEHOLDER = 'PLACEHOLDER://'
_STACKS = ('encoder', 'decoder')


def find(path: epath.Path) -> epath.Path | None:
  """Returns the checkpoint that a path of it, its folder or a model_dir (the newest) means."""
  if path.is_file():
    with path.open('rb') as file:
      head = file.read(64)
    # A map of the keys that T5X writes.
    return path if any(key in head for key in (b'version', b'optimizer', b'target')) else None
  if not path.is_dir():
    return None
  for child in (path, path / STATE):
    if (child / FILE).is_file() or (child / zarr.METADATA).is_file():
      return child
  matches = [re.fullmatch(rf'{PREFIX}(\d+)', child.name) for child in path.iterdir()]
  steps = {int(match[1]): match[0] for match in matches if match}
  return find(path / steps[max(steps)]) if steps else None


def read_tensors(path: epath.Path) -> dict[str, Tensor]:
  """Returns all arrays by T5X's names, target/... and others; UsageError if they are damaged."""
  reader = zarr.Reader()
  folder = folder_of(path)
  file = path if path.is_file() else path / FILE
  if not file.is_file():
    # Orbax from 2023-06 on: the tree is in its own metadata.
    found = zarr.orbax_tensors(folder, reader)
    return {name.replace('.', '/').removeprefix('_optimizer/'): t for name, t in found.items()}
  with refusing(f'{file} is not a msgpack file, or is cut short', Exception):
    contents = serialization.msgpack_restore(file.read_bytes())
  if not isinstance(contents, dict):
    raise UsageError(f'{file} holds no T5X checkpoint')
  # TensorStore's specs, which are dicts, are leaves.
  spec = {'driver', 'kvstore', 'metadata'}
  flat = traverse_util.flatten_dict(contents, is_leaf=lambda _, node: spec <= node.keys())
  result = {}
  for keys, value in flat.items():
    # Orbax before that: the tree in msgpack, all arrays in zarr beside it.
    if isinstance(value, str) and value.startswith(_PLACEHOLDER):
      name = '/'.join(keys).removeprefix('_optimizer/')
      place = folder / _inside(folder, name, value.removeprefix(_PLACEHOLDER))
      result[name] = zarr.file_tensor(place, name, reader)
  if result:
    return result
  version = contents.get('version')
  if version not in VERSIONS:
    known = ' and '.join(map(str, VERSIONS))
    raise UsageError(f'{file} has version {version!r}; T5X checkpoints of version {known} are read')
  for keys, value in flat.items():
    name = '/'.join(keys[1:])  # without 'optimizer'
    if isinstance(value, dict):
      result[name] = _legacy_tensor(folder, name, value, reader)
    elif hasattr(value, 'shape'):
      result[name] = of_array(np.asarray(value), name)
  return result


def _legacy_tensor(folder: epath.Path, name: str, spec: Any, reader: zarr.Reader) -> Tensor:
  """Opens the array that a spec in the msgpack file stands for."""
  kvstore = spec['kvstore']
  # Before TensorStore 0.1.14 the path was in the spec itself.
  relative = _inside(folder, name, (kvstore.get('path') or spec.get('path', '')).rstrip('/'))
  dtype, place = spec.get('dtype'), folder / relative
  if dtype == 'uint16':
    again = 'load and save it with T5X once to write version 3'
    raise UsageError(f'{name} is uint16, T5X version 2 for bfloat16; {again}')
  store = f'{zarr.url(place)}/'
  if (place / '.zarray').exists():
    return reader.tensor(store, name)
  if not place.is_dir():
    raise UsageError(f'{name} should be in {place}: not there')
  # The spec repeats the metadata, so the array can be read without its own.
  metadata = dict(spec['metadata'])
  return reader.tensor(store, name, dtype=dtype, metadata=metadata)


def _inside(folder: epath.Path, name: str, relative: str) -> str:
  """Returns a path that cannot lead out of its folder."""
  if not relative or '..' in relative.split('/') or relative.startswith('/') or ':' in relative:
    raise UsageError(f'{name} is stored at {relative!r}, not in {folder}')
  return relative


def canonical(found: Tensors) -> dict[str, Tensor]:
  """Returns the tensors of 'target/' by canonical name, scanned stacks cut into layers."""
  params = {n.removeprefix(TARGET): found[n] for n in found if n.startswith(TARGET)}
  axes = {side: _scan_axis(params, side) for side in _STACKS}
  result = {}
  for name, tensor in params.items():
    if match := re.fullmatch(r'(encoder|decoder)/\1/(.+)', name):
      side, rest = match.groups()
      for i in range(tensor.shape[axes[side]]):
        result[f'{side}/layers_{i}/{rest}'] = tensor.layer(axes[side], i)
    else:
      result[re.sub(r'^decoder/token_embedder/', 'token_embedder/', name)] = tensor
  return result


def _scan_axis(found: Tensors, side: str) -> int:
  """Returns the dim of the layers: 1 as in all of T5X's configs, or 0."""
  shapes = [t.shape for name, t in found.items() if name.startswith(f'{side}/{side}/')]
  for axis in (1, 0):
    if len({shape[axis] for shape in shapes if len(shape) > axis}) == 1:
      return axis
  return 1


def model_config(tensors: Tensors, folder: epath.Path) -> T5Config:
  """Infers the config of a checkpoint, which does not hold one; UsageError if it is no T5's.

  What shapes do not tell, the activations, is read from a config.gin in the folder or the two above
  it; else a gated feed-forward block is T5 1.1's.
  """

  def shape(name: str) -> tuple[int, ...]:
    if name not in tensors:
      raise UsageError(f'{folder} has no target/{name}: not a T5 model')
    return tensors[name].shape

  matches = [re.match(r'(\w+)/layers_(\d+)/', name) for name in tensors]
  layers = [(match[1], int(match[2])) for match in matches if match]
  depth = {side: 1 + max((i for s, i in layers if s == side), default=-1) for side in _STACKS}
  side = 'encoder' if depth['encoder'] else 'decoder'
  first = f'{side}/layers_0'
  attention = 'attention' if side == 'encoder' else 'self_attention'
  per_layer = f'{first}/relpos_bias/rel_embedding' in tensors
  heads, buckets = shape(f'{first if per_layer else side}/relpos_bias/rel_embedding')
  vocab_size, emb_dim = shape('token_embedder/embedding')
  gated = f'{first}/mlp/wi_0/kernel' in tensors
  architecture = 'encoder_decoder' if all(depth.values()) else side
  untied = 'decoder/logits_dense/kernel' in tensors
  return T5Config(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    num_heads=heads,
    head_dim=shape(f'{first}/{attention}/query/kernel')[1] // heads,
    mlp_dim=shape(f'{first}/mlp/wo/kernel')[0],
    num_encoder_layers=depth['encoder'],
    num_decoder_layers=depth['decoder'],
    mlp_activations=_gin_activations(folder) or (('gelu', 'linear') if gated else ('relu',)),
    logits_via_embedding=architecture != 'encoder' and not untied,
    relpos_num_buckets=buckets,
    relpos_per_layer=per_layer,
    architecture=architecture,
    dtype='float32',
  )


def _gin_activations(folder: epath.Path) -> tuple[str, ...]:
  """Returns mlp_activations of a run's config.gin, or () without one."""
  for place in (folder, folder.parent, folder.parent.parent):
    file = place / 'config.gin'
    text = file.read_text() if file.is_file() else ''
    if match := re.search(r'mlp_activations\s*=\s*[(\[]([^)\]]*)[)\]]', text):
      return tuple(re.findall(r'[\'"]([\w]+)[\'"]', match[1]))
  return ()


def folder_of(path: epath.Path) -> epath.Path:
  """Returns the directory of what `find` returned."""
  return path.parent if path.is_file() else path
