"""One table of names: ours, T5X's and Hugging Face's, for both directions.

A tensor's canonical name is T5X's of an unrolled model, such as 'encoder/layers_3/mlp/wo/kernel',
with one layer's tensor in T5X's orientation. Our trees have the same names with the layers stacked
or in a list, T5X's scanned ones stack them on axis 1, Hugging Face transposes every matrix.
Sources: t5x/examples/t5 (network.py, layers.py) and scalable_t5; transformers' modeling_t5.py.
"""

import functools
import re
import types
from collections.abc import Iterable, Mapping, Sequence

import jax

from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees

# Ours below STACK/layers_I, and Hugging Face's below STACK.block.I.
ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
_RELPOS = 'relpos_bias/rel_embedding'
_LAYER = re.compile(r'(encoder|decoder)/layers_(\d+)/(.+)')


def _block(*attention: tuple[str, str, str]) -> dict[str, str]:
  """Returns {ours: Hugging Face's} of one layer: attention, and the MLP after it."""
  table, mlp = {}, len(attention)
  for i, (norm, ours, theirs) in enumerate(attention):
    table[f'{norm}/scale'] = f'layer.{i}.layer_norm.weight'
    for our_name, their_name in ATTENTION.items():
      table[f'{ours}/{our_name}/kernel'] = f'layer.{i}.{theirs}.{their_name}.weight'
  table[_RELPOS] = 'layer.0.SelfAttention.relative_attention_bias.weight'
  table['pre_mlp_layer_norm/scale'] = f'layer.{mlp}.layer_norm.weight'
  for name in ('wi', 'wi_0', 'wi_1', 'wo'):
    table[f'mlp/{name}/kernel'] = f'layer.{mlp}.DenseReluDense.{name}.weight'
  return table


_BLOCKS = {
  'encoder': _block(('pre_attention_layer_norm', 'attention', 'SelfAttention')),
  'decoder': _block(
    ('pre_self_attention_layer_norm', 'self_attention', 'SelfAttention'),
    ('pre_cross_attention_layer_norm', 'encoder_decoder_attention', 'EncDecAttention'),
  ),
}

_WHOLE = {
  'token_embedder/embedding': 'shared.weight',
  'encoder/encoder_norm/scale': 'encoder.final_layer_norm.weight',
  'decoder/decoder_norm/scale': 'decoder.final_layer_norm.weight',
  'decoder/logits_dense/kernel': 'lm_head.weight',
  # One table a stack: Hugging Face keeps it in the first block.
  **{f'{side}/{_RELPOS}': f'{side}.block.0.{block[_RELPOS]}' for side, block in _BLOCKS.items()},
}

# What a decoder layer of a model with shared parameters borrows of the encoder's (Raffel et al.
# 2020, Table 2, 'Enc-dec, shared').
_BORROWED = {
  'pre_self_attention_layer_norm': 'pre_attention_layer_norm',
  'self_attention': 'attention',
  'pre_mlp_layer_norm': 'pre_mlp_layer_norm',
  'mlp': 'mlp',
}


def hf_name(name: str) -> str:
  """Returns Hugging Face's name of a canonical one."""
  if match := _LAYER.fullmatch(name):
    side, layer, rest = match.groups()
    return f'{side}.block.{layer}.{_BLOCKS[side][rest]}'
  return _WHOLE[name]


def of_hf(layers: Iterable[tuple[str, int]], *, per_layer: bool) -> dict[str, str]:
  """Returns the canonical names by Hugging Face's of any variant with these layers of stacks.

  Unless per_layer, the table of relative positions in the first of a stack is the stack's.
  """
  names = [f'{side}/layers_{i}/{rest}' for side, i in layers for rest in _BLOCKS[side]]
  wholes = [name for name in _WHOLE if not (per_layer and name.endswith(_RELPOS))]
  return {hf_name(name): name for name in (*names, *wholes)}


def is_transposed(name: str) -> bool:
  """True if Hugging Face stores the transpose: all matrices but embeddings."""
  return name.endswith(('/kernel', '/rel_embedding'))


def t5x_name(name: str, cfg: T5Config) -> str:
  """Returns T5X's name of a canonical one, below 'target/'."""
  # t5x/examples/decoder_only/network.py makes it inside the decoder.
  inside = cfg.architecture == 'decoder' and name == 'token_embedder/embedding'
  return f'decoder/{name}' if inside else name


def t5x_scanned_name(name: str) -> tuple[str, int | None]:
  """Returns (T5X's name in a scanned model, encoder/encoder/..., the layer), None for no layer."""
  if match := _LAYER.fullmatch(name):
    side, layer, rest = match.groups()
    return f'{side}/{side}/{rest}', int(layer)
  return name, None


def lender(name: str) -> str | None:
  """Returns the encoder's tensor that a shared decoder's tensor is, or None."""
  match = re.fullmatch(r'decoder/(layers_\d+)/([^/]+)/(.+)', name)
  theirs = _BORROWED.get(match[2]) if match else None
  return f'encoder/{match[1]}/{theirs}/{match[3]}' if match and theirs else None


def leaf_names(cfg: T5Config, path: Sequence[str]) -> list[str]:
  """Returns the canonical names of one leaf of our tree: one, or one a layer if it is stacked."""
  if 'layers' not in path:
    return ['/'.join(path)]
  side, _, *rest = path
  if rest[0].isdigit():  # the layer's number in a list
    return ['/'.join((side, f'layers_{rest[0]}', *rest[1:]))]
  layers = cfg.num_encoder_layers if side == 'encoder' else cfg.num_decoder_layers
  return ['/'.join((side, f'layers_{i}', *rest)) for i in range(layers)]


def is_stacked(cfg: T5Config, path: Sequence[str]) -> bool:
  """True if a leaf holds the layers of a stack, along its first dim."""
  return cfg.scan_layers and 'layers' in path


@functools.lru_cache(maxsize=64)
def leaves(cfg: T5Config) -> Sequence[tuple[tuple[str, ...], jax.ShapeDtypeStruct, Sequence[str]]]:
  """Returns (path, shape and dtype, canonical names) of our tree's leaves."""
  found = pytrees.leaves(t5.abstract_params(cfg)[1])
  return [(path, leaf, leaf_names(cfg, path)) for path, leaf in found]


@functools.lru_cache(maxsize=64)
def shapes(cfg: T5Config) -> Mapping[str, tuple[int, ...]]:
  """Returns the shape of every tensor by canonical name, in our tree's order: by parameter."""
  result = {}
  # Stacked shapes need one layer's abstract module, however deep the model.
  for path, leaf, names in leaves(cfg.replace(scan_layers=True)):
    shape = leaf.shape[1:] if 'layers' in path else leaf.shape
    result.update(dict.fromkeys(names, shape))
  return types.MappingProxyType(result)


def t5x_arrays(cfg: T5Config) -> dict[str, list[str]]:
  """Returns the canonical names in each array of T5X's, by its name below 'target/'.

  One a layer where relpos_per_layer, for which T5X has only the scanned network.
  """
  result: dict[str, list[str]] = {}
  for name in shapes(cfg):
    place = t5x_scanned_name(name)[0] if cfg.relpos_per_layer else t5x_name(name, cfg)
    result.setdefault(place, []).append(name)
  return result
