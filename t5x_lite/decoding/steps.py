"""The pure steps that use a model: predict, score, encode.

As in training/steps.py, what is static (model, decoding) is bound when a step is made.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_lite.decoding import beam_search, loop, sampling
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.loop import Decoded
from t5x_lite.decoding.processors import Processor
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.training import losses

Batch = Mapping[str, Array]

POOLINGS = (None, 'mean', 'first')


class Ensemble:
  """Models of one shape that write a text together, used like one of them.

  The logits are the mean of their log-probabilities, which after the softmax is the mean of their
  logits too (Raffel et al. 2020, section 3.6).
  """

  def __init__(self, graphdef: Any, params: tuple[Any, ...]):
    self._models = [nnx.merge(graphdef, one) for one in params]
    self.cfg = self._models[0].cfg

  def __call__(self, batch: Batch) -> Array:
    """Returns logits_BLV."""
    return _mean_log_softmax([model(batch) for model in self._models])

  def encode(self, tokens_BM: Array) -> tuple[Array, ...]:
    """Returns what each model makes of the inputs."""
    return tuple(model.encode(tokens_BM) for model in self._models)

  def init_cache(self, encoded: tuple[Array, ...] | None, *args: Any, **sizes: Any) -> 'Caches':
    """Returns a cache for each model."""
    pairs = zip(self._models, encoded or [None] * len(self._models), strict=True)
    return Caches(tuple(model.init_cache(one, *args, **sizes) for model, one in pairs))

  def prefill(self, cache: 'Caches', *args: Any) -> tuple[Array, 'Caches']:
    """Returns logits of the token after each prompt; see `T5.prefill`."""
    return self._each(cache, lambda model, one: model.prefill(one, *args))

  def decode_step(self, tokens_B: Array, cache: 'Caches') -> tuple[Array, 'Caches']:
    """Returns logits_BV of the next token."""
    return self._each(cache, lambda model, one: model.decode_step(tokens_B, one))

  def decode_steps(self, tokens_BL: Array, cache: 'Caches') -> tuple[Array, 'Caches']:
    """Returns logits_BLV of what follows each token."""
    return self._each(cache, lambda model, one: model.decode_steps(tokens_BL, one))

  def _each(self, cache: 'Caches', read: Callable[..., Any]) -> tuple[Array, 'Caches']:
    pairs = zip(self._models, cache.parts, strict=True)
    logits, caches = zip(*(read(model, one) for model, one in pairs), strict=True)
    return _mean_log_softmax(logits), Caches(caches)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Caches:
  """A cache of each model; what is done to them is done to all."""

  parts: tuple[Any, ...]

  def __getattr__(self, name: str) -> Callable[..., 'Caches']:
    if name.startswith('_'):
      raise AttributeError(name)
    return lambda *args: Caches(tuple(getattr(part, name)(*args) for part in self.parts))


def _mean_log_softmax(logits: Sequence[Array]) -> Array:
  return jnp.mean(jnp.stack([jax.nn.log_softmax(one, axis=-1) for one in logits]), axis=0)


def _merge(graphdef: Any, params: Any) -> Any:
  """Returns the model, or the ensemble of a tuple of parameters."""
  return (Ensemble if isinstance(params, tuple) else nnx.merge)(graphdef, params)


def make_predict_step(
  graphdef: Any,
  config: DecodingConfig,
  scored: bool = True,
  extra: tuple[Processor, ...] = (),
  draft: T5Config | None = None,
) -> Callable[..., Decoded]:
  """Returns predict_step(params, batch, key) -> Decoded.

  The batch has, unpacked and of B rows each:
    encoder_input_tokens: of a model with an encoder.
    decoder_prompt_tokens, decoder_prompt_lengths: what the decoder reads first, the start token
      included (see `T5.prefill`); without an encoder it is needed. Outputs are what follows.
    seeds: of each row's sampling, folded into the key; its number by default.
    temperature, limit: of each row, instead of the config's; the limit is the most new tokens, up
      to the config's length.

  Beams have scores even if not asked for; extra processors come after the config's. With a draft, a
  smaller model (see `speculative`), params are a pair, its own last.
  """

  def predict_step(params, batch: Batch, key: Array | None = None) -> Decoded:
    params, small_params = params if draft else (params, None)
    model = _merge(graphdef, params)
    cfg = model.cfg
    inputs = batch.get('encoder_input_tokens')
    prompts_BP = batch.get('decoder_prompt_tokens')
    B = next(iter(batch.values())).shape[0]
    P = 0 if prompts_BP is None else prompts_BP.shape[1]
    n = config.rows_per_input

    def begin(model: Any, length: int) -> tuple[Any, loop.Prompt | None]:
      """Returns a cache for so many new tokens, and the prompt that it holds."""
      encoded = None if inputs is None else model.encode(inputs)
      cache = model.init_cache(encoded, inputs, batch_size=B * n, max_decode_length=P + length)
      if prompts_BP is None:
        return cache, None
      lengths_B = batch['decoder_prompt_lengths']
      logits_RV, cache = model.prefill(cache, prompts_BP, lengths_B)
      return cache, loop.Prompt(jnp.repeat(prompts_BP, n, 0), jnp.repeat(lengths_B, n), logits_RV)

    # Caches of drafts do not grow.
    cache, prompt = begin(model, config.length if draft else min(config.length, loop.FIRST_STAGE))
    common: dict[str, Any] = {
      'num_rows': B * n,
      'config': config,
      'start_id': cfg.decoder_start_id,
      'eos_id': cfg.eos_id,
      'pad_id': cfg.pad_id,
      'prompt': prompt,
      'extra': extra,
      'grow': lambda cache, length: cache.grown(P + length),
      'limit_R': jnp.repeat(batch['limit'], n) if 'limit' in batch else None,
    }
    if config.num_beams > 1:
      common['reorder'] = lambda cache, parents_BK: cache.reordered(parents_BK)
      cache = cache.for_beams(n // config.num_beam_groups)
      return beam_search.search(model.decode_step, cache, **common)
    keys_R, temperature_B = None, batch.get('temperature')
    temperature_R = None if temperature_B is None else jnp.repeat(temperature_B, n)
    if key is not None:
      row_of = jax.vmap(jax.random.fold_in, (None, 0))
      keys_B = row_of(key, batch.get('seeds', jnp.arange(B)))
      keys_R = jax.vmap(row_of, (0, None))(keys_B, jnp.arange(n)).reshape(-1)
    step = model.decode_step
    if draft is not None:
      small = nnx.merge(t5.abstract_params(draft)[0], small_params)
      step, cache = small.decode_step, (cache, begin(small, config.length)[0])
      common['read'] = model.decode_steps
    return sampling.decode(
      step, cache, keys_R=keys_R, temperature_R=temperature_R, scored=scored, **common
    )

  return predict_step


def make_score_step(graphdef: Any, matches: bool = False) -> Callable[[Any, Batch], Array]:
  """Returns score_step(params, batch) -> natural log-probability of each row's weighted targets.

  With matches, [B, 2]: also 1 where each of them is the likeliest token, else 0.
  """

  def score_step(params, batch: Batch) -> Array:
    weights, _ = losses.loss_weights_and_normalizer(batch, None)
    logits_BLV = _merge(graphdef, params)(batch)
    targets_BL = batch['decoder_target_tokens']
    loss_BL, _ = losses.cross_entropy_with_logits(logits_BLV, targets_BL)
    score_B = -jnp.sum(loss_BL * weights, axis=-1)
    if not matches:
      return score_B
    matches_BL = (jnp.argmax(logits_BLV, axis=-1) == targets_BL) | (weights == 0)
    return jnp.stack([score_B, jnp.all(matches_BL, axis=-1)], axis=-1)

  return score_step


def make_logits_step(graphdef: Any) -> Callable[[Any, Batch], Array]:
  """Returns logits_step(params, batch) -> float32 logits_BLV."""
  return lambda params, batch: nnx.merge(graphdef, params)(batch)


def make_attention_step(graphdef: Any, mean: bool) -> Callable[[Any, Batch], Array]:
  """Returns attention_step(params, batch), which is `T5.cross_attention`."""
  return lambda params, batch: nnx.merge(graphdef, params).cross_attention(batch, mean=mean)


def make_encode_step(graphdef: Any, pooling: str | None = None) -> Callable[[Any, Batch], Array]:
  """Returns encode_step(params, batch) -> float32 embeddings.

  Without pooling encoded_BMD; else [B, D], the 'mean' over positions that are not padding or the
  'first' position (Ni et al. 2021, Sentence-T5, section 3.1).
  """

  def encode_step(params, batch: Batch) -> Array:
    model = nnx.merge(graphdef, params)
    tokens_BM = batch['encoder_input_tokens']
    encoded_BMD = model.encode(tokens_BM)[:, model.cfg.prompt_length or 0 :].astype(jnp.float32)
    if pooling is None:
      return encoded_BMD
    if pooling == 'first':
      return encoded_BMD[:, 0]
    real_BM1 = (tokens_BM != model.cfg.pad_id)[:, :, None]
    total_BD = jnp.sum(jnp.where(real_BM1, encoded_BMD, 0.0), axis=1)
    return total_BD / jnp.maximum(jnp.sum(real_BM1, axis=1), 1)

  return encode_step
