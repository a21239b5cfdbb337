"""Encoder and decoder layers, and the cache of a decoder.

Legend: B batch, L decoder length, M encoder length, T slots of a cache,
N layers, D emb_dim, H heads, K head_dim.
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
  """

  key_NBTHK: jax.Array
  value_NBTHK: jax.Array
  cross_key_NBMHK: jax.Array | None
  cross_value_NBMHK: jax.Array | None
  cross_mask_B11M: jax.Array | None
  index: jax.Array


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
      y_BLD = self.encoder_decoder_attention.attend(y_BLD, *cross_kv, mask=cross_mask, key=keys[0])
      y_BLD = _adapted(self, 'encoder_decoder_attention', y_BLD)
      # Where an example has no inputs, a query would average its neighbours'.
      seen_BL1 = sees_any(cross_mask)[:, :, None]
      y_BLD = jnp.where(seen_BL1, y_BLD, 0)
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

  def step(self, x_B1D, i, cache: Cache, cross_kv, lender, *, bias, mask):
    """One position; returns x_B1D and the cache with layer i written."""
    norm, attention = self.self_block(lender)
    T = cache.key_NBTHK.shape[2]
    if self.cfg.relpos_per_layer:
      bias = self.relpos_bias.at(cache.index, T)
    y_B1D = norm(x_B1D)
    k_B1HK, v_B1HK = attention.keys_values(y_B1D)
    key_NBTHK = _write(cache.key_NBTHK, k_B1HK, i, cache.index)
    value_NBTHK = _write(cache.value_NBTHK, v_B1HK, i, cache.index)
    y_B1D = attention.attend(y_B1D, key_NBTHK[i], value_NBTHK[i], bias=bias, mask=mask)
    y_B1D = _adapted(self, 'self_attention', y_B1D)
    x_B1D = self._rest(x_B1D + y_B1D, cross_kv, cache.cross_mask_B11M, lender, [None] * 4)
    return x_B1D, dataclasses.replace(cache, key_NBTHK=key_NBTHK, value_NBTHK=value_NBTHK)


def _write(cache_NBTHK, new_B1HK, i, index):
  """Writes one position of layer i in place, instead of copying the cache."""
  new_B1HK = new_B1HK.astype(cache_NBTHK.dtype)
  if index.ndim == 0:
    return jax.lax.dynamic_update_slice(cache_NBTHK, new_B1HK[None], (i, 0, index, 0, 0))
  rows_B = jnp.arange(new_B1HK.shape[0])
  return cache_NBTHK.at[i, rows_B, index].set(new_B1HK[:, 0])
