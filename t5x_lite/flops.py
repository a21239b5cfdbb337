"""Model FLOPs by our own formula, and what chips can do at most.

XLA's cost analysis counts the body of a scan once, so that it cannot be used
for utilisation. Counted here are the matrix multiplications that the model
needs, each multiply-add as two; recomputation (remat), softmax and norms are
not. Source of the convention: Chowdhery et al. 2022 (PaLM), appendix B.
"""

from collections.abc import Mapping
from typing import Any

from t5x_lite.models.config import T5Config

# Peak dense bfloat16 (float16 where there is none) FLOP/s per JAX device, from
# the vendors' data sheets. A TPU v2/v3 chip shows as two devices, and so does
# TPU7x. Longer names first: the first that a device's kind starts with counts.
PEAK_FLOPS: dict[str, float] = {
  'TPU v2': 22.5e12,
  'TPU v3': 61.5e12,
  'TPU v4 lite': 137e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'TPU7x': 1153.5e12,
  'Tesla V100': 125e12,
  'Tesla T4': 65e12,
  'NVIDIA A100': 312e12,
  'NVIDIA A10': 125e12,
  'NVIDIA L4': 121e12,
  'NVIDIA L40': 181e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA GH200': 989e12,
  'NVIDIA B200': 2250e12,
  'NVIDIA GB200': 2450e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns a device's peak FLOP/s, or None if it is not in the table."""
  names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
  return PEAK_FLOPS[max(names, key=len)] if names else None


def forward_flops(
  config: T5Config, *, batch_size: int, inputs: int, targets: int
) -> float:
  """Returns the FLOPs of one forward pass over a batch.

  Args:
    config: the model.
    batch_size: sequences.
    inputs: encoder tokens a sequence, padding included.
    targets: decoder tokens a sequence, padding included.
  """
  joined = config.num_heads * config.head_dim
  matrices = len(config.mlp_activations) + 1
  projection = 2 * config.emb_dim * joined  # of one token, one of q, k, v, out
  mlp = 2 * matrices * config.emb_dim * config.mlp_dim
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
      layer += inputs * 2 * projection
    total += config.num_decoder_layers * layer
    total += targets * 2 * config.emb_dim * config.vocab_size
  return batch_size * total


def train_step_flops(
  config: T5Config, *, batch_size: int, inputs: int, targets: int
) -> float:
  """Returns the FLOPs of one training step: the backward pass costs two."""
  return 3 * forward_flops(
    config, batch_size=batch_size, inputs=inputs, targets=targets
  )


def batch_train_flops(config: T5Config, batch: Mapping[str, Any]) -> float:
  """Returns the FLOPs of one training step on arrays (or shapes) of a batch."""
  batch_size, targets = batch['decoder_target_tokens'].shape
  inputs = 0
  if config.has_encoder:
    inputs = batch['encoder_input_tokens'].shape[1]
  return train_step_flops(
    config, batch_size=batch_size, inputs=inputs, targets=targets
  )
