"""Reads a prompt into a decoder's cache in one pass.

For models without an encoder: a causal language model, or a prefix model,
whose prompt tokens see each other in both directions and therefore cannot be
fed one at a time.

Legend: B batch, P prompt length, T slots of a cache, V vocabulary, D emb_dim,
H heads, K head_dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_lite.models import attention
from t5x_lite.models.attention_inputs import Visibility
from t5x_lite.models.t5 import T5, Cache


def prefill(
  model: T5,
  tokens_BP: jax.Array,
  lengths_B: jax.Array,
  *,
  max_decode_length: int,
  bidirectional: bool,
) -> tuple[jax.Array, Cache]:
  """Returns logits_BV of the token after each prompt, and the cache.

  Args:
    model: without an encoder.
    tokens_BP: decoder inputs: the start token, then the prompt, then padding.
    lengths_B: how many of them are not padding, the start token counted.
    max_decode_length: T, slots of the cache; at least P.
    bidirectional: whether the prompt's tokens, and the start token, see each
      other in both directions (T5X's inputs_bidirectional_attention).
  """
  cfg = model.cfg
  B, P = tokens_BP.shape
  positions_P = jnp.arange(P)
  real_BP = positions_P[None, :] < lengths_B[:, None]
  visibility = Visibility(prefix_BL=real_BP if bidirectional else None, causal=True)
  mask = attention.mask(cfg.attention, visibility, P, P)
  bias = model.decoder.bias(P, P)
  cache = model.init_cache(None, None, batch_size=B, max_decode_length=max_decode_length)

  def body(x_BPD, layer):
    norm, self_attention = layer.self_block(None)
    k_BPHK, v_BPHK = self_attention.keys_values(norm(x_BPD))
    x_BPD = layer(x_BPD, None, None, bias=bias, mask=mask, cross_mask=None, key=None)
    return x_BPD, (k_BPHK, v_BPHK)

  x_BPD = model.token_embedder(tokens_BP)
  if cfg.scan_layers:
    x_BPD, (k_NBPHK, v_NBPHK) = jax.lax.scan(body, x_BPD, model.decoder.layers)
  else:
    pairs = []
    for layer in model.decoder.layers:
      x_BPD, pair = body(x_BPD, layer)
      pairs.append(pair)
    k_NBPHK, v_NBPHK = (jnp.stack(p) for p in zip(*pairs, strict=True))
  hidden_BPD = model.decoder.norm(x_BPD)
  # What follows a prompt is predicted at its last token; slots after it hold
  # padding, and are written over before they are seen.
  last_B = lengths_B - 1
  last_B1D = jnp.take_along_axis(hidden_BPD, last_B[:, None, None], axis=1)
  key_NBTHK = cache.key_NBTHK.at[:, :, :P].set(k_NBPHK.astype(cache.key_NBTHK.dtype))
  value_NBTHK = cache.value_NBTHK.at[:, :, :P].set(v_NBPHK.astype(cache.value_NBTHK.dtype))
  return model.project(last_B1D)[:, 0], dataclasses.replace(
    cache, key_NBTHK=key_NBTHK, value_NBTHK=value_NBTHK, index=lengths_B.astype(jnp.int32)
  )
