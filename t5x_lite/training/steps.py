"""The pure train and eval steps.

The train loop, ahead-of-time compilation and the benchmarks all jit these same functions. A step
takes its arrays and returns arrays; what is static (model, optimizer, loss) is bound when made.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from t5x_lite.models import t5
from t5x_lite.parallel import logical_axes, pytrees
from t5x_lite.training import losses
from t5x_lite.training.train_state import TrainState

Batch = Mapping[str, jax.Array]


def _sums(model: t5.T5, batch: Batch, weights, loss, key, num_tasks: int = 0, cross_ahead=False):
  """Returns the loss's sums over a batch; see `losses.loss_sums`."""
  hidden_BLD = model.hidden(batch, dropout_key=key, cross_ahead=cross_ahead)
  targets_BL = batch['decoder_target_tokens']
  kwargs: dict[str, Any] = {'z_loss': loss.z_loss, 'label_smoothing': loss.label_smoothing}
  kwargs |= {'task_ids_BL': batch.get('decoder_task_ids'), 'num_tasks': num_tasks}
  if loss.chunk is None:
    return losses.loss_sums(model.project(hidden_BLD), targets_BL, weights, **kwargs)
  return losses.chunked_cross_entropy(
    model.projection(), hidden_BLD, targets_BL, weights, chunk=loss.chunk, **kwargs
  )


def _norm(tree: Any) -> jax.Array:
  """Returns the norm of all elements, in float32."""
  return optax.global_norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def _cross_ahead(model: t5.T5) -> bool:
  """Whether to make keys and values of all layers' cross-attention before the decoder's loop.

  The gradient of the encoder's output then crosses a model axis once, and not once a layer: one
  seventh of what T5 1.1 XXL sends on v5p. They cost no memory where they are kept anyway.
  """
  cfg, mesh = model.cfg, logical_axes.active_mesh()
  split = mesh is not None and mesh.shape.get('model', 1) > 1
  kept = cfg.remat_policy in ('none', 'minimal') and cfg.has_encoder and cfg.has_decoder
  return split and kept and not isinstance(model.decoder.layers, nnx.List)


def _filled(part: Any, whole: Any) -> Any:
  """Returns a tree with what it has None for taken from another one."""
  return jax.tree.map(lambda p, w: w if p is None else p, part, whole, is_leaf=lambda x: x is None)


