"""Reads Hugging Face folders of T5 models: config.json and safetensors.

Numbers are read slice by slice from the files, one or several with an index. Whether the head is
tied is decided by the tensors that are there: config.json has said either.
"""

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from t5x_lite.errors import UsageError, refusing
from t5x_lite.interop import tensor_names
from t5x_lite.interop.tensors import Index, Tensor, Tensors, blocks
from t5x_lite.models.config import T5Config

CONFIG = 'config.json'
WEIGHTS, WEIGHTS_INDEX = 'model.safetensors', 'model.safetensors.index.json'
MODEL_TYPES = ('t5', 'mt5', 'umt5')

DTYPES = {f'F{bits}': np.dtype(f'float{bits}') for bits in (64, 32, 16)}
DTYPES['BF16'] = np.dtype(ml_dtypes.bfloat16)  # importing ml_dtypes makes numpy know its name too
SHORT_DTYPES = ('float32', 'bfloat16', 'float16')

_COMPARED = 1 << 24  # elements at a time, to see whether two tables are the same

# Copies of the embedding of old versions, and a table that Mesh TensorFlow made and nothing reads.
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
_UNREAD = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'

# 'gelu' is the exact one unless it is gated: T5 1.1's gated-gelu is the tanh approximation, by an
# exception in Hugging Face's own config class.
_ACTIVATIONS = {name: name for name in ('relu', 'silu', 'linear')}
_ACTIVATIONS |= {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'swish': 'silu'}

# T5Config's fields, their names in config.json, and what they are if it does not say.
FIELDS: dict[str, tuple[str, int | float]] = {
  'emb_dim': ('d_model', 512),
  'num_heads': ('num_heads', 8),
  'head_dim': ('d_kv', 64),
  'mlp_dim': ('d_ff', 2048),
  'num_encoder_layers': ('num_layers', 6),
  'dropout_rate': ('dropout_rate', 0.1),
  'relpos_num_buckets': ('relative_attention_num_buckets', 32),
  'relpos_max_distance': ('relative_attention_max_distance', 128),
  'layer_norm_epsilon': ('layer_norm_epsilon', 1e-6),
}
IDS = {'pad_id': ('pad_token_id', 0), 'eos_id': ('eos_token_id', 1)}
IDS['decoder_start_id'] = ('decoder_start_token_id', 0)


