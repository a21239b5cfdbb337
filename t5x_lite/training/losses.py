"""Cross entropy, its weights and its denominator; no model, no metrics format.

Losses come as sums, with the denominator computed once from the whole batch, so that a batch cut
into microbatches or over hosts adds up to the same number.

Legend: B batch, L length, D emb_dim, V vocab.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_lite.errors import check_fields

NORMALIZING_RULES = ('NUM_REAL_TARGET_TOKENS', 'NUM_TOTAL_TARGET_TOKENS', 'AVERAGE_PER_SEQUENCE')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """What is minimised. Names and rules are T5X's (t5x/losses.py).

  Attributes:
    z_loss: coefficient of log(Z)^2; 1e-4 in T5 1.1's pre-training.
    label_smoothing: probability mass spread over the wrong tokens, in [0, 1).
    loss_normalizing_factor: what the summed loss is divided by. None: nothing. A number: that
      number (2048 * 114 continues T5's public checkpoints, 1024 * 229 mT5's).
      'NUM_REAL_TARGET_TOKENS': the sum of the loss weights. 'NUM_TOTAL_TARGET_TOKENS': all target
      positions, padding included. 'AVERAGE_PER_SEQUENCE': every example counts the same, whatever
      its length, packed or not.
    chunk: target positions whose logits are held at a time, or None for all. A chunk never holds a
      [B, L, V] array, forward or backward.
  """

  z_loss: float = 0.0
  label_smoothing: float = 0.0
  loss_normalizing_factor: float | int | str | None = 'NUM_REAL_TARGET_TOKENS'
  chunk: int | None = None

  def __post_init__(self):
    rule, chunk = self.loss_normalizing_factor, self.chunk
    known = rule.upper() in NORMALIZING_RULES if isinstance(rule, str) else rule is None or rule > 0
    rules = ', '.join(NORMALIZING_RULES)
    check_fields(
      self,
      label_smoothing=(0 <= self.label_smoothing < 1, 'at least 0 and less than 1'),
      z_loss=(0 <= self.z_loss < math.inf, '0 or more (T5 1.1 uses 1e-4)'),
      chunk=(chunk is None or chunk >= 1, 'a positive number of target positions, or None'),
      loss_normalizing_factor=(known, f'None, a positive number, or one of {rules}'),
    )


def cross_entropy_with_logits(
  logits_BLV: Array, targets_BL: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
  """Returns per-token cross entropy in nats, and the z-loss part of it.

  With label smoothing e, the target distribution has 1 - e on the target and e / (V - 1) on every
  other token, and its entropy is subtracted, so that a perfect prediction costs nothing. Any number
  of leading dims will do. Logits of any dtype are computed in float32; for z_loss see `LossConfig`.

  Source: t5x/losses.py cross_entropy_with_logits and compute_weighted_cross_entropy; Szegedy et al.
  2016 for label smoothing.
  """
  loss, z, _ = _token_losses(z_loss, label_smoothing, logits_BLV, targets_BL)
  return loss, z


def _confidences(label_smoothing: float, vocab_size: int) -> tuple[float, float]:
  """Returns the target probability of the right and of any wrong token."""
  return 1 - label_smoothing, label_smoothing / max(vocab_size - 1, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_losses(z_loss, label_smoothing, logits, targets):
  """Returns loss, z-loss and whether the target is the most likely token."""
  return _token_losses_fwd(z_loss, label_smoothing, logits, targets)[0]


def _token_losses_fwd(z_loss, label_smoothing, logits, targets):
  vocab_size = logits.shape[-1]
  x = logits.astype(jnp.float32)
  largest = jnp.max(x, axis=-1)
  log_z = largest + jnp.log(jnp.sum(jnp.exp(x - largest[..., None]), axis=-1))
  target_logit = jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]
  right, wrong = _confidences(label_smoothing, vocab_size)
  loss = log_z - (right - wrong) * target_logit
  if label_smoothing:
    loss -= wrong * jnp.sum(x, axis=-1)
    loss += right * math.log(right) + (vocab_size - 1) * wrong * math.log(wrong)
  z = z_loss * jnp.square(log_z)
  # Not argmax, which costs XLA:CPU ten times the maximum that is at hand.
  correct = target_logit >= largest
  return (loss + z, z, correct), (logits, targets, log_z)


def _token_losses_bwd(z_loss, label_smoothing, residuals, cotangents):
  # Softmax is recomputed from the logits, which are dead after this, so that one [..., V] buffer is
  # enough. The one-hot is a comparison that XLA fuses and can cut over any axis, where a scatter
  # would gather a sharded vocab.
  logits, targets, log_z = residuals
  g, g_z, _ = cotangents
  right, wrong = _confidences(label_smoothing, logits.shape[-1])
  scale = g + 2 * z_loss * log_z * (g + g_z)
  softmax = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  is_target = ids == targets[..., None]
  soft_target = jnp.where(is_target, (g * right)[..., None], (g * wrong)[..., None])
  grad = softmax * scale[..., None] - soft_target
  return grad.astype(logits.dtype), None


_token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


def loss_sums(
  logits_BLV: Array,
  targets_BL: Array,
  weights_BL: Array,
  *,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  task_ids_BL: Array | None = None,
  num_tasks: int = 0,
) -> dict[str, Array]:
  """Returns weighted sums over all tokens; only 'loss' carries a gradient.

  They are loss (z-loss included) and z_loss in nats, each token times its weight; num_correct and
  num_tokens, counts over tokens whose weight is not 0, whose ratio is the accuracy (a target that
  ties with another token is correct): float32 scalars, so they add up over batches. Given
  task_ids_BL, each token's task below num_tasks, also the sums [num_tasks] task_loss (without the
  z-loss) and task_weight. The rest is as in `cross_entropy_with_logits`.
  """
  loss, z, correct = _token_losses(z_loss, label_smoothing, logits_BLV, targets_BL)
  counted = weights_BL != 0
  weights = weights_BL.astype(jnp.float32)
  rest = {
    'z_loss': jnp.sum(z * weights),
    'num_correct': jnp.sum(correct & counted, dtype=jnp.float32),
    'num_tokens': jnp.sum(counted, dtype=jnp.float32),
  }
  if num_tasks:
    assert task_ids_BL is not None
    one_hot = jax.nn.one_hot(task_ids_BL, num_tasks, dtype=jnp.float32)
    rest['task_loss'] = jnp.sum(((loss - z) * weights)[..., None] * one_hot, axis=(0, 1))
    rest['task_weight'] = jnp.sum(weights[..., None] * one_hot, axis=(0, 1))
  return {'loss': jnp.sum(loss * weights), **jax.lax.stop_gradient(rest)}


def chunked_cross_entropy(
  project_fn: Callable[[Array], Array],
  hidden_BLD: Array,
  targets_BL: Array,
  weights_BL: Array,
  *,
  chunk: int,
  task_ids_BL: Array | None = None,
  **settings: Any,
) -> dict[str, Array]:
  """Returns loss_sums of project_fn(hidden), `chunk` positions at a time.

  Never holds more than [B, chunk, V] logits. Under differentiation each chunk's gradient is taken
  while its logits are at hand, so that they are computed once, as in the unchunked loss. Chunks cut
  L, which they need not divide, never B, so a batch stays sharded over its devices. From [B, l, D]
  project_fn makes logits [B, l, V], each position on its own. It may close over traced parameters;
  their gradients are right. No gradient flows to the weights. The settings are those of loss_sums.

  Source: the gradient in the forward pass is the idea of Liger Kernel's fused linear cross entropy
  (Hsu et al. 2024, arXiv 2410.10989, section 3.2).
  """
  chunk = min(chunk, hidden_BLD.shape[1])
  pad = -hidden_BLD.shape[1] % chunk
  project, head = jax.closure_convert(project_fn, hidden_BLD[:, :chunk])

  def cut(x):
    """Returns x as [chunks, B, chunk, ...]; padding has weight 0."""
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  def sums(head, h, targets, weights, ids):
    return loss_sums(project(h, *head), targets, weights, task_ids_BL=ids, **settings)

  # Without task ids they are not read.
  ids_BL = targets_BL if task_ids_BL is None else task_ids_BL
  return _scan_sums(sums, head, cut(hidden_BLD), tuple(map(cut, (targets_BL, weights_BL, ids_BL))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_sums(sums_fn, head, hidden, rest):
  """Adds up sums_fn over the leading dim of hidden, and of what goes with it."""
  sums = jax.lax.map(lambda xs: sums_fn(head, xs[0], *xs[1]), (hidden, rest))
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def _scan_sums_fwd(sums_fn, head, hidden, rest):
  def body(head_grad, xs):
    h, one = xs

    def loss_fn(head, h):
      sums = sums_fn(head, h, *one)
      return sums['loss'], sums

    (g_head, g_h), sums = jax.grad(loss_fn, (0, 1), has_aux=True)(head, h)
    head_grad = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), head_grad, g_head)
    return head_grad, (sums, g_h)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
  head_grad, (sums, hidden_grad) = jax.lax.scan(body, zeros, (hidden, rest))
  total = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
  return total, (head, head_grad, hidden_grad)


def _scan_sums_bwd(sums_fn, residuals, cotangents):
  head, head_grad, hidden_grad = residuals
  g = cotangents['loss']
  head_grad = jax.tree.map(lambda x, grad: (g * grad).astype(x.dtype), head, head_grad)
  return head_grad, (g * hidden_grad).astype(hidden_grad.dtype), None


_scan_sums.defvjp(_scan_sums_fwd, _scan_sums_bwd)


def loss_weights_and_normalizer(
  batch: Mapping[str, Any], rule: float | int | str | None
) -> tuple[Array, Array]:
  """Returns per-token loss weights and what their summed loss is divided by.

  They are float32 [B, L] and a float32 scalar that is never 0. Call it once with the whole batch of
  T5X features, before cutting it into microbatches: T5X does it for each, which weighs tokens
  unequally and makes the gradient grow with their number (t5x/trainer.py
  accumulate_grads_microbatched). The rule is LossConfig.loss_normalizing_factor. Without
  decoder_loss_weights every real target token counts 1: those of a segment if packed, else those
  that are not 0 (T5X: padding too, by None and constant rules).

  Source: t5x/losses.py get_loss_normalizing_factor_and_weights.
  """
  targets = batch['decoder_target_tokens']
  segments = batch.get('decoder_segment_ids')
  weights = batch.get('decoder_loss_weights')
  if weights is None:
    weights = (targets if segments is None else segments) > 0
  weights = jnp.asarray(weights, jnp.float32)
  if not isinstance(rule, str):
    return weights, jnp.asarray(1.0 if rule is None else rule, jnp.float32)
  rule = rule.upper()
  if rule == 'NUM_TOTAL_TARGET_TOKENS':
    return weights, jnp.asarray(targets.size, jnp.float32)
  if rule == 'AVERAGE_PER_SEQUENCE':
    if segments is None:
      per_example = jnp.sum(weights, axis=-1, keepdims=True)
    else:
      same = segments[:, :, None] == segments[:, None, :]
      per_example = jnp.sum(jnp.where(same, weights[:, None, :], 0), axis=-1)
    weights = jnp.where(weights == 0, 0.0, weights / jnp.where(per_example == 0, 1.0, per_example))
  normalizer = jnp.sum(weights)
  # A batch of nothing but padding has loss 0, not 0 / 0.
  return weights, jnp.where(normalizer == 0, 1.0, normalizer)
