"""DecodingConfig: how output tokens are chosen."""

import dataclasses

from t5x_lite.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
  """How tokens are chosen.

  Attributes:
    max_decode_length: most tokens to decode, the end of sequence included.
    temperature: 0 is greedy; otherwise logits are divided by it and sampled.
    top_k: sample among the k likeliest tokens; 0 means all.
    top_p: sample among the fewest tokens whose probability reaches p; 1 means
      all. Applied after top_k.
  """

  max_decode_length: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.max_decode_length < 1:
      raise UsageError(
        f'DecodingConfig.max_decode_length is {self.max_decode_length}; it '
        'must be at least 1.'
      )
    if self.temperature < 0.0:
      raise UsageError(
        f'DecodingConfig.temperature is {self.temperature}; it must be 0 '
        '(greedy) or positive.'
      )
    if self.top_k < 0:
      raise UsageError(
        f'DecodingConfig.top_k is {self.top_k}; it must be 0 (all) or more.'
      )
    if not 0.0 < self.top_p <= 1.0:
      raise UsageError(
        f'DecodingConfig.top_p is {self.top_p}; it must be above 0 and at '
        'most 1.'
      )
