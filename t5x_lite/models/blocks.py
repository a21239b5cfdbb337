"""Encoder and decoder layers, and the cache of a decoder.

Legend: B batch, L decoder length, M encoder length, T slots of a cache, N layers, D emb_dim, H
heads, K head_dim, R rows of a cache (n of each input).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.models import layers
from t5x_lite.models.attention_inputs import sees_any
from t5x_lite.models.config import T5Config
from t5x_lite.models.relative_position import RelativePositionBias
from t5x_lite.parallel.logical_axes import constrain

# What the remat policy 'save_names' keeps.
SAVED_NAMES = ('attention_out', 'cross_attention_out', 'mlp_out')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What the decoder remembers between steps.

  Attributes:
    key_NBTHK: self-attention keys; slots at and after index are unwritten.
    value_NBTHK: self-attention values.
    cross_key_NBMHK: keys of the encoder output, computed once; or None.
    cross_value_NBMHK: values of the encoder output; or None.
    cross_mask_B11M: True at real encoder positions; or None.
    index: int32, the position of the next token: a scalar, or [B].
    owner_BnT: in beam search, the beam whose row holds what beam n read in each slot. Beams go on
      from others by changing this; keys and values stay where they are. None if every row reads its
      own.
    seen_B: in continuous batching, how many tokens each row has decoded, T - 1 at most. Slots are
      then a ring that all rows write at the same index, however long they are there: a row sees as
      many slots back as it has decoded, and T5's bias knows distances alone. None otherwise.
  """

  key_NBTHK: jax.Array
  value_NBTHK: jax.Array
  cross_key_NBMHK: jax.Array | None
  cross_value_NBMHK: jax.Array | None
  cross_mask_B11M: jax.Array | None
  index: jax.Array
  owner_BnT: jax.Array | None = None
  seen_B: jax.Array | None = None

  def grown(self, T: int) -> 'Cache':
    """Returns it with T slots."""
    more = T - self.key_NBTHK.shape[2]
    pads = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
    owner = self.owner_BnT
    return dataclasses.replace(
      self,
      key_NBTHK=jnp.pad(self.key_NBTHK, pads),
      value_NBTHK=jnp.pad(self.value_NBTHK, pads),
      owner_BnT=None if owner is None else jnp.pad(owner, ((0, 0), (0, 0), (0, more))),
    )

  def for_beams(self, num_beams: int) -> 'Cache':
    """Returns it for beam search; what it holds is the same in all beams of an input."""
    R, T = self.key_NBTHK.shape[1:3]
    return dataclasses.replace(self, owner_BnT=jnp.zeros((R // num_beams, num_beams, T), jnp.int32))

  def reordered(self, parents_Bn: jax.Array) -> 'Cache':
    """Returns it so that beam n of an input goes on from beam parents_Bn[n]."""
    assert self.owner_BnT is not None
    owner_BnT = jnp.take_along_axis(self.owner_BnT, parents_Bn[:, :, None], axis=1)
    return dataclasses.replace(self, owner_BnT=owner_BnT)

  def next_slot(self) -> tuple['Cache', jax.Array]:
    """Returns it with the next slot owned by the row that writes it, and the mask.

    The mask is [R or 1, 1, 1, T]; with beams [B, 1, n, n T]: the beams of an input see each other's
    rows, and of these what they have read.
    """
    T = self.key_NBTHK.shape[2]
    slots_11T = jnp.arange(T)[None, None, :]
    if self.seen_B is not None:
      return self, ((self.index - slots_11T) % T <= self.seen_B[:, None, None])[:, None]
    if self.owner_BnT is None:
      return self, (slots_11T <= jnp.atleast_1d(self.index)[:, None, None])[:, None]
    B, n, _ = self.owner_BnT.shape
    beams_n = jnp.arange(n)
    index_Bn1 = jnp.broadcast_to(self.index, (B * n,)).reshape(B, n, 1)
    owner_BnT = jnp.where(slots_11T == index_Bn1, beams_n[None, :, None], self.owner_BnT)
    mine_BnmT = owner_BnT[:, :, None, :] == beams_n[None, None, :, None]
    mine_BnmT &= (slots_11T <= index_Bn1)[:, :, None, :]
    mask_B1nS = mine_BnmT.reshape(B, 1, n, n * T)
    return dataclasses.replace(self, owner_BnT=owner_BnT), mask_B1nS

  def advanced(self) -> 'Cache':
    """Returns it for the next position."""
    if self.seen_B is None:
      return dataclasses.replace(self, index=self.index + 1)
    T = self.key_NBTHK.shape[2]
    seen_B = jnp.minimum(self.seen_B + 1, T - 1)
    return dataclasses.replace(self, index=(self.index + 1) % T, seen_B=seen_B)

  def bias(self, relpos_bias: RelativePositionBias) -> jax.Array:
    """Returns the bias of the next position for the mask of `next_slot`."""
    T = self.key_NBTHK.shape[2]
    if self.seen_B is not None:
      return relpos_bias.around(self.index, T)
    return self.over_beams(relpos_bias.at(self.index, T))

  def over_beams(self, bias_RH1T: jax.Array) -> jax.Array:
    """Returns the bias of one position for the mask of `next_slot`."""
    if self.owner_BnT is None:
      return bias_RH1T
    B, n, _ = self.owner_BnT.shape
    if bias_RH1T.shape[0] == B * n and B * n > 1:  # a position for each row
      _, H, _, T = bias_RH1T.shape
      bias_RH1T = bias_RH1T.reshape(B, n, H, T).transpose(0, 2, 1, 3)
    return jnp.tile(bias_RH1T, (1, 1, 1, n))


def _add_adapters(layer: nnx.Module, cfg: T5Config, *blocks: str, rngs) -> None:
  """Gives a layer the adapters that stand after its blocks."""
  for block in blocks:
    if ('mlp' if block == 'mlp' else 'attention') in cfg.adapter_places:
      setattr(layer, f'{block}_adapter', layers.Adapter(cfg, rngs=rngs))


def _adapted(layer: nnx.Module, block: str, y_BLD: jax.Array) -> jax.Array:
  """Applies the adapter after a block, if there is one."""
  adapter = getattr(layer, f'{block}_adapter', None)
  return y_BLD if adapter is None else adapter(y_BLD)


class EncoderLayer(nnx.Module):
  """Self-attention and feed-forward, each with a norm before and a residual."""

  def __init__(self, cfg: T5Config, *, rngs):
    self.cfg = cfg
    self.pre_attention_layer_norm = layers.RMSNorm(cfg, rngs=rngs)
    self.attention = layers.Attention(cfg, rngs=rngs)
    self.pre_mlp_layer_norm = layers.RMSNorm(cfg, rngs=rngs)
    self.mlp = layers.MLP(cfg, rngs=rngs)
    if cfg.relpos_per_layer:
      self.relpos_bias = RelativePositionBias(cfg, bidirectional=True, rngs=rngs)
    _add_adapters(self, cfg, 'attention', 'mlp', rngs=rngs)

  def __call__(self, x_BMD, *, bias, mask, key) -> jax.Array:
    """Runs the layer on the residual stream."""
    keys = layers.split_key(key, 4)
    rate, M = self.cfg.dropout_rate, x_BMD.shape[1]
    if self.cfg.relpos_per_layer:
      bias = self.relpos_bias.of(M, M)
    y_BMD = self.pre_attention_layer_norm(x_BMD)
    y_BMD = self.attention(y_BMD, y_BMD, bias=bias, mask=mask, key=keys[0])
    y_BMD = checkpoint_name(_adapted(self, 'attention', y_BMD), 'attention_out')
    x_BMD = x_BMD + layers.dropout(y_BMD, rate, keys[1])
    y_BMD = self.mlp(self.pre_mlp_layer_norm(x_BMD), key=keys[2])
    y_BMD = checkpoint_name(_adapted(self, 'mlp', y_BMD), 'mlp_out')
    x_BMD = x_BMD + layers.dropout(y_BMD, rate, keys[3])
    return constrain(x_BMD, 'batch', 'length', 'embed')


class DecoderLayer(nnx.Module):
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
    if cfg.relpos_per_layer:
      self.relpos_bias = RelativePositionBias(cfg, bidirectional=False, rngs=rngs)
    # Its own, even where the rest is lent.
    cross = ('encoder_decoder_attention',) if cfg.has_encoder else ()
    _add_adapters(self, cfg, 'self_attention', *cross, 'mlp', rngs=rngs)

  def self_block(self, lender: EncoderLayer | None):
    """Returns the norm and the attention of the self-attention block."""
    if lender is None:
      return self.pre_self_attention_layer_norm, self.self_attention
    return lender.pre_attention_layer_norm, lender.attention

  def _rest(self, x_BLD, cross_kv, cross_mask, lender, keys) -> jax.Array:
    """What follows self-attention: cross-attention and feed-forward."""
    rate = self.cfg.dropout_rate
    if self.cfg.has_encoder:
      y_BLD = self.pre_cross_attention_layer_norm(x_BLD)
      # Several rows of one input (beams) are several queries of it.
      y_BLD = y_BLD.reshape(cross_kv[0].shape[0], -1, y_BLD.shape[-1])
      y_BLD = self.encoder_decoder_attention.attend(y_BLD, *cross_kv, mask=cross_mask, key=keys[0])
      y_BLD = _adapted(self, 'encoder_decoder_attention', y_BLD)
      # Where an example has no inputs, a query would average its neighbours'.
      seen_BL1 = sees_any(cross_mask)[:, :, None]
      y_BLD = jnp.where(seen_BL1, y_BLD, 0).reshape(x_BLD.shape)
      y_BLD = checkpoint_name(y_BLD, 'cross_attention_out')
      x_BLD = x_BLD + layers.dropout(y_BLD, rate, keys[1])
    owner = self if lender is None else lender
    y_BLD = owner.mlp(owner.pre_mlp_layer_norm(x_BLD), key=keys[2])
    y_BLD = checkpoint_name(_adapted(self, 'mlp', y_BLD), 'mlp_out')
    x_BLD = x_BLD + layers.dropout(y_BLD, rate, keys[3])
    return constrain(x_BLD, 'batch', 'length', 'embed')

  def __call__(self, x_BLD, encoded_BMD, lender, *, bias, mask, cross_mask, key) -> jax.Array:
    """Runs the layer on the residual stream; lender owns shared weights."""
    keys = layers.split_key(key, 6)
    L = x_BLD.shape[1]
    if self.cfg.relpos_per_layer:
      bias = self.relpos_bias.of(L, L)
    norm, attention = self.self_block(lender)
    y_BLD = norm(x_BLD)
    y_BLD = attention(y_BLD, y_BLD, bias=bias, mask=mask, key=keys[0])
    y_BLD = checkpoint_name(_adapted(self, 'self_attention', y_BLD), 'attention_out')
    x_BLD = x_BLD + layers.dropout(y_BLD, self.cfg.dropout_rate, keys[1])
    cross_kv = None
    if self.cfg.has_encoder:
      cross_kv = self.encoder_decoder_attention.keys_values(encoded_BMD)
    return self._rest(x_BLD, cross_kv, cross_mask, lender, keys[2:])

  def read(self, x_BPD, cross_kv, cross_mask, lender, *, bias, mask):
    """Reads a prompt; returns x_BPD, and its keys and values of self-attention."""
    norm, attention = self.self_block(lender)
    if self.cfg.relpos_per_layer:
      bias = self.relpos_bias.of(x_BPD.shape[1], x_BPD.shape[1])
    y_BPD = norm(x_BPD)
    k_BPHK, v_BPHK = attention.keys_values(y_BPD)
    y_BPD = attention.attend(y_BPD, k_BPHK, v_BPHK, bias=bias, mask=mask)
    y_BPD = _adapted(self, 'self_attention', y_BPD)
    x_BPD = self._rest(x_BPD + y_BPD, cross_kv, cross_mask, lender, [None] * 4)
    return x_BPD, (k_BPHK, v_BPHK)

  def step(self, x_B1D, i, cache: Cache, cross_kv, lender, *, bias, mask):
    """One position; returns x_B1D and the cache with layer i written."""
    norm, attention = self.self_block(lender)
    if self.cfg.relpos_per_layer:
      bias = cache.bias(self.relpos_bias)
    y_B1D = norm(x_B1D)
    q_B1HK, (k_B1HK, v_B1HK) = attention.queries(y_B1D), attention.keys_values(y_B1D)
    key_NBTHK = _write(cache.key_NBTHK, k_B1HK, i, cache.index)
    value_NBTHK = _write(cache.value_NBTHK, v_B1HK, i, cache.index)
    k_BTHK, v_BTHK = key_NBTHK[i], value_NBTHK[i]
    if cache.owner_BnT is not None:
      # The rows of an input's beams side by side, and the beams as queries.
      B = cache.owner_BnT.shape[0]
      k_BTHK, v_BTHK = (x.reshape(B, -1, *x.shape[2:]) for x in (k_BTHK, v_BTHK))
      q_B1HK = q_B1HK.reshape(B, -1, *q_B1HK.shape[2:])
    y_B1D = attention.attend(q_B1HK, k_BTHK, v_BTHK, bias=bias, mask=mask)
    x_B1D = x_B1D + _adapted(self, 'self_attention', y_B1D.reshape(x_B1D.shape))
    x_B1D = self._rest(x_B1D, cross_kv, cache.cross_mask_B11M, lender, [None] * 4)
    return x_B1D, dataclasses.replace(cache, key_NBTHK=key_NBTHK, value_NBTHK=value_NBTHK)


def _write(cache_NBTHK, new_B1HK, i, index):
  """Writes one position of layer i in place, instead of copying the cache."""
  new_B1HK = new_B1HK.astype(cache_NBTHK.dtype)
  if index.ndim == 0:
    return jax.lax.dynamic_update_slice(cache_NBTHK, new_B1HK[None], (i, 0, index, 0, 0))
  rows_B = jnp.arange(new_B1HK.shape[0])
  return cache_NBTHK.at[i, rows_B, index].set(new_B1HK[:, 0])
