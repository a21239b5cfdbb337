"""T5 in JAX, small enough to read.

Names are imported when first used: `import t5x_lite` alone costs nothing, and
neither it nor the model, the steps and the decoding ever import TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from t5x_lite.api import load as load
  from t5x_lite.errors import UsageError as UsageError
  from t5x_lite.models.config import T5Config as T5Config
  from t5x_lite.models.config import named_config as named_config

__version__ = '0.1.0'

_EXPORTS = {
  'T5Config': 't5x_lite.models.config',
  'UsageError': 't5x_lite.errors',
  'load': 't5x_lite.api',
  'named_config': 't5x_lite.models.config',
}

__all__ = ['T5Config', 'UsageError', 'load', 'named_config']


def __getattr__(name: str) -> Any:
  """Imports an exported name on first use (PEP 562)."""
  if name not in _EXPORTS:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
  """Lists the lazy names too, for completion."""
  return sorted([*globals(), *_EXPORTS])
