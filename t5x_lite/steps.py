"""The pure steps: train, eval, predict, score.

The train loop, ahead-of-time compilation and the benchmarks all jit these same
functions. A step takes its arrays and returns arrays; what is static (model,
optimizer, loss) is bound when the step is made.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from t5x_lite import decoding, losses
from t5x_lite.models import prefill
from t5x_lite.models.t5 import T5
from t5x_lite.train_state import TrainState

Batch = Mapping[str, jax.Array]

POOLINGS = (None, 'mean', 'first')


def _sums(model: T5, batch: Batch, weights, loss: losses.LossConfig, key):
  """Returns the loss's sums over a batch; see `losses.loss_sums`."""
  hidden_BLD = model.hidden(batch, dropout_key=key)
  targets_BL = batch['decoder_target_tokens']
  kwargs = {'z_loss': loss.z_loss, 'label_smoothing': loss.label_smoothing}
  if loss.chunk is None:
    return losses.loss_sums(
      model.project(hidden_BLD), targets_BL, weights, **kwargs
    )
  return losses.chunked_cross_entropy(
    model.projection(),
    hidden_BLD,
    targets_BL,
    weights,
    chunk=loss.chunk,
    **kwargs,
  )


def _microbatches(batch: Any, num: int) -> Any:
  """Cuts [B, ...] into [num, B / num, ...], each spread over all devices.

  Consecutive rows live on one device, so a microbatch takes every num-th row.
  """

  def cut(x):
    assert x.shape[0] % num == 0, (x.shape, num)
    return x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(cut, batch)


def make_train_step(
  graphdef: Any,
  tx: optax.GradientTransformationExtraArgs,
  schedule: Callable[[jax.Array], jax.Array],
  loss: losses.LossConfig,
  *,
  num_microbatches: int = 1,
  trainable: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns train_step(state, batch, key) -> (state, metrics).

  Gradients of microbatches are added in float32; the loss's denominator is
  that of the whole batch, so their number changes nothing but memory (T5X
  normalises each microbatch by itself; t5x/trainer.py:704).

  Args:
    graphdef: from `train_state.make_spec`.
    tx: gives updates at learning rate 1.
    schedule: step -> learning rate. Evaluated once: what is logged is used.
    loss: what is minimised.
    num_microbatches: must divide the batch size.
    trainable: tree of booleans from `optimizers.trainable_mask`, or None for
      all. The gradient of a frozen parameter is 0 and costs nothing.

  The key is the run's; the step folds in its number. Metrics are float32
  scalars: loss (as minimised), cross_entropy and z_loss (nats per unit of loss
  weight), accuracy, target_tokens, input_tokens, learning_rate, grad_norm,
  update_norm, param_norm.
  """

  def train_step(state: TrainState, batch: Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step)
    weights, normalizer = losses.loss_weights_and_normalizer(
      batch, loss.loss_normalizing_factor
    )

    def loss_fn(params, batch, weights, key):
      if trainable is not None:
        params = jax.tree.map(
          lambda p, train: p if train else jax.lax.stop_gradient(p),
          params,
          trainable,
        )
      sums = _sums(nnx.merge(graphdef, params), batch, weights, loss, key)
      return sums['loss'] / normalizer, sums

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
      grads, sums = grad_fn(state.params, batch, weights, key)
    else:

      def add(total, xs):
        part, weights, i = xs
        new = grad_fn(state.params, part, weights, jax.random.fold_in(key, i))
        return jax.tree.map(
          lambda a, b: a + b.astype(jnp.float32), total, new
        ), None

      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        jax.eval_shape(grad_fn, state.params, batch, weights, key),
      )
      parts, part_weights = _microbatches(
        (dict(batch), weights), num_microbatches
      )
      (grads, sums), _ = jax.lax.scan(
        add, zeros, (parts, part_weights, jnp.arange(num_microbatches))
      )

    learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, learning_rate=learning_rate
    )
    updates = jax.tree.map(lambda u: learning_rate.astype(u.dtype) * u, updates)
    params = optax.apply_updates(state.params, updates)
    num_tokens = jnp.maximum(sums['num_tokens'], 1.0)
    weight = jnp.sum(weights)
    weight = jnp.where(weight == 0, 1.0, weight)
    metrics = {
      'loss': sums['loss'] / normalizer,
      'cross_entropy': (sums['loss'] - sums['z_loss']) / weight,
      'z_loss': sums['z_loss'] / weight,
      'accuracy': sums['num_correct'] / num_tokens,
      'target_tokens': sums['num_tokens'],
      'input_tokens': _input_tokens(batch),
      'learning_rate': learning_rate,
      'grad_norm': optax.global_norm(grads),
      'update_norm': optax.global_norm(updates),
      'param_norm': optax.global_norm(params),
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def _input_tokens(batch: Batch) -> jax.Array:
  """Counts real encoder positions; 0 where there is no encoder."""
  if 'encoder_input_tokens' not in batch:
    return jnp.zeros((), jnp.float32)
  real = batch.get('encoder_segment_ids', batch['encoder_input_tokens']) != 0
  return jnp.sum(real, dtype=jnp.float32)


def make_eval_step(
  graphdef: Any, loss: losses.LossConfig
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
  """Returns eval_step(params, batch) -> sums, to be added over batches.

  Teacher-forced and without dropout, z-loss and label smoothing: 'loss' is the
  summed cross entropy in nats, 'weight' its denominator; see
  `losses.loss_sums` for the rest.
  """
  plain = losses.LossConfig(chunk=loss.chunk)

  def eval_step(params, batch: Batch) -> dict[str, jax.Array]:
    weights, _ = losses.loss_weights_and_normalizer(batch, None)
    sums = _sums(nnx.merge(graphdef, params), batch, weights, plain, None)
    return {**sums, 'weight': jnp.sum(weights)}

  return eval_step


def make_predict_step(
  graphdef: Any, config: decoding.DecodingConfig
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Returns predict_step(params, batch, key) -> (tokens_BL, scores_B).

  The batch needs encoder_input_tokens (unpacked); `decoder_prompt_tokens`, if
  there, is what every output begins with. See `decoding.decode`.
  """

  def predict_step(params, batch: Batch, key: jax.Array | None = None):
    model = nnx.merge(graphdef, params)
    cfg = model.cfg
    inputs = batch['encoder_input_tokens']
    encoded = model.encode(inputs)
    cache = model.init_cache(
      encoded,
      inputs,
      batch_size=inputs.shape[0],
      max_decode_length=config.max_decode_length,
    )
    return decoding.decode(
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
  graphdef: Any, config: decoding.DecodingConfig, bidirectional: bool
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

    return decoding.decode(
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
    logits_BLV = nnx.merge(graphdef, params)(batch)
    loss_BL, _ = losses.cross_entropy_with_logits(
      logits_BLV, batch['decoder_target_tokens']
    )
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
    if pooling is None:
      return encoded_BMD
    if pooling == 'first':
      return encoded_BMD[:, 0]
    real_BM1 = (tokens_BM != model.cfg.pad_id)[:, :, None]
    total_BD = jnp.sum(jnp.where(real_BM1, encoded_BMD, 0.0), axis=1)
    return total_BD / jnp.maximum(jnp.sum(real_BM1, axis=1), 1)

  return encode_step