def is_hf(path: epath.Path) -> bool:
  """True if a directory looks like a saved transformers model."""
  try:
    return (path / CONFIG).is_file() and 'model_type' in read_json(path / CONFIG)
  except UsageError:
    return False


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON object; UsageError if the file is not there or not one."""
  not_json = refusing(f'{path} is not JSON', ValueError, RecursionError)
  with refusing(f'{path} cannot be read', OSError), not_json:
    value = json.loads(path.read_text())
  if not isinstance(value, dict):
    raise UsageError(f'{path} holds no JSON object')
  return value


def weight_files(directory: epath.Path) -> list[epath.Path]:
  """Returns the safetensors files of a folder; UsageError if there are none, or only pickles."""
  files = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
  if WEIGHTS_INDEX in files:
    index = files[WEIGHTS_INDEX]
    listed = read_json(index).get('weight_map')
    if not isinstance(listed, dict):
      raise UsageError(f'{index} has no weight_map of names and files')
    for name in listed.values():
      if not isinstance(name, str) or name not in files:
        raise UsageError(f'{index} names the file {name!r}, which is not in {directory}')
    return [files[name] for name in sorted(set(listed.values()))]
  if WEIGHTS in files:
    return [files[WEIGHTS]]
  found = [path for path in files.values() if path.suffix == '.safetensors']
  if len(found) == 1:
    return found
  for path in files.values():
    if path.suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl'):
      raise UsageError(
        f'{path} is a pickle, which can run any code when it is opened, so it is not read; where '
        'torch is installed and the source trusted, convert it once with: python -c "import '
        "transformers as t; t.AutoModelForSeq2SeqLM.from_pretrained('SRC', weights_only=True)"
        ".save_pretrained('DST')\""
      )
  neither = f'{directory} has no {WEIGHTS} and no {WEIGHTS_INDEX}'
  raise UsageError(f'{neither}; give the folder that save_pretrained wrote')


def _opened(path: epath.Path) -> Any:
  wrong = f'{path} is not a safetensors file, or is cut short'
  with refusing(wrong, safetensors.SafetensorError, OSError):
    return safetensors.safe_open(os.fspath(path), framework='numpy')


def read_tensors(directory: epath.Path) -> dict[str, Tensor]:
  """Returns every tensor of a folder by its name in the files."""
  result: dict[str, Tensor] = {}
  for path in weight_files(directory):
    with _opened(path) as file:
      for name in file.keys():
        part = file.get_slice(name)
        kind = part.get_dtype()
        origin = f'{name} in {path.name}'
        if kind not in DTYPES:
          raise UsageError(f'{origin} has the type {kind}; known are {", ".join(DTYPES)}')
        if name in result:
          raise UsageError(f'{origin} is also {result[name].origin}')
        fetch = functools.partial(_fetch, path, name)
        result[name] = Tensor(tuple(part.get_shape()), DTYPES[kind], fetch, origin)
  return result


def _fetch(path: epath.Path, name: str, index: Index) -> np.ndarray:
  # Opened each time: a file that stays open keeps its pages in memory, in the end the whole model.
  with _opened(path) as file:
    return file.get_slice(name)[index] if index else file.get_tensor(name)


def canonical(found: Tensors, *, per_layer: bool) -> tuple[dict[str, Tensor], list[str]]:
  """Returns (tensors by canonical name, names that are no T5's).

  Unless per_layer, all layers of a stack share one table of relative positions. Raises UsageError
  if the encoder and the decoder do not share their embedding.
  """
  rest = dict(found)
  rest.pop(_UNREAD, None)
  shared = rest.get('shared.weight')
  for other in filter(None, [rest.pop(copy, None) for copy in _COPIES]):
    if shared is None:
      shared = rest['shared.weight'] = other
    elif not _same(shared, other):
      differs = f'{other.origin} differs from {shared.origin}'
      raise UsageError(f'{differs}; the T5 family has one embedding for both stacks')
  head = rest.get('lm_head.weight')
  if head is not None and shared is not None and _same(head, shared):
    del rest['lm_head.weight']
  matches = [re.match(r'(encoder|decoder)\.block\.([0-9]{1,9})\.', name) for name in rest]
  # The numbers that are there, not all up to the highest: that may be any.
  layers = sorted({(match[1], int(match[2])) for match in matches if match})
  known = tensor_names.of_hf(layers, per_layer=per_layer)
  result = {}
  for hf, tensor in rest.items():
    if name := known.get(hf):
      matrix = tensor_names.is_transposed(name) and len(tensor.shape) == 2
      result[name] = tensor.transposed() if matrix else tensor
  return result, sorted(hf for hf in rest if hf not in known)


def _same(a: Tensor, b: Tensor) -> bool:
  """True if two tensors are equal bit for bit; reads a part at a time."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  parts = blocks(a.shape, _COMPARED)
  return all(a.read(part).tobytes() == b.read(part).tobytes() for part in parts)


def activations(entry: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns mlp_activations of a config.json; UsageError if there is no such activation here."""
  kind = str(entry.get('feed_forward_proj', 'relu'))
  gated = kind.startswith('gated-')
  plain = 'gelu_new' if kind == 'gated-gelu' else kind.removeprefix('gated-')
  name = str(entry.get('dense_act_fn') or plain)
  if name not in _ACTIVATIONS:
    known = f'supported activations are {", ".join(_ACTIVATIONS)}'
    raise UsageError(f'config.json has feed_forward_proj={kind!r} (activation {name!r}); {known}')
  return (_ACTIVATIONS[name], 'linear') if gated else (_ACTIVATIONS[name],)


def model_config(entry: Mapping[str, Any], tensors: Tensors) -> T5Config:
  """Returns the config of a folder; UsageError if it is another kind of model.

  The canonical tensors decide on the head, the stacks and the biases.
  """
  if 'token_embedder/embedding' not in tensors:
    raise UsageError('no shared.weight among the tensors: not a T5 model')
  embedding = tensors['token_embedder/embedding']
  if len(embedding.shape) != 2:
    raise UsageError(f'{embedding.origin} has the shape {embedding.shape}')
  tied = 'decoder/logits_dense/kernel' not in tensors
  has_decoder = 'decoder/decoder_norm/scale' in tensors
  ids = {field: _number(entry, *key) for field, key in IDS.items()}
  rows = embedding.shape[0]
  for field, token in ids.items():
    if not 0 <= token < rows:
      raise UsageError(f'config.json has {IDS[field][0]}={token}, the embedding {rows} rows')
  fields = {field: _number(entry, *key) for field, key in FIELDS.items()}
  layers = fields['num_encoder_layers']
  decoder_layers = _number(entry, 'num_decoder_layers', layers)
  # Checked before a name is made for each of them.
  if max(layers, decoder_layers if has_decoder else 0) > len(tensors):
    depth = f'num_layers={layers}, num_decoder_layers={decoder_layers}'
    raise UsageError(f'config.json has {depth}, and there are but {len(tensors)} tensors')
  return T5Config(
    # The table, not vocab_size, which old files leave at the tokenizer's.
    vocab_size=rows,
    num_decoder_layers=decoder_layers,
    mlp_activations=activations(entry),
    logits_via_embedding=tied and has_decoder,
    scale_logits=_scale_logits(entry, tied) if has_decoder else None,
    relpos_per_layer=is_per_layer(entry),
    architecture='encoder_decoder' if has_decoder else 'encoder',
    dtype='float32',
    **fields,
    **ids,
  )


def is_per_layer(entry: Mapping[str, Any]) -> bool:
  """True if every layer has its own table of relative positions (umT5)."""
  return entry.get('model_type') == 'umt5'


def _number(entry: Mapping[str, Any], key: str, default: int | float) -> Any:
  """Returns a number of the default's type."""
  value, kind = entry.get(key), type(default)
  if isinstance(value, list) and value:
    value = value[0]  # eos_token_id may be several
  if value is None:
    return default
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not abs(value) < 2**31 or kind(value) != value:
    what = 'number' if kind is float else 'whole number'
    raise UsageError(f'config.json has {key}={value!r:.60}: no {what}')
  return kind(value)


def _scale_logits(entry: Mapping[str, Any], tied: bool) -> bool | None:
  """Returns T5Config.scale_logits: None where the model follows T5's rule.

  The rule: the input of a tied head is scaled by emb_dim**-0.5, that of an untied one is not.
  transformers 5 always ties, so it writes the factor of model_type t5 as scale_decoder_outputs, has
  dropped it from mt5, and applies it to umt5 whatever the head (a deviation from the published
  umT5, which is untied and unscaled; up to version 4 it followed the rule).
  """
  kind = entry['model_type']
  says_tied = entry.get('tie_word_embeddings') is not False
  version = str(entry.get('transformers_version', '4')).partition('.')[0]
  if kind == 't5':
    scaled = bool(entry.get('scale_decoder_outputs', says_tied))
  elif kind == 'mt5' and version.isdigit() and int(version) >= 5:
    scaled = False
  else:
    scaled = tied and says_tied
  return None if scaled == tied else scaled
