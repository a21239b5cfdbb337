"""Encoder and decoder layers, and the cache of a decoder.

Legend: B batch, L decoder length, M encoder length, T positions of a cache, N layers, D emb_dim, H
heads, K head_dim, R rows that are decoded, n of them for each input, S slots of a cache's row: T,
but T n with beams, where all of an input share a row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.models import layers
from t5x_lite.models.attention import weights
from t5x_lite.models.attention_inputs import sees_any
from t5x_lite.models.config import T5Config
from t5x_lite.models.relative_position import RelativePositionBias
from t5x_lite.parallel.logical_axes import constrain

# What the remat policy 'save_names' keeps.
SAVED_NAMES = ('attention_out', 'cross_attention_out', 'mlp_out')


# [N, ...], or an array of each layer.
PerLayer = jax.Array | list


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What the decoder remembers between steps.

  Heads come before positions: a step multiplies each head's keys as they lie. Where layers are a
  list, so are the arrays that begin with N: a step need not cut them out of one.
  """

  key_NBHSK: PerLayer  # self-attention keys; those of positions from index on are unwritten
  value_NBHSK: PerLayer  # self-attention values
  cross_key_NBHMK: PerLayer | None  # keys of the encoder output, or None as the next two
  cross_value_NBHMK: PerLayer | None  # values of the encoder output
  cross_mask_B11M: jax.Array | None  # True at real encoder positions
  index: jax.Array  # int32, the position of the next token: a scalar, or [R]
  # In beam search, the beam that wrote what beam n has read at each position, its slot: beams go on
  # from others by changing this, and keys and values stay. None if every row reads its own.
  owner_BnT: jax.Array | None = None
  # In continuous batching, how many tokens each row has decoded, T - 1 at most. Slots are then a
  # ring that all rows write at the same index: a row sees as many slots back as it has decoded, and
  # T5's bias knows distances alone. None otherwise.
  seen_B: jax.Array | None = None

  @property
  def num_beams(self) -> int:
    """How many rows read each other's slots."""
    return 1 if self.owner_BnT is None else self.owner_BnT.shape[1]

  @property
  def length(self) -> int:
    """T."""
    return self.key_NBHSK[0].shape[-2] // self.num_beams

  def grown(self, T: int) -> 'Cache':
    """Returns it with room for T positions."""
    more = T - self.length
    grown = self._padded(more * self.num_beams, -2, 'key_NBHSK', 'value_NBHSK')
    return grown._padded(more, -1, 'owner_BnT')

  def widened(self, M: int) -> 'Cache':
    """Returns it with room for inputs of M tokens."""
    assert self.cross_mask_B11M is not None
    more = M - self.cross_mask_B11M.shape[-1]
    wide = self._padded(more, -2, 'cross_key_NBHMK', 'cross_value_NBHMK')
    return wide._padded(more, -1, 'cross_mask_B11M')

  def _padded(self, more: int, dim: int, *names: str) -> 'Cache':
    """Returns it with `more` zeros at the end of a dim of some fields."""

    def pad(x):
      return jnp.pad(x, [(0, more if i == x.ndim + dim else 0) for i in range(x.ndim)])

    fields = {name: jax.tree.map(pad, getattr(self, name)) for name in names}
    return dataclasses.replace(self, **fields)

  def for_beams(self, num_beams: int) -> 'Cache':
    """Returns it for beam search; what it holds is the same in all beams of an input."""

    def side_by_side(x_NRHTK):
      *N, R, H, T, K = x_NRHTK.shape
      x_NBnHTK = x_NRHTK.reshape(*N, R // num_beams, num_beams, H, T, K)
      x_NBHTnK = jnp.moveaxis(x_NBnHTK, -4, -2)
      return x_NBHTnK.reshape(*N, R // num_beams, H, T * num_beams, K)

    keys, values = jax.tree.map(side_by_side, (self.key_NBHSK, self.value_NBHSK))
    owner_BnT = jnp.zeros((keys[0].shape[-4], num_beams, self.length), jnp.int32)
    return dataclasses.replace(self, key_NBHSK=keys, value_NBHSK=values, owner_BnT=owner_BnT)

  def reordered(self, parents_Bn: jax.Array) -> 'Cache':
    """Returns it so that beam n of an input goes on from beam parents_Bn[n]."""
    assert self.owner_BnT is not None
    owner_BnT = jnp.take_along_axis(self.owner_BnT, parents_Bn[:, :, None], axis=1)
    return dataclasses.replace(self, owner_BnT=owner_BnT)

  def next_slots(self, L: int) -> tuple['Cache', jax.Array]:
    """Returns it with the next slot owned by the row that writes it, and the mask of L queries.

    The mask is [R or 1, 1, L, T]; with beams [B, 1, n, T n]: of all slots those read.
    """
    assert L == 1 or (self.seen_B is None and self.owner_BnT is None)
    T = self.length
    slots_11T = jnp.arange(T)[None, None, :]
    if self.seen_B is not None:
      return self, ((self.index - slots_11T) % T <= self.seen_B[:, None, None])[:, None]
    if self.owner_BnT is None:
      at_RL = jnp.atleast_1d(self.index)[:, None] + jnp.arange(L)[None, :]
      return self, (slots_11T <= at_RL[:, :, None])[:, None]
    B, n, _ = self.owner_BnT.shape
    beams_n, index_Bn1 = np.arange(n), jnp.broadcast_to(self.index, (B * n,)).reshape(B, n, 1)
    owner_BnT = jnp.where(slots_11T == index_Bn1, beams_n[None, :, None], self.owner_BnT)
    mine_BnTm = owner_BnT[..., None] == beams_n[None, None, None]
    mine_BnTm &= (slots_11T <= index_Bn1)[..., None]
    return dataclasses.replace(self, owner_BnT=owner_BnT), mine_BnTm.reshape(B, 1, n, T * n)

  def advanced(self, L: int) -> 'Cache':
    """Returns it for the position after the next L."""
    if self.seen_B is None:
      return dataclasses.replace(self, index=self.index + L)
    T = self.length
    seen_B = jnp.minimum(self.seen_B + 1, T - 1)
    return dataclasses.replace(self, index=(self.index + 1) % T, seen_B=seen_B)

  def rewound(self, index: jax.Array) -> 'Cache':
    """Returns it for the position `index`; what was read from there on is never seen."""
    return dataclasses.replace(self, index=index)

  def bias(self, relpos_bias: RelativePositionBias, L: int) -> jax.Array:
    """Returns the bias of the next L positions for the mask of `next_slots`."""
    T = self.length
    if self.seen_B is not None:
      return relpos_bias.around(self.index, T)
    bias_RHLT = relpos_bias.at(self.index, T, L)
    if self.owner_BnT is None:
      return bias_RHLT
    B, n, _ = self.owner_BnT.shape
    if bias_RHLT.shape[0] == B * n and B * n > 1:  # a position for each row
      bias_RHLT = bias_RHLT.reshape(B, n, -1, T).swapaxes(1, 2)
    return jnp.repeat(bias_RHLT, n, axis=-1)


class _Layer(nnx.Module):
  """What layers of the encoder and of the decoder share."""

  cfg: T5Config

  def _finish(self, *blocks: str, bidirectional: bool, rngs) -> None:
    """Adds a layer's own bias, and the adapters that stand after its blocks."""
    if self.cfg.relpos_per_layer:
      self.relpos_bias = RelativePositionBias(self.cfg, bidirectional=bidirectional, rngs=rngs)
    for block in blocks:
      if ('mlp' if block == 'mlp' else 'attention') in self.cfg.adapter_places:
        setattr(self, f'{block}_adapter', layers.Adapter(self.cfg, rngs=rngs))

  def _attend_self(self, norm, attention, x_BLD, bias, mask, key=None):
    """Returns what self-attention makes of several positions, and its keys and values."""
    y_BLD, L = norm(x_BLD), x_BLD.shape[1]
    # The layer's own bias, or the one that all share.
    bias = self.relpos_bias.of(L, L) if self.cfg.relpos_per_layer else bias
    kv = attention.keys_values(y_BLD)
    q_BLHK = attention.queries(y_BLD)
    return attention.attend(q_BLHK, *kv, bias=bias, mask=mask, key=key), kv

  def _add(self, x_BLD, y_BLD, block: str, saved: str, key=None) -> jax.Array:
    """Returns the residual stream after a block: its adapter, if any, and dropout."""
    adapter = getattr(self, f'{block}_adapter', None)
    y_BLD = checkpoint_name(y_BLD if adapter is None else adapter(y_BLD), saved)
    return x_BLD + layers.dropout(y_BLD, self.cfg.dropout_rate, key)

  def _add_mlp(self, x_BLD, owner, keys) -> jax.Array:
    """Runs the feed-forward block, whose parameters are the owner's."""
    y_BLD = owner.mlp(owner.pre_mlp_layer_norm(x_BLD), key=keys[0])
    x_BLD = self._add(x_BLD, y_BLD, 'mlp', 'mlp_out', keys[1])
    return constrain(x_BLD, 'batch', 'length', 'embed')


class EncoderLayer(_Layer):
  """Self-attention and feed-forward, each with a norm before and a residual."""

  def __init__(self, cfg: T5Config, *, rngs):
    self.cfg = cfg
    self.pre_attention_layer_norm = layers.RMSNorm(cfg, rngs=rngs)
    self.attention = layers.Attention(cfg, rngs=rngs)
    self.pre_mlp_layer_norm = layers.RMSNorm(cfg, rngs=rngs)
    self.mlp = layers.MLP(cfg, rngs=rngs)
    self._finish('attention', 'mlp', bidirectional=True, rngs=rngs)

  def __call__(self, x_BMD, *, bias, mask, key) -> jax.Array:
    """Runs the layer on the residual stream."""
    keys = layers.split_key(key, 4)
    block = self.pre_attention_layer_norm, self.attention
    y_BMD, _ = self._attend_self(*block, x_BMD, bias, mask, keys[0])
    x_BMD = self._add(x_BMD, y_BMD, 'attention', 'attention_out', keys[1])
    return self._add_mlp(x_BMD, self, keys[2:])


class DecoderLayer(_Layer):
  """Causal self-attention, cross-attention where there is an encoder, MLP."""

  def __init__(self, cfg: T5Config, *, rngs):
    self.cfg = cfg
    # With shared parameters the encoder layer lends its attention and MLP.
    if not cfg.share_encoder_decoder:
      self.pre_self_attention_layer_norm = layers.RMSNorm(cfg, rngs=rngs)
      self.self_attention = layers.Attention(cfg, rngs=rngs)
    if cfg.has_encoder:
      self.pre_cross_attention_layer_norm = layers.RMSNorm(cfg, rngs=rngs)
      self.encoder_decoder_attention = layers.Attention(cfg, rngs=rngs)
    if not cfg.share_encoder_decoder:
      self.pre_mlp_layer_norm = layers.RMSNorm(cfg, rngs=rngs)
      self.mlp = layers.MLP(cfg, rngs=rngs)
    # Its own, even where the rest is lent.
    cross = ('encoder_decoder_attention',) if cfg.has_encoder else ()
    self._finish('self_attention', *cross, 'mlp', bidirectional=False, rngs=rngs)

  def self_block(self, lender: EncoderLayer | None):
    """Returns the norm and the attention of the self-attention block."""
    if lender is None:
      return self.pre_self_attention_layer_norm, self.self_attention
    return lender.pre_attention_layer_norm, lender.attention

  def _rest(self, x_BLD, y_BLD, cross_kv, cross_mask, lender, keys) -> jax.Array:
    """What follows self-attention, which gave y: cross-attention and feed-forward."""
    x_BLD = self._add(x_BLD, y_BLD, 'self_attention', 'attention_out', keys[0])
    if self.cfg.has_encoder:
      y_BLD = self.pre_cross_attention_layer_norm(x_BLD)
      # Several rows of one input (beams) are several queries of it.
      y_BLD = y_BLD.reshape(cross_kv[0].shape[0], -1, y_BLD.shape[-1])
      q_BLHK = self.encoder_decoder_attention.queries(y_BLD)
      y_BLD = self.encoder_decoder_attention.attend(q_BLHK, *cross_kv, mask=cross_mask, key=keys[1])
      # Where an example has no inputs, a query would average its neighbours'; adapters keep 0.
      y_BLD = jnp.where(sees_any(cross_mask)[:, :, None], y_BLD, 0).reshape(x_BLD.shape)
      x_BLD = self._add(x_BLD, y_BLD, 'encoder_decoder_attention', 'cross_attention_out', keys[2])
    return self._add_mlp(x_BLD, self if lender is None else lender, keys[3:])

  def read(self, x_BLD, cross_kv, lender, *, bias, mask, cross_mask, key=None):
    """Reads several positions; returns x_BLD, and keys and values of self-attention.

    cross_kv is None without an encoder, lender the layer that owns shared parameters, or None.
    """
    keys = layers.split_key(key, 6)
    y_BLD, kv = self._attend_self(*self.self_block(lender), x_BLD, bias, mask, keys[0])
    return self._rest(x_BLD, y_BLD, cross_kv, cross_mask, lender, keys[1:]), kv

  def cross_weights(self, x_BLD, cross_kv, lender, *, bias, mask, cross_mask) -> jax.Array:
    """Returns weights_BHLM, where cross-attention looks; the arguments are those of `read`."""
    y_BLD, _ = self._attend_self(*self.self_block(lender), x_BLD, bias, mask)
    y_BLD = self._add(x_BLD, y_BLD, 'self_attention', 'attention_out')
    q_BLHK = self.encoder_decoder_attention.queries(self.pre_cross_attention_layer_norm(y_BLD))
    q_BHLK, k_BHMK = (x.swapaxes(1, 2) for x in (q_BLHK, cross_kv[0]))
    return weights(q_BHLK, k_BHMK, mask_B1LM=cross_mask)

  def step(self, x_BLD, i, cache: Cache, cross_kv, lender, *, bias, mask):
    """The next positions; returns x_BLD and the cache with layer i written."""
    norm, attention = self.self_block(lender)
    if self.cfg.relpos_per_layer:
      bias = cache.bias(self.relpos_bias, x_BLD.shape[1])
    y_BLD = norm(x_BLD)
    q_BLHK, (k_BLHK, v_BLHK) = attention.queries(y_BLD), attention.keys_values(y_BLD)
    key_NBHSK = _write(cache.key_NBHSK, k_BLHK, i, cache.index)
    value_NBHSK = _write(cache.value_NBHSK, v_BLHK, i, cache.index)
    kv = [x[i].swapaxes(1, 2) for x in (key_NBHSK, value_NBHSK)]
    # The beams of an input are queries of their row.
    q_BLHK = q_BLHK.reshape(kv[0].shape[0], -1, *q_BLHK.shape[2:])
    y_BLD = attention.attend(q_BLHK, *kv, bias=bias, mask=mask).reshape(x_BLD.shape)
    x_BLD = self._rest(x_BLD, y_BLD, cross_kv, cache.cross_mask_B11M, lender, [None] * 5)
    return x_BLD, dataclasses.replace(cache, key_NBHSK=key_NBHSK, value_NBHSK=value_NBHSK)


def _write(cache_NBHSK, new_RLHK, i, index):
  """Writes positions of layer i in place, instead of copying the cache."""
  if isinstance(cache_NBHSK, list):
    written = _write(cache_NBHSK[i], new_RLHK, None, index)
    return [*cache_NBHSK[:i], written, *cache_NBHSK[i + 1 :]]
  layer, B = () if i is None else (i,), cache_NBHSK.shape[-4]
  _, L, H, K = new_RLHK.shape
  # Several queries of a row are its beams, whose slots are side by side, or positions.
  new_BSHK = new_RLHK.reshape(B, -1, H, K).astype(cache_NBHSK.dtype)
  n = new_BSHK.shape[1] // L
  if index.ndim == 0:
    new_BHSK = new_BSHK.swapaxes(1, 2)
    new_NBHSK = new_BHSK if i is None else new_BHSK[None]
    return jax.lax.dynamic_update_slice(cache_NBHSK, new_NBHSK, (*layer, 0, 0, index * n, 0))
  at_BnL = index.reshape(B, n, 1) * n + (np.arange(n)[:, None] + np.arange(L))[None]
  at = (*layer, jnp.arange(B)[:, None], slice(None), at_BnL.reshape(B, -1))
  return cache_NBHSK.at[at].set(new_BSHK, mode='drop')
