"""DecodingConfig: how output tokens are chosen."""

import dataclasses
from typing import Any

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
        f'DecodingConfig.max_decode_length is {self.max_decode_length}; it must be at least 1.'
      )
    if self.temperature < 0.0:
      raise UsageError(
        f'DecodingConfig.temperature is {self.temperature}; it must be 0 (greedy) or positive.'
      )
    if self.top_k < 0:
      raise UsageError(f'DecodingConfig.top_k is {self.top_k}; it must be 0 (all) or more.')
    if not 0.0 < self.top_p <= 1.0:
      raise UsageError(f'DecodingConfig.top_p is {self.top_p}; it must be above 0 and at most 1.')
    if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
      name = 'top_k' if self.top_k else 'top_p'
      raise UsageError(
        f'DecodingConfig.{name} is {getattr(self, name)}, but temperature is '
        '0, which is greedy and draws nothing: set temperature=1.0 to sample'
      )


def decoding_config(max_new_tokens: int, **sampling: Any) -> DecodingConfig:
  """Returns the config that the Python interface's arguments mean.

  Raises:
    UsageError: if there is no such setting.
  """
  known = {field.name for field in dataclasses.fields(DecodingConfig)}
  known -= {'max_decode_length'}
  for name in sampling:
    if name not in known:
      raise UsageError(
        f'{name!r} is no setting of decoding; there are '
        f'{", ".join(sorted(known))}, and no beam search yet'
      )
  return DecodingConfig(max_decode_length=max_new_tokens, **sampling)
