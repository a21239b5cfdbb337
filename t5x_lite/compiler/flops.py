"""Model FLOPs by our own formula.

XLA's cost analysis counts the body of a scan once, which makes it useless for utilisation. Counted
here are the matrix multiplications that the model needs, each multiply-add as two; recomputation
(remat), softmax and norms are not (Chowdhery et al. 2022, PaLM, appendix B).
"""

from collections.abc import Mapping
from typing import Any

from t5x_lite.models import transfer
from t5x_lite.models.config import T5Config


def forward_flops(
  config: T5Config, *, batch_size: int, inputs: int, targets: int, outputs: int = 1
) -> float:
  """Returns the FLOPs of a forward pass; inputs and targets are tokens a row, padding included.

  Each row of inputs is decoded to so many outputs, as by beam search.
  """
  joined = config.num_heads * config.head_dim
  projection = 2 * config.emb_dim * joined  # of one token, one of q, k, v, out
  mlp = 2 * (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
  total = 0.0
  if config.has_encoder:
    attention = 4 * projection + 4 * inputs * joined
    total += config.num_encoder_layers * inputs * (attention + mlp)
  if config.has_decoder:
    # A causal query sees half of the keys on average.
    attention = 4 * projection + 2 * targets * joined
    layer = targets * (attention + mlp)
    if config.has_encoder:
      layer += targets * (2 * projection + 4 * inputs * joined)
    layer *= outputs
    if config.has_encoder:
      layer += inputs * 2 * projection
    total += config.num_decoder_layers * layer
    total += outputs * targets * 2 * config.emb_dim * config.vocab_size
  return batch_size * total


def batch_train_flops(config: T5Config, batch: Mapping[str, Any]) -> float:
  """Returns the FLOPs of one training step on arrays (or shapes) of a batch.

  Backward costs two forwards, one if few parameters learn.
  """
  rows, targets = batch['decoder_target_tokens'].shape
  inputs = 0
  if config.has_encoder:
    inputs = batch['encoder_input_tokens'].shape[1] + (config.prompt_length or 0)
  passes = 2 if transfer.fields(config) else 3
  return passes * forward_flops(config, batch_size=rows, inputs=inputs, targets=targets)


def summary(config: T5Config, batch: Mapping[str, Any]) -> str:
  """Returns what a training step and one of its tokens cost, as text."""
  total = batch_train_flops(config, batch)
  rows, length = batch['decoder_target_tokens'].shape
  if config.has_encoder:
    length += batch['encoder_input_tokens'].shape[1]
  return f'{total:.3e} FLOPs a step, {total / (rows * length):.3e} a token of {rows * length:,}'
