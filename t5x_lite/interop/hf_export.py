"""Writes Hugging Face folders: config, tokenizer, and safetensors in shards.

A shard's header says where every tensor goes, so numbers stream through memory one at a time.
"""

import json
import struct
from typing import Any

import numpy as np
from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.interop import hf, hf_tokenizer, tensor_names
from t5x_lite.interop.checkpoint_source import Source
from t5x_lite.interop.tensors import Progress, Tensor, Tensors, blocks
from t5x_lite.models.config import T5Config
from t5x_lite.runs.files import write_json

SHARD_BYTES = 5_000_000_000  # as transformers shards
_PART = 1 << 26  # elements of an untransposed tensor that are in memory at a time

_ACTIVATIONS = {'relu': 'relu', 'gelu': 'gelu_new', 'silu': 'silu', 'swish': 'silu'}
_PROJECTIONS: dict[tuple[str, ...], str] = {(k,): name for k, name in _ACTIVATIONS.items()}
_PROJECTIONS |= {(k, 'linear'): f'gated-{name}' for k, name in _ACTIVATIONS.items()}
_PROJECTIONS['gelu', 'linear'] = 'gated-gelu'
_HF_DTYPES = {dtype: name for name, dtype in hf.DTYPES.items()}


def model_config(cfg: T5Config, dtype: str) -> dict[str, Any]:
  """Returns config.json of a model; UsageError if transformers has no such architecture."""
  if cfg.architecture == 'decoder':
    other = "save it with format='t5x_lite' or 't5x'"
    raise UsageError(f"architecture='decoder': transformers has no decoder-only T5; {other}")
  projection = _PROJECTIONS.get(cfg.mlp_activations)
  if projection is None:
    there = ', '.join(map(str, _PROJECTIONS))
    unknown = f'mlp_activations={cfg.mlp_activations}'
    raise UsageError(f'{unknown} has no name in transformers; there are {there}')
  kind = 'umt5' if cfg.relpos_per_layer else 't5'
  architecture = 'ForConditionalGeneration' if cfg.has_decoder else 'EncoderModel'
  tied = cfg.logits_via_embedding
  scaled = tied if cfg.scale_logits is None else cfg.scale_logits
  entry = {
    'architectures': [kind.upper() + architecture],
    'model_type': kind,
    'is_encoder_decoder': cfg.has_decoder,
    'vocab_size': cfg.vocab_size,
    **{key: getattr(cfg, field) for field, (key, _) in hf.FIELDS.items()},
    'num_decoder_layers': cfg.num_decoder_layers,
    'initializer_factor': 1.0,
    'feed_forward_proj': projection,
    'dense_act_fn': _ACTIVATIONS[cfg.mlp_activations[0]],
    'is_gated_act': projection.startswith('gated-'),
    # Up to transformers 4 this is also whether the head's input is scaled.
    'tie_word_embeddings': tied,
    'use_cache': True,
    **generation_config(cfg),
    'torch_dtype': dtype,
  }
  # The factor by itself; known from transformers 5 on.
  return entry if scaled == tied else {**entry, 'scale_decoder_outputs': scaled}


def generation_config(cfg: T5Config) -> dict[str, Any]:
  """Returns generation_config.json."""
  return {key: getattr(cfg, field) for field, (key, _) in hf.IDS.items()}


def by_hf_name(tensors: Tensors, cfg: T5Config) -> dict[str, Tensor]:
  """Returns tensors as Hugging Face names and turns them; those that are shared two times."""
  result = {}
  for name in (*tensors, *tensor_names.shapes(cfg.replace(share_encoder_decoder=False))):
    tensor = tensors[name if name in tensors else tensor_names.lender(name) or '']
    turned = tensor_names.is_transposed(name)
    result[tensor_names.hf_name(name)] = tensor.transposed() if turned else tensor
  return result


def plan_shards(
  tensors: Tensors, itemsize: int, limit: int = SHARD_BYTES
) -> dict[str, dict[str, Tensor]]:
  """Cuts tensors by Hugging Face's name, in order, into files, by name, of at most limit bytes.

  The itemsize is that of what is written; a tensor larger than the limit gets a file of its own.
  """
  groups, filled = [{}], 0
  for name, tensor in tensors.items():
    size = tensor.size * itemsize
    if groups[-1] and filled + size > limit:
      groups.append({})
      filled = 0
    groups[-1][name] = tensor
    filled += size
  if len(groups) == 1:
    return {hf.WEIGHTS: groups[0]}
  end = f'-of-{len(groups):05}.safetensors'
  return {f'model-{i:05}{end}': group for i, group in enumerate(groups, 1)}


def write_shard(path: epath.Path, shard: Tensors, dtype: np.dtype, progress: Progress) -> None:
  """Writes one safetensors file.

  Format: 8 bytes of header length, the header as JSON, then the tensors one after the other,
  row-major and little-endian.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  at = 0
  for name, tensor in shard.items():
    end = at + tensor.size * dtype.itemsize
    entry = {'dtype': _HF_DTYPES[dtype], 'shape': list(tensor.shape), 'data_offsets': [at, end]}
    header[name], at = entry, end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for name, tensor in shard.items():
      for index in blocks(tensor.shape, _PART):
        file.write(tensor.read(index).astype(dtype, copy=False).tobytes())
      progress(name)


def write(directory: epath.Path, source: Source, *, shard_bytes: int, progress: Progress) -> None:
  """Writes a folder that from_pretrained of transformers reads, into an empty one.

  Without a vocabulary, or for passed ids, there is no tokenizer; the rest is as in `export.write`.
  """
  cfg, vocabulary = source.config, source.vocabulary
  config = model_config(cfg, cfg.param_dtype)
  dtype = np.dtype(cfg.param_dtype)
  turned = by_hf_name(source.tensors, cfg)
  shards = plan_shards(turned, dtype.itemsize, shard_bytes)
  for file, shard in shards.items():
    write_shard(directory / file, shard, dtype, progress)
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': sum(t.size for t in turned.values()) * dtype.itemsize},
      'weight_map': {name: file for file, shard in shards.items() for name in shard},
    }
    write_json(directory / hf.WEIGHTS_INDEX, index)
  if vocabulary is not None:
    hf_tokenizer.write_vocabulary(vocabulary, directory)
  if cfg.has_decoder:
    write_json(directory / 'generation_config.json', generation_config(cfg))
  # Last: a folder with a config.json is whole.
  write_json(directory / hf.CONFIG, config)
