"""Reads a prompt into a decoder's cache in one pass.

The prompt of a language model, causal or with a prefix whose tokens see each other (which cannot be
fed one at a time), or what the outputs of an encoder-decoder begin with.

Legend: B batch, P prompt length, T slots of a cache, V vocabulary, D emb_dim, H heads, K head_dim,
N layers, R rows of a cache (n of each prompt).
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from t5x_lite.models import attention
from t5x_lite.models.attention_inputs import Visibility
from t5x_lite.models.t5 import T5, Cache, over_layers


def prefill(model: T5, cache: Cache, tokens_BP: Array, lengths_B: Array) -> tuple[Array, Cache]:
  """Returns logits_RV of the token after each prompt, and the cache.

  The cache is empty, of a multiple of B rows and at least P slots; decoder inputs are the start
  token, the prompt, then padding, and lengths count what is not padding. With bidirectional_prefix
  the prompt's tokens and the start token see each other (T5X's inputs_bidirectional_attention).
  """
  cfg = model.cfg
  B, P = tokens_BP.shape
  positions_P = jnp.arange(P)
  real_BP = positions_P[None, :] < lengths_B[:, None]
  visibility = Visibility(prefix_BL=real_BP if cfg.bidirectional_prefix else None, causal=True)
  mask = attention.mask(cfg.attention, visibility, P, P)
  bias = model.decoder.bias(P, P)

  def body(x_BPD, xs):
    layer, cross_kv, lender = xs
    return layer.read(
      x_BPD, cross_kv, lender, bias=bias, mask=mask, cross_mask=cache.cross_mask_B11M
    )

  cross = (cache.cross_key_NBMHK, cache.cross_value_NBMHK)
  x_BPD = model.token_embedder(tokens_BP)
  x_BPD, kv = over_layers(body, x_BPD, model.decoder.layers, cross, model.lenders())
  hidden_BPD = model.decoder.norm(x_BPD)
  # What follows a prompt is predicted at its last token; slots after it hold padding, and are
  # written over before they are seen.
  last_B1D = jnp.take_along_axis(hidden_BPD, (lengths_B - 1)[:, None, None], axis=1)
  n = cache.key_NBTHK.shape[1] // B

  def written(old_NRTHK, new_NBPHK):
    new_NRPHK = jnp.repeat(new_NBPHK, n, axis=1).astype(old_NRTHK.dtype)
    return old_NRTHK.at[:, :, :P].set(new_NRPHK)

  return jnp.repeat(model.project(last_B1D)[:, 0], n, axis=0), dataclasses.replace(
    cache,
    key_NBTHK=written(cache.key_NBTHK, kv[0]),
    value_NBTHK=written(cache.value_NBTHK, kv[1]),
    index=jnp.repeat(lengths_B.astype(jnp.int32), n),
  )