def make_train_step(
  graphdef: Any,
  tx: optax.GradientTransformationExtraArgs,
  schedule: Callable[[jax.Array], jax.Array],
  loss: losses.LossConfig,
  *,
  num_microbatches: int = 1,
  trainable: Any = None,
  unroll: bool = False,
  skip_nonfinite: bool = False,
  histograms: bool = False,
  task_names: Sequence[str] = (),
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns train_step(state, batch, key) -> (state, metrics).

  Gradients of microbatches are added in float32; the loss's denominator is the whole batch's, so
  their number changes nothing but memory (T5X normalises each by itself; t5x/trainer.py:704).

  Graphdef, tx and schedule are those of `make_spec`, `make_optimizer` and `make_schedule`. What is
  logged as the learning rate is what is used. With unroll, stacked layers run one by one.
  Parameters that are not trainable (`trainable_mask`; None: all are) have no gradient, and come out
  as they went in. skip_nonfinite leaves parameters and optimizer as they are where loss or gradient
  are not finite, and says so in the metric `skipped`. The number of microbatches must divide the
  batch size. With task_names the batch has `decoder_task_ids`, which number them, and the metrics
  TASK_LOSS and TASK_WEIGHT with each name: its tokens' summed cross entropy in nats and weight.
  With histograms the metrics have `group_histograms` of the gradient.

  The key is the run's; the step folds in its number. Metrics are float32 scalars: loss (as
  minimised), cross_entropy and z_loss (nats per unit of loss weight), accuracy, target_tokens,
  input_tokens, learning_rate, grad_norm, grad_norm/GROUP of each group of parameters, update_norm,
  param_norm.
  """

  def train_step(state: TrainState, batch: Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step)
    weights, normalizer = losses.loss_weights_and_normalizer(batch, loss.loss_normalizing_factor)

    def loss_fn(trained, batch, weights, key):
      model = nnx.merge(graphdef, _filled(trained, state.params))
      if unroll:
        t5.unroll(model)
      sums = _sums(model, batch, weights, loss, key, len(task_names), _cross_ahead(model))
      return sums['loss'] / normalizer, sums

    grad_fn = jax.grad(loss_fn, has_aux=True)
    trained = state.params
    if trainable is not None:
      trained = jax.tree.map(lambda p, train: p if train else None, trained, trainable)
    if num_microbatches == 1:
      grads, sums = grad_fn(trained, batch, weights, key)
    else:

      def cut(x):  # every n-th row, so that each part is spread over all devices
        return x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)

      def add(total, xs):
        part, weights, i = xs
        new = grad_fn(trained, part, weights, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

      shapes = jax.eval_shape(grad_fn, trained, batch, weights, key)
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
      parts = jax.tree.map(cut, (dict(batch), weights))
      (grads, sums), _ = jax.lax.scan(add, zeros, (*parts, jnp.arange(num_microbatches)))

    learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
    with jax.named_scope('optimizer'):
      whole = _filled(grads, jax.tree.map(jnp.zeros_like, state.params))
      old = state.params
      updates, opt_state = tx.update(whole, state.opt_state, old, learning_rate=learning_rate)
      updates = jax.tree.map(lambda u: learning_rate.astype(u.dtype) * u, updates)
      params = optax.apply_updates(old, updates)
      if trainable is not None:  # not even -0.0 + 0.0
        params = jax.tree.map(lambda a, b, train: a if train else b, params, old, trainable)
    # Of groups, to tell where a gradient that is not finite comes from; each is read once.
    norms = {name: _norm(parts) for name, parts in _groups(grads).items()}
    grad_norm = optax.global_norm(norms)
    finite = jnp.isfinite(sums['loss']) & jnp.isfinite(grad_norm)
    if skip_nonfinite:
      new, kept = (params, opt_state), (old, state.opt_state)
      params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    weight = jnp.sum(weights)
    weight = jnp.where(weight == 0, 1.0, weight)
    inputs = batch.get('encoder_input_tokens', jnp.zeros((), jnp.int32))  # there may be no encoder
    real_inputs = batch.get('encoder_segment_ids', inputs) != 0
    metrics = {
      'loss': sums['loss'] / normalizer,
      'cross_entropy': (sums['loss'] - sums['z_loss']) / weight,
      'z_loss': sums['z_loss'] / weight,
      'accuracy': sums['num_correct'] / jnp.maximum(sums['num_tokens'], 1.0),
      'target_tokens': sums['num_tokens'],
      'input_tokens': jnp.sum(real_inputs, dtype=jnp.float32),
      'learning_rate': learning_rate,
      'grad_norm': grad_norm,
      **{GROUP_NORM + name: norm for name, norm in norms.items()},
      'update_norm': _norm(updates),
      'param_norm': _norm(params),
    }
    if histograms:
      metrics |= group_histograms(grads)
    for i, name in enumerate(task_names):
      metrics[TASK_LOSS + name] = sums['task_loss'][i]
      metrics[TASK_WEIGHT + name] = sums['task_weight'][i]
    if skip_nonfinite:
      metrics['skipped'] = 1.0 - finite.astype(jnp.float32)
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


GROUP_HISTOGRAM = 'grad_log10/'
# Half decades of |gradient|; the first bin has all below, the last all above.
HISTOGRAM_BOUNDS = np.arange(-12.5, 4.0, 0.5)
GROUP_NORM = 'grad_norm/'
TASK_LOSS = 'task_loss/'
TASK_WEIGHT = 'task_weight/'


def _groups(grads: Any) -> dict[str, list[jax.Array]]:
  """Returns the leaves of each group of parameters, 'encoder/layers' for instance."""
  groups: dict[str, list[jax.Array]] = {}
  for path, leaf in pytrees.leaves(grads):
    groups.setdefault('/'.join(path[:2]), []).append(leaf)
  return groups


def group_histograms(grads: Any) -> dict[str, jax.Array]:
  """Returns 'grad_log10/GROUP', how many |gradients| are in each bin.

  By powers of ten, since a linear scale shows one peak at 0 and not whether bfloat16 or a clipped
  norm loses what is small.
  """
  least = jnp.asarray(10.0 ** HISTOGRAM_BOUNDS[1:-1], jnp.float32)

  def count(leaf: jax.Array) -> jax.Array:
    dims = tuple(range(leaf.ndim))
    sizes = jnp.abs(leaf.astype(jnp.float32))[..., None]
    above = jnp.sum(sizes >= jnp.expand_dims(least, dims), axis=dims, dtype=jnp.int32)
    edges = jnp.pad(above.astype(jnp.float32), 1).at[0].set(leaf.size)
    return edges[:-1] - edges[1:]

  return {
    GROUP_HISTOGRAM + name: sum(map(count, leaves), jnp.zeros(len(HISTOGRAM_BOUNDS) - 1))
    for name, leaves in _groups(grads).items()
  }


def make_eval_step(
  graphdef: Any, loss: losses.LossConfig
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
  """Returns eval_step(params, batch) -> sums, to be added over batches.

  Teacher-forced and without dropout, z-loss and label smoothing: 'loss' is the summed cross entropy
  in nats, 'weight' its denominator; see `losses.loss_sums` for the rest.
  """
  plain = losses.LossConfig(chunk=loss.chunk)

  def eval_step(params, batch: Batch) -> dict[str, jax.Array]:
    weights, _ = losses.loss_weights_and_normalizer(batch, None)
    sums = _sums(nnx.merge(graphdef, params), batch, weights, plain, None)
    return {**sums, 'weight': jnp.sum(weights)}

  return eval_step
