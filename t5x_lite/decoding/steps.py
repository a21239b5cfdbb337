"""The pure steps that use a model: predict, continue, score, encode.

As in training/steps.py, what is static (model, decoding) is bound when a step
is made; a step takes arrays and returns arrays.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.decoding import sampling
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.models import prefill
from t5x_lite.training import losses

Batch = Mapping[str, jax.Array]

POOLINGS = (None, 'mean', 'first')


class Ensemble:
  """Models of one shape that write a text together, used like one of them.

  The logits are the mean of their log-probabilities, which after the softmax is
  the mean of their logits too (Raffel et al. 2020, section 3.6).
  """

  def __init__(self, graphdef: Any, params: tuple[Any, ...]):
    self._models = [nnx.merge(graphdef, one) for one in params]
    self.cfg = self._models[0].cfg

  def __call__(self, batch: Batch) -> jax.Array:
    """Returns logits_BLV."""
    return _mean_log_softmax([model(batch) for model in self._models])

  def encode(self, tokens_BM: jax.Array) -> tuple[jax.Array, ...]:
    """Returns what each model makes of the inputs."""
    return tuple(model.encode(tokens_BM) for model in self._models)

  def init_cache(self, encoded: tuple[jax.Array, ...], *args: Any, **sizes: Any) -> 'Caches':
    """Returns a cache for each model."""
    pairs = zip(self._models, encoded, strict=True)
    return Caches(tuple(model.init_cache(one, *args, **sizes) for model, one in pairs))

  def decode_step(self, tokens_B: jax.Array, cache: 'Caches') -> tuple[jax.Array, 'Caches']:
    """Returns logits_BV of the next token."""
    pairs = zip(self._models, cache.parts, strict=True)
    logits, caches = zip(*(model.decode_step(tokens_B, one) for model, one in pairs), strict=True)
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


def _mean_log_softmax(logits: Sequence[jax.Array]) -> jax.Array:
  return jnp.mean(jnp.stack([jax.nn.log_softmax(one, axis=-1) for one in logits]), axis=0)


def _merge(graphdef: Any, params: Any) -> Any:
  """Returns the model, or the ensemble of a tuple of parameters."""
  return (Ensemble if isinstance(params, tuple) else nnx.merge)(graphdef, params)


def make_predict_step(
  graphdef: Any, config: DecodingConfig
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Returns predict_step(params, batch, key) -> (tokens_BL, scores_B).

  The batch needs encoder_input_tokens (unpacked); `decoder_prompt_tokens`, if
  there, is what every output begins with. See `decoding.decode`.
  """

  def predict_step(params, batch: Batch, key: jax.Array | None = None):
    model = _merge(graphdef, params)
    cfg = model.cfg
    inputs = batch['encoder_input_tokens']
    encoded = model.encode(inputs)
    cache = model.init_cache(
      encoded, inputs, batch_size=inputs.shape[0], max_decode_length=config.max_decode_length
    )
    return sampling.decode(
      model.decode_step,
      cache,
      batch_size=inputs.shape[0],
      config=config,
      start_id=cfg.decoder_start_id,
      eos_id=cfg.eos_id,
      pad_id=cfg.pad_id,
      key=key,
      prompt_BP=batch.get('decoder_prompt_tokens'),
    )

  return predict_step


def make_continue_step(
  graphdef: Any, config: DecodingConfig, bidirectional: bool
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Returns continue_step(params, prompts_BP, lengths_B, key).

  For models without an encoder; it returns (tokens_BL, scores_B) of what
  follows each prompt. See `prefill.prefill` for the arguments.
  """

  def continue_step(params, prompts_BP, lengths_B, key: jax.Array):
    model = nnx.merge(graphdef, params)
    cfg = model.cfg
    B, P = prompts_BP.shape
    prompt_logits_BV, cache = prefill.prefill(
      model,
      prompts_BP,
      lengths_B,
      max_decode_length=P + config.max_decode_length,
      bidirectional=bidirectional,
    )

    def step(tokens_B, carried):
      # The first token is predicted by the prompt, which has been read.
      is_first, cache = carried
      logits_BV, cache = jax.lax.cond(
        is_first,
        lambda cache: (prompt_logits_BV, cache),
        lambda cache: model.decode_step(tokens_B, cache),
        cache,
      )
      return logits_BV, (jnp.zeros((), bool), cache)

    return sampling.decode(
      step,
      (jnp.ones((), bool), cache),
      batch_size=B,
      config=config,
      start_id=cfg.decoder_start_id,
      eos_id=cfg.eos_id,
      pad_id=cfg.pad_id,
      key=key,
    )

  return continue_step


def make_score_step(graphdef: Any) -> Callable[[Any, Batch], jax.Array]:
  """Returns score_step(params, batch) -> log-probability of each row's targets.

  Natural logarithm, summed over the tokens whose loss weight is not 0.
  """

  def score_step(params, batch: Batch) -> jax.Array:
    weights, _ = losses.loss_weights_and_normalizer(batch, None)
    logits_BLV = _merge(graphdef, params)(batch)
    loss_BL, _ = losses.cross_entropy_with_logits(logits_BLV, batch['decoder_target_tokens'])
    return -jnp.sum(loss_BL * weights, axis=-1)

  return score_step


def make_logits_step(graphdef: Any) -> Callable[[Any, Batch], jax.Array]:
  """Returns logits_step(params, batch) -> float32 logits_BLV."""
  return lambda params, batch: nnx.merge(graphdef, params)(batch)


def make_encode_step(
  graphdef: Any, pooling: str | None = None
) -> Callable[[Any, Batch], jax.Array]:
  """Returns encode_step(params, batch) -> float32 embeddings.

  Args:
    graphdef: of a model with an encoder.
    pooling: None gives encoded_BMD, 'mean' the mean over positions that are
      not padding, [B, D], 'first' the first position (Ni et al. 2021,
      Sentence-T5, section 3.1).
  """
  assert pooling in POOLINGS, pooling

  def encode_step(params, batch: Batch) -> jax.Array:
    model = nnx.merge(graphdef, params)
    tokens_BM = batch['encoder_input_tokens']
    encoded_BMD = model.encode(tokens_BM).astype(jnp.float32)
    encoded_BMD = encoded_BMD[:, model.cfg.prompt_length or 0 :]
    if pooling is None:
      return encoded_BMD
    if pooling == 'first':
      return encoded_BMD[:, 0]
    real_BM1 = (tokens_BM != model.cfg.pad_id)[:, :, None]
    total_BD = jnp.sum(jnp.where(real_BM1, encoded_BMD, 0.0), axis=1)
    return total_BD / jnp.maximum(jnp.sum(real_BM1, axis=1), 1)

  return encode_step
