"""T5: encoder, decoder, both, or either alone, from one config.

`T5` is built only inside a traced function: at rest parameters are a plain nested dict
(`init_params`), and `nnx.merge(graphdef, params)` makes the module. Unrolled it runs the same code.

Legend: B batch, L decoder length, M encoder length, T positions and S slots of a cache, N layers, D
emb_dim, H heads, K head_dim, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t5x_lite.errors import UsageError
from t5x_lite.models import attention, layers
from t5x_lite.models.attention_inputs import Visibility
from t5x_lite.models.blocks import SAVED_NAMES, Cache, DecoderLayer, EncoderLayer
from t5x_lite.models.config import T5Config
from t5x_lite.models.relative_position import RelativePositionBias
from t5x_lite.parallel.logical_axes import constrain

# What the backward pass does not compute again, by remat policy.
_SAVED = {
  'minimal': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
  'save_names': jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
  'full': None,
}


def _stack(layer_cls, cfg: T5Config, num_layers: int, *, rngs):
  """Makes layers: one module with a leading axis, or a list of modules."""
  keys = jax.random.split(rngs.params(), num_layers)

  def make(key):
    return layer_cls(cfg, rngs=nnx.Rngs(params=key))

  if not cfg.scan_layers:
    return nnx.List([make(key) for key in keys])
  stacked = jax.vmap(make)(keys)
  return _with_axes(stacked, lambda p: p.copy(axes=('layers', *p.get_metadata('axes'))))


def _with_axes(tree, change):
  return jax.tree.map(change, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def over_layers(step, carry, stack, *others):
  """Runs step(carry, (layer, *others' entries)) over layers; returns what `jax.lax.scan` does.

  A stack is a module of stacked layers, which are scanned over, or a list of layers, and then what
  is returned is a list too; others are pytrees of stacks, arrays [N, ...] and lists of arrays.
  """
  xs = (stack, *others)
  if not isinstance(stack, nnx.List):
    return jax.lax.scan(step, carry, xs)
  ys = []
  for i in range(len(stack)):
    at_i = jax.tree.map(lambda x, i=i: x[i], xs, is_leaf=lambda x: isinstance(x, nnx.List | list))
    carry, y = step(carry, at_i)
    ys.append(y)
  return carry, jax.tree.map(lambda *y: [*y], *ys)


def unroll(model: 'T5') -> None:
  """Splits the stacks of a model that was just merged: the same sums without a loop.

  Parameters, gradients and checkpoints stay stacked: the gradient of a split is one concatenation,
  where that of an index would be a padded array of the stack's size for every layer.
  """
  for name in ('encoder', 'decoder'):
    stack = getattr(model, name, None)
    if stack is not None and not isinstance(stack.layers, nnx.List):
      leaves, tree = jax.tree.flatten(stack.layers)
      split = [jax.lax.split(leaf, [1] * stack.num_layers) for leaf in leaves]
      parts = zip(*split, strict=True)
      stack.layers = nnx.List([tree.unflatten([x[0] for x in part]) for part in parts])


class Stack(nnx.Module):
  """Layers, the bias they share, and the final norm."""

  def __init__(self, layer_cls, cfg: T5Config, num_layers: int, norm_name: str, *, rngs):
    bidirectional = layer_cls is EncoderLayer
    if not cfg.relpos_per_layer:
      self.relpos_bias = RelativePositionBias(cfg, bidirectional=bidirectional, rngs=rngs)
    self.layers = _stack(layer_cls, cfg, num_layers, rngs=rngs)
    self.cfg, self.num_layers = cfg, num_layers
    if bidirectional and cfg.prompt_length is not None:
      # On a trained base it begins as rows of the embedding: interop/assignment.py.
      shape, axes = (cfg.prompt_length, cfg.emb_dim), ('prompt', 'embed')
      self.prompt = layers.param(rngs, layers.EMBEDDING_INIT, shape, axes, cfg.vector_dtype)
    self.norm_name = norm_name
    setattr(self, norm_name, layers.RMSNorm(cfg, rngs=rngs))
    if not (bidirectional or cfg.logits_via_embedding):
      shape = (cfg.emb_dim, cfg.vocab_size)
      self.logits_dense = layers.Linear(shape, ('embed', 'vocab'), cfg, rngs=rngs)

  def __call__(self, body, x_BLD, key, *others) -> Array:
    """Runs (x, (layer, key, *others)) -> x over the layers, and the final norm."""
    keys = None if key is None else jax.random.split(key, self.num_layers)
    policy = self.cfg.remat_policy

    def step(x_BLD, xs):
      return body(x_BLD, *xs), None

    if policy != 'none':
      step = jax.checkpoint(step, policy=_SAVED[policy], prevent_cse=False)
    return self.norm(over_layers(step, x_BLD, self.layers, keys, *others)[0])

  def norm(self, x_BLD: Array) -> Array:
    """Applies the final norm, whose name is T5X's."""
    return getattr(self, self.norm_name)(x_BLD)

  def among(self, L: int, visibility: Visibility) -> dict[str, Any]:
    """Returns mask and bias of self-attention among L positions; no bias if each layer has its."""
    mask = attention.mask(self.cfg.attention, visibility, L, L)
    bias = self.relpos_bias.of(L, L) if hasattr(self, 'relpos_bias') else None
    return {'mask': mask, 'bias': bias}


class T5(nnx.Module):
  """A T5-family model; see `T5Config` for what the config decides."""

  def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
    self.cfg = cfg
    # The table is owned here and passed down: jax transforms untie what is reachable twice.
    self.token_embedder = layers.Embedding(cfg, rngs=rngs)
    if cfg.has_encoder:
      self.encoder = Stack(EncoderLayer, cfg, cfg.num_encoder_layers, 'encoder_norm', rngs=rngs)
    if cfg.has_decoder:
      self.decoder = Stack(DecoderLayer, cfg, cfg.num_decoder_layers, 'decoder_norm', rngs=rngs)

  def _real(self, tokens_BM, segment_ids_BM):
    """True where a position of the encoder is not padding; the prompt's are not."""
    if segment_ids_BM is not None:
      # As T5X's: the examples of a row would share the prompt's positions.
      if self.cfg.prompt_length is not None:
        raise UsageError('T5Config.prompt_length needs one example a row: DatasetConfig.pack=False')
      # A real token may have the id of padding inside a packed row.
      return segment_ids_BM != 0
    real_BM = tokens_BM != self.cfg.pad_id
    if self.cfg.prompt_length is None:
      return real_BM
    return jnp.pad(real_BM, ((0, 0), (self.cfg.prompt_length, 0)), constant_values=True)

  def _embed(self, tokens_BL, key, prompt_PD=None) -> Array:
    x_BLD = self.token_embedder(tokens_BL)
    if prompt_PD is not None:
      shape = (x_BLD.shape[0], *prompt_PD.shape)
      prompt_BPD = jnp.broadcast_to(prompt_PD.astype(x_BLD.dtype), shape)
      x_BLD = jnp.concatenate([prompt_BPD, x_BLD], axis=1)
    x_BLD = layers.dropout(x_BLD, self.cfg.dropout_rate, key)
    return constrain(x_BLD, 'batch', 'length', 'embed')

  def encode(self, encoder_input_tokens, *, encoder_segment_ids=None, dropout_key=None) -> Array:
    """Returns encoded_BMD, that of a prompt before that of the tokens.

    Padding is pad_id, unless there are segment ids, [B, M], 0 for padding: positions see only their
    own segment. Without a key nothing is dropped.
    """
    cfg = self.cfg
    keys = layers.split_key(dropout_key, 3)
    real_BM = self._real(encoder_input_tokens, encoder_segment_ids)
    M = real_BM.shape[1]
    segments = _pair(encoder_segment_ids, encoder_segment_ids)
    how = self.encoder.among(M, Visibility(key_seen_BM=real_BM, segments=segments))
    prompt = self.encoder.prompt[...] if cfg.prompt_length is not None else None

    def body(x_BMD, layer, key):
      return layer(x_BMD, **how, key=key)

    x_BMD = self.encoder(body, self._embed(encoder_input_tokens, keys[0], prompt), keys[1])
    # Alone among the dropouts, this one is not broadcast over the length.
    return layers.dropout(x_BMD, cfg.dropout_rate, keys[2], ())

  def hidden(self, batch: Mapping[str, Array], *, dropout_key=None, cross_ahead=False) -> Array:
    """Returns hidden_BLD, the decoder's output before the projection, of a training batch.

    Encoder tokens are [B, M], unless there is no encoder, and decoder tokens [B, L], targets
    shifted right; unpacked, there may be several of these rows for each of the encoder's. Segment
    ids, of the same shapes, are those of packed rows; decoder_causal_attention [B, L] is 1 in a
    prefix, whose positions see each other (prefix LM).
    Without a key nothing is dropped. With cross_ahead, where layers are stacked, keys and values of
    all layers' cross-attention are made before the loop.
    """
    cfg, tokens_BL = self.cfg, batch['decoder_input_tokens']
    encoder_key, decoder_key = layers.split_key(dropout_key, 2)
    keys, L = layers.split_key(decoder_key, 3), tokens_BL.shape[1]
    segments, prefix_BL = batch.get('decoder_segment_ids'), batch.get('decoder_causal_attention')
    encoded_BMD = cross_mask = None
    if cfg.has_encoder:
      inputs_BM, theirs = batch['encoder_input_tokens'], batch.get('encoder_segment_ids')
      encoded_BMD = self.encode(inputs_BM, encoder_segment_ids=theirs, dropout_key=encoder_key)
      if tokens_BL.shape[0] != inputs_BM.shape[0]:  # which may be symbols
        each = tokens_BL.shape[0] // inputs_BM.shape[0]
        encoded_BMD, inputs_BM = (jnp.repeat(x, each, axis=0) for x in (encoded_BMD, inputs_BM))
      real_BM = self._real(inputs_BM, theirs)
      visibility = Visibility(key_seen_BM=real_BM, segments=_pair(segments, theirs))
      cross_mask = attention.mask(cfg.attention, visibility, L, real_BM.shape[1])
    prefix_BL = None if prefix_BL is None else prefix_BL != 0
    visibility = Visibility(segments=_pair(segments, segments), prefix_BL=prefix_BL, causal=True)
    how = {**self.decoder.among(L, visibility), 'cross_mask': cross_mask}

    def body(x_BLD, layer, key, lender, kv):
      if cfg.has_encoder and kv is None:
        kv = layer.encoder_decoder_attention.keys_values(encoded_BMD)
      return layer.read(x_BLD, kv, lender, **how, key=key)[0]

    x_BLD = self._embed(tokens_BL, keys[0])
    ahead = None
    if cross_ahead:
      # By JAX's own product: of a custom gradient vmap makes one gradient of the output a layer.
      ahead = jax.vmap(
        lambda layer: layer.encoder_decoder_attention.keys_values(encoded_BMD, jnp.matmul)
      )(self.decoder.layers)
    x_BLD = self.decoder(body, x_BLD, keys[1], self.lenders(), ahead)
    return layers.dropout(x_BLD, cfg.dropout_rate, keys[2])

  def lenders(self):
    """Returns the layers that own shared parameters, or None."""
    return self.encoder.layers if self.cfg.share_encoder_decoder else None

  def head(self) -> tuple[Array, float]:
    """Returns the projection [D, V] and the factor its input is scaled by."""
    tied, scaled = self.cfg.logits_via_embedding, self.cfg.scale_logits
    scale = self.cfg.emb_dim**-0.5 if (tied if scaled is None else scaled) else 1.0
    if tied:
      return self.token_embedder.embedding[...].T, scale
    return self.decoder.logits_dense.kernel[...], scale

  def project(self, hidden_BLD: Array) -> Array:
    """Returns logits_BLV in float32."""
    return _project(*self.head(), hidden_BLD)

  def projection(self) -> Callable[[Array], Array]:
    """Returns `project` for use in a loop: what it needs is gathered once.

    A kernel cut over the fsdp axis would otherwise be gathered, and its gradient reduced, in every
    iteration (docs/lab_notes.md).
    """
    kernel_DV, scale = self.head()
    return functools.partial(_project, constrain(kernel_DV, None, 'vocab'), scale)

  def __call__(self, batch: Mapping[str, Array], *, dropout_key=None):
    """Returns logits_BLV of a training batch."""
    return self.project(self.hidden(batch, dropout_key=dropout_key))

  def cross_attention(self, batch: Mapping[str, Array], *, mean: bool = False) -> Array:
    """Returns weights_BNHLM: where the decoder looks while it predicts each target.

    Of a batch as of `hidden`, not packed, and of the inputs alone, without a prompt's positions;
    with mean, weights_BLM, the mean over layers and heads.
    """
    tokens_BL, inputs_BM = batch['decoder_input_tokens'], batch['encoder_input_tokens']
    encoded_BMD, L = self.encode(inputs_BM), tokens_BL.shape[1]
    cross_mask = self._real(inputs_BM, None)[:, None, None, :]
    how = {**self.decoder.among(L, Visibility(causal=True)), 'cross_mask': cross_mask}

    def body(x_BLD, xs):
      layer, lender = xs
      kv = layer.encoder_decoder_attention.keys_values(encoded_BMD)
      weights_BHLM = layer.cross_weights(x_BLD, kv, lender, **how)
      weights_BHLM = weights_BHLM[..., self.cfg.prompt_length or 0 :]
      found = jnp.mean(weights_BHLM, axis=1) if mean else weights_BHLM
      return layer.read(x_BLD, kv, lender, **how)[0], found

    x_BLD = self._embed(tokens_BL, None)
    _, found = over_layers(body, x_BLD, self.decoder.layers, self.lenders())
    found = jnp.stack([*found])
    return jnp.mean(found, axis=0) if mean else found.swapaxes(0, 1)

  def init_cache(
    self, encoded_BMD, encoder_input_tokens, *, batch_size: int, max_decode_length: int
  ) -> Cache:
    """Returns an empty cache for max_decode_length positions; cross-attention keys are made here.

    encoded_BMD and inputs [B, M] are None without an encoder; batch_size is a multiple of B.
    """
    cfg = self.cfg
    rows = (batch_size, cfg.num_heads, max_decode_length, cfg.head_dim)
    shape = (cfg.num_decoder_layers, *rows)
    # Two arrays, not one twice: the decoding loop donates them.
    key_NBHSK, value_NBHSK = (per_layer(cfg, jnp.zeros(shape, cfg.dtype)) for _ in range(2))
    cross_k = cross_v = cross_mask = None
    if cfg.has_encoder:

      def cross(_, xs):
        return None, _swapped(xs[0].encoder_decoder_attention.keys_values(encoded_BMD))

      _, (cross_k, cross_v) = over_layers(cross, None, self.decoder.layers)
      cross_mask = self._real(encoder_input_tokens, None)[:, None, None, :]
    return Cache(key_NBHSK, value_NBHSK, cross_k, cross_v, cross_mask, jnp.zeros((), jnp.int32))

  def prefill(self, cache: Cache, tokens_BP: Array, lengths_B: Array) -> tuple[Array, Cache]:
    """Reads a prompt in one pass; returns logits_RV of the token after each, and the cache.

    The prompt of a language model, or what the outputs of an encoder-decoder begin with. The cache
    is empty, of a multiple of B rows (R, n of each prompt) and at least P slots; decoder inputs are
    the start token, the prompt, then padding, and lengths count what is not padding. With
    bidirectional_prefix the prompt's tokens and the start token see each other, and could not be
    fed one at a time (T5X's inputs_bidirectional_attention).
    """
    B, P = tokens_BP.shape
    real_BP = jnp.arange(P)[None, :] < lengths_B[:, None]
    prefix_BP = real_BP if self.cfg.bidirectional_prefix else None
    how = self.decoder.among(P, Visibility(prefix_BL=prefix_BP, causal=True))
    how['cross_mask'] = cache.cross_mask_B11M

    def body(x_BPD, xs):
      layer, cross_kv, lender = xs
      x_BPD, kv = layer.read(x_BPD, _swapped(cross_kv), lender, **how)
      return x_BPD, _swapped(kv)

    cross = (cache.cross_key_NBHMK, cache.cross_value_NBHMK)
    x_BPD = self.token_embedder(tokens_BP)
    x_BPD, kv = over_layers(body, x_BPD, self.decoder.layers, cross, self.lenders())
    hidden_BPD = self.decoder.norm(x_BPD)
    # What follows is predicted at a prompt's last token; slots of padding are written over unseen.
    last_B1D = jnp.take_along_axis(hidden_BPD, (lengths_B - 1)[:, None, None], axis=1)
    n = cache.key_NBHSK[0].shape[-4] // B

    def written(old_NRHTK, new_NBHPK):
      new_NRHPK = jnp.repeat(new_NBHPK, n, axis=-4).astype(old_NRHTK.dtype)
      return old_NRHTK.at[..., :P, :].set(new_NRHPK)

    return jnp.repeat(self.project(last_B1D)[:, 0], n, axis=0), dataclasses.replace(
      cache,
      key_NBHSK=jax.tree.map(written, cache.key_NBHSK, kv[0]),
      value_NBHSK=jax.tree.map(written, cache.value_NBHSK, kv[1]),
      index=jnp.repeat(lengths_B.astype(jnp.int32), n),
    )

  def decode_step(self, tokens_B, cache: Cache) -> tuple[Array, Cache]:
    """Feeds one token a row; returns logits_BV of the next, and the cache."""
    logits_B1V, cache = self.decode_steps(tokens_B[:, None], cache)
    return logits_B1V[:, 0], cache

  def decode_steps(self, tokens_BL, cache: Cache) -> tuple[Array, Cache]:
    """Feeds L tokens a row in one pass; returns logits_BLV of what follows each, and the cache.

    Several only where no row is a beam and slots are no ring.
    """
    cfg, L = self.cfg, tokens_BL.shape[1]
    cache, mask = cache.next_slots(L)
    bias = None if cfg.relpos_per_layer else cache.bias(self.decoder.relpos_bias, L)

    def step(carry, xs):
      (x_BLD, cache), (layer, i, cross_kv, lender) = carry, xs
      cross_kv = _swapped(cross_kv)
      return layer.step(x_BLD, i, cache, cross_kv, lender, bias=bias, mask=mask), None

    carry = self._embed(tokens_BL, None), cache
    cross = (cache.cross_key_NBHMK, cache.cross_value_NBHMK)
    numbers = np.arange(cfg.num_decoder_layers)
    carry, _ = over_layers(step, carry, self.decoder.layers, numbers, cross, self.lenders())
    x_BLD, cache = carry
    return self.project(self.decoder.norm(x_BLD)), cache.advanced(L)


def _project(kernel_DV, scale: float, hidden_BLD) -> Array:
  # As T5X, in float32 whatever the dtype of the activations.
  logits_BLV = layers.matmul(hidden_BLD.astype(jnp.float32) * scale, kernel_DV.astype(jnp.float32))
  return constrain(logits_BLV, 'batch', 'length', 'vocab')


def per_layer(cfg: T5Config, x_N):
  """Returns an array of all layers, or a list of each layer's where layers are a list."""
  return x_N if cfg.scan_layers else [*x_N]


def _swapped(kv):
  """Returns keys and values with heads and positions swapped; None stays None."""
  return jax.tree.map(lambda x: x.swapaxes(1, 2), kv)


def _pair(queries_BL, keys_BM):
  """Returns the segments of queries and keys, or None if either is not packed."""
  return None if queries_BL is None or keys_BM is None else (queries_BL, keys_BM)


@functools.lru_cache(maxsize=64)
def abstract_params(cfg: T5Config) -> tuple[Any, dict, dict]:
  """Returns (graphdef, shapes, axes) without allocating anything.

  `nnx.merge(graphdef, params)` makes the model; shapes are a nested dict of ShapeDtypeStructs, axes
  the same with a tuple of logical axis names at each leaf. They are shared: change nothing in them.
  """
  model = nnx.eval_shape(lambda: T5(cfg, rngs=nnx.Rngs(params=0)))
  graphdef, state = nnx.split(model, graph=False)
  axes = _with_axes(state, lambda p: p.replace(p.get_metadata('axes')))
  return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def init_params(cfg: T5Config, key: Array) -> dict:
  """Draws parameters: a nested dict of arrays. Jit it with out_shardings."""
  cfg.check_writable()
  return nnx.to_pure_dict(nnx.split(T5(cfg, rngs=nnx.Rngs(params=key)), graph=False)[1])
