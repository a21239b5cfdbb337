"""What transfer methods add to a model, by name, and what they train.

T5Config says which methods a model has; layers.py makes their parameters.

Sources: LoRA, Hu et al. 2021; adapters, Raffel et al. 2020, section 3.5.1, where the norms train
too; prompt tuning, Lester et al. 2021.
"""

import re
from collections.abc import Iterable
from typing import Any

from t5x_lite.models.config import T5Config

PROMPT = 'encoder/prompt'
_FIELDS = 'lora_rank lora_alpha lora_targets adapter_dim adapter_places prompt_length'.split()

# (what a method adds, what it trains), to be searched in parameter paths.
_METHODS = (
  (r'/lora_[ab]$', r'/lora_[ab]$'),
  (r'_adapter/(down|up)/kernel$', r'_adapter/|norm/scale$'),
  (rf'^{PROMPT}$', rf'^{PROMPT}$'),
)


def is_added(name: str) -> bool:
  """Whether a parameter is a method's own, which a plain T5 lacks."""
  return any(re.search(added, name) for added, _ in _METHODS)


def trained_pattern(names: Iterable[str]) -> str | None:
  """Returns a regular expression of the paths that train by default; None for all."""
  names = list(names)
  found = [trains for added, trains in _METHODS if any(re.search(added, n) for n in names)]
  return '|'.join(found) or None


def fields(cfg: T5Config) -> dict[str, Any]:
  """Returns the fields of T5Config that add a method's parts."""
  return {name: getattr(cfg, name) for name in _FIELDS if getattr(cfg, name) not in (None, ())}
