"""The model's configuration, and the published sizes by name.

`T5Config` is the only place where an architecture is described: variants are fields, not classes.
Field names are T5X's (t5x/examples/t5/network.py).
"""

import dataclasses
from typing import Any

from t5x_lite.errors import UsageError, check_fields, check_one_of

ARCHITECTURES = ('encoder_decoder', 'encoder', 'decoder')
DTYPES = ('float32', 'bfloat16', 'float16')
REMAT_POLICIES = ('none', 'minimal', 'save_names', 'full')
ATTENTIONS = ('auto', 'dense', 'blocked', 'pallas_tpu', 'pallas_gpu', 'cudnn')
ACTIVATIONS = ('relu', 'gelu', 'silu', 'swish', 'linear')
ADAPTER_PLACES = ('attention', 'mlp')
_ALLOWED = {
  'architecture': ARCHITECTURES,
  'dtype': DTYPES,
  'param_dtype': (*DTYPES, 'int8'),
  'remat_policy': REMAT_POLICIES,
  'attention': ATTENTIONS,
}
_SHAPE = 'emb_dim num_heads head_dim mlp_dim num_encoder_layers num_decoder_layers'.split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
  """Shape and numerics of a T5-family model.

  Attributes:
    vocab_size: rows of the embedding table; T5's 32,100 ids padded to 32,128.
    emb_dim: width of the residual stream (d_model).
    num_heads: attention heads.
    head_dim: width of one head (d_kv); not necessarily emb_dim / num_heads.
    mlp_dim: hidden width of the feed-forward block (d_ff).
    num_encoder_layers: depth of the encoder; unused when there is none.
    num_decoder_layers: depth of the decoder; unused when there is none.
    mlp_activations: ('relu',) in T5 1.0; ('gelu', 'linear') is T5 1.1's gated GELU, by tanh.
    logits_via_embedding: tie the output projection to the embedding (T5 1.0).
    scale_logits: multiply the head's input by emb_dim**-0.5; None, T5's, only with a tied head.
    dropout_rate: probability of dropping, wherever T5X drops.
    dtype: of activations; norms, softmax and logits are float32 regardless.
    param_dtype: of parameters at rest; 'int8' is for trained ones that are only read, and keeps
      matrices in 8 bits with a float32 scale for each output channel, the rest in float32.
    relpos_num_buckets: relative position buckets per head.
    relpos_max_distance: distance, in tokens, from which all share a bucket.
    relpos_per_layer: every layer owns a bias table (umT5) instead of one table a stack (T5).
    layer_norm_epsilon: added to the mean square inside the RMS norm.
    scan_layers: scan over stacked layers, so that compile time is independent of depth.
    remat_policy: what the backward pass recomputes: nothing ('none'), all but the outputs of weight
      matmuls ('minimal') or of blocks ('save_names'), whole layers ('full').
    attention: 'dense' holds the bias and the weights of every pair of positions, 'blocked' makes
      them block by block in memory that grows with the length alone, 'pallas_tpu' and 'pallas_gpu'
      do so in kernels, 'cudnn' is cuDNN's dense kernel (half precision). All give the same result;
      'auto' is 'dense' below 2,048 x 2,048 pairs (on CPUs 1,024 x 1,024), else 'blocked'.
    architecture: 'encoder_decoder', 'encoder' (embeddings) or 'decoder' (a language model).
    bidirectional_prefix: what a decoder continues is read in both directions (a prefix language
      model); training sets it by DatasetConfig.feature_converter.
    share_encoder_decoder: layers share parameters (Raffel et al. 2020, Table 2, 'Enc-dec, shared').
    lora_rank: rank of what LoRA adds to matrices; None adds nothing. With this or one of the next
      two, the rest of the model is frozen, unless OptimizerConfig.trainable says otherwise.
    adapter_dim: inner width of adapters (Raffel et al. 2020, 3.5.1), with which the norms train.
    prompt_length: trained vectors before the encoder's input; None adds none.
    lora_alpha: LoRA is scaled by lora_alpha / lora_rank; 1 by default.
    lora_targets: matrices: 'query' and 'value' by default, 'key', 'out', 'wi' or 'wi_0', ..., 'wo'.
    adapter_places: blocks that end with adapters: 'attention' (cross- too), 'mlp'; by default both.
    pad_id: the token id of padding.
    eos_id: the token id that ends a sequence.
    decoder_start_id: the first decoder input; T5 starts from padding.
  """

  vocab_size: int = 32128
  emb_dim: int = 512
  num_heads: int = 6
  head_dim: int = 64
  mlp_dim: int = 1024
  num_encoder_layers: int = 8
  num_decoder_layers: int = 8
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  logits_via_embedding: bool = False
  scale_logits: bool | None = None
  dropout_rate: float = 0.0
  dtype: str = 'bfloat16'
  param_dtype: str = 'float32'
  relpos_num_buckets: int = 32
  relpos_max_distance: int = 128
  relpos_per_layer: bool = False
  layer_norm_epsilon: float = 1e-6
  scan_layers: bool = True
  remat_policy: str = 'none'
  attention: str = 'auto'
  architecture: str = 'encoder_decoder'
  bidirectional_prefix: bool = False
  share_encoder_decoder: bool = False
  lora_rank: int | None = None
  adapter_dim: int | None = None
  prompt_length: int | None = None
  lora_alpha: float | None = None
  lora_targets: tuple[str, ...] = ()
  adapter_places: tuple[str, ...] = ()
  pad_id: int = 0
  eos_id: int = 1
  decoder_start_id: int = 0

  def __post_init__(self):
    # gin and JSON hand over lists; the config must stay hashable.
    for name in ('mlp_activations', 'lora_targets', 'adapter_places'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    stacks = {'num_encoder_layers': self.has_encoder, 'num_decoder_layers': self.has_decoder}
    positive = ('vocab_size', *_SHAPE[:4], *(name for name, there in stacks.items() if there))
    half_buckets = self.relpos_num_buckets // 2
    continues = self.architecture == 'decoder'
    alike = self.architecture == 'encoder_decoder'
    alike &= self.num_encoder_layers == self.num_decoder_layers
    check_fields(
      self,
      **{k: (getattr(self, k) in x, f'one of {", ".join(x)}') for k, x in _ALLOWED.items()},
      **{name: (getattr(self, name) >= 1, 'at least 1') for name in positive},
      relpos_num_buckets=(self.relpos_num_buckets >= 4, 'at least 4'),
      relpos_max_distance=(self.relpos_max_distance > half_buckets, 'above half of the buckets'),
      dropout_rate=(0.0 <= self.dropout_rate < 1.0, 'at least 0 and below 1'),
      bidirectional_prefix=(continues or not self.bidirectional_prefix, 'False but in a decoder'),
      share_encoder_decoder=(
        alike or not self.share_encoder_decoder,
        "False but in an 'encoder_decoder' with as many encoder as decoder layers",
      ),
    )
    if self.attention == 'cudnn' and self.dtype == 'float32':
      raise UsageError("T5Config.attention is 'cudnn', of half precision alone, dtype 'float32'")
    self._check_transfer()

  def _check_transfer(self) -> None:
    """Checks what transfer methods add, and fills in defaults; mlp_activations too."""
    for size, more in (
      ('lora_rank', ('lora_alpha', 'lora_targets')),
      ('adapter_dim', ('adapter_places',)),
      ('prompt_length', ()),
    ):
      value = getattr(self, size)
      if value is None and (alone := [name for name in more if getattr(self, name)]):
        raise UsageError(f'T5Config.{alone[0]} is set, but {size} is None: set it too')
      check_fields(self, **{size: (value is None or value >= 1, 'at least 1, or None for none')})
    if self.lora_rank is not None:
      object.__setattr__(self, 'lora_targets', self.lora_targets or ('query', 'value'))
      if self.lora_alpha is None:
        object.__setattr__(self, 'lora_alpha', float(self.lora_rank))
    if self.adapter_dim is not None:
      object.__setattr__(self, 'adapter_places', self.adapter_places or ADAPTER_PLACES)
    gated = len(self.mlp_activations) > 1
    mlp = [f'wi_{i}' for i in range(len(self.mlp_activations))] if gated else ['wi']
    targets = 'query', 'key', 'value', 'out', *mlp, 'wo'
    known: dict[str, tuple[str, ...]] = {'mlp_activations': ACTIVATIONS, 'lora_targets': targets}
    known['adapter_places'] = ADAPTER_PLACES
    reads = self.prompt_length is None or self.has_encoder
    check_fields(
      self,
      **{k: (set(getattr(self, k)) <= {*x}, f'of {", ".join(x)}') for k, x in known.items()},
      lora_alpha=(self.lora_alpha is None or self.lora_alpha > 0, 'positive'),
      prompt_length=(reads, 'None: there is no encoder, whose input a prompt stands before'),
    )

  def check_writable(self) -> None:
    """Raises UsageError if parameters are only to be read: not drawn, trained or saved."""
    another = "another: 'int8' is for load, infer, eval and serve"
    check_fields(self, param_dtype=(self.param_dtype != 'int8', another))

  @property
  def vector_dtype(self) -> str:
    """Dtype at rest of what is no matrix."""
    return 'float32' if self.param_dtype == 'int8' else self.param_dtype

  @property
  def has_encoder(self) -> bool:
    """Whether there is an encoder."""
    return self.architecture != 'decoder'

  @property
  def has_decoder(self) -> bool:
    """Whether there is a decoder."""
    return self.architecture != 'encoder'

  def replace(self, **changes: Any) -> 'T5Config':
    """Returns a copy with some fields changed; UsageError if there is no such field."""
    known = sorted(field.name for field in dataclasses.fields(self))
    for name in changes:
      if name not in known:
        raise UsageError(f'{name!r} is no field of T5Config; there are {", ".join(known)}')
    return dataclasses.replace(self, **changes)


def _sizes(family: dict[str, Any], **sizes: tuple[int, ...]) -> dict[str, T5Config]:
  """Named configs of one family from (emb, heads, head, mlp, enc, dec)."""
  return {
    size: T5Config(**family).replace(**dict(zip(_SHAPE, values, strict=True)))
    for size, values in sizes.items()
  }


_T5_1_1_SIZES = {
  'small': (512, 6, 64, 1024, 8, 8),
  'base': (768, 12, 64, 2048, 12, 12),
  'large': (1024, 16, 64, 2816, 24, 24),
  'xl': (2048, 32, 64, 5120, 24, 24),
  'xxl': (4096, 64, 64, 10240, 24, 24),
}

# Sources: Raffel et al. 2020, section 3.7 (T5 1.0); t5x/examples/t5/*/*.gin (1.1, mT5, ByT5, umT5);
# Tay et al. 2022 (UL2). A test compares every parameter count with HF's PyTorch model.
_FAMILIES: dict[str, dict[str, T5Config]] = {
  't5_1_0': _sizes(
    {'mlp_activations': ('relu',), 'logits_via_embedding': True},
    small=(512, 8, 64, 2048, 6, 6),
    base=(768, 12, 64, 3072, 12, 12),
    large=(1024, 16, 64, 4096, 24, 24),
    **{'3b': (1024, 32, 128, 16384, 24, 24), '11b': (1024, 128, 128, 65536, 24, 24)},
  ),
  't5_1_1': _sizes({}, **_T5_1_1_SIZES),
  'mt5': _sizes({'vocab_size': 250112}, **_T5_1_1_SIZES),
  'umt5': _sizes({'vocab_size': 256384, 'relpos_per_layer': True}, **_T5_1_1_SIZES),
  'byt5': _sizes(
    {'vocab_size': 384},
    small=(1472, 6, 64, 3584, 12, 4),
    base=(1536, 12, 64, 3968, 18, 6),
    large=(1536, 16, 64, 3840, 36, 12),
    xl=(2560, 32, 64, 6720, 36, 12),
    xxl=(4672, 64, 64, 12352, 36, 12),
  ),
  'ul2': _sizes({'mlp_activations': ('silu', 'linear')}, **{'20b': (4096, 16, 256, 16384, 32, 32)}),
}
# The same architecture under the name of its fine-tuned or adapted weights.
_FAMILIES['t5_1_1_lm'] = _FAMILIES['t5_1_1']
_FAMILIES['flan_t5'] = _FAMILIES['t5_1_1']
_FAMILIES['flan_ul2'] = _FAMILIES['ul2']

NAMED_CONFIGS: dict[str, T5Config] = {
  f'{family}_{size}': config
  for family, sizes in _FAMILIES.items()
  for size, config in sizes.items()
}


def named_config(name: str, **overrides: Any) -> T5Config:
  """Returns a published size, for example 't5_1_1_small'; UsageError if there is no such."""
  check_one_of('the name of a size', name, NAMED_CONFIGS)
  return dataclasses.replace(NAMED_CONFIGS[name], **overrides)
