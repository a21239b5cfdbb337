"""The pre-training objectives by name: the rows of the paper's tables 4-7.

Any other rate or span is a name too: `span_corruption_rate0.25_span5`.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from t5x_lite.data.objectives import denoising, preprocessors

Preprocessor = Callable[..., tf.data.Dataset]


def _spans(density: float, length: float) -> Preprocessor:
  settings = {'noise_density': density, 'mean_noise_span_length': length}
  return functools.partial(preprocessors.span_corruption, **settings)


def _iid(**settings: Any) -> Preprocessor:
  return functools.partial(preprocessors.iid_denoising, **settings)


# The seven denoisers of UL2 (Tay et al. 2022, table 1), with mode tokens.
UL2: dict[str, Preprocessor] = {
  name: functools.partial(preprocessors.with_mode, mode=mode, objective=objective)
  for name, mode, objective in (
    ('ul2_r3', '[R]', _spans(0.15, 3.0)),
    ('ul2_r8', '[R]', _spans(0.15, 8.0)),
    ('ul2_s', '[S]', functools.partial(preprocessors.prefix_lm, noise_density=0.25)),
    ('ul2_x3', '[X]', _spans(0.5, 3.0)),
    ('ul2_x8', '[X]', _spans(0.5, 8.0)),
    ('ul2_x64', '[X]', _spans(0.15, 64.0)),
    ('ul2_x64_half', '[X]', _spans(0.5, 64.0)),
  )
}

# The rows of the T5 paper's tables 4 to 7, and ByT5's spans of 20 bytes.
OBJECTIVES: dict[str, Preprocessor] = {
  'span_corruption': preprocessors.span_corruption,
  'span_corruption_2': _spans(0.15, 2.0),
  'span_corruption_5': _spans(0.15, 5.0),
  'span_corruption_10': _spans(0.15, 10.0),
  'span_corruption_20': _spans(0.15, 20.0),
  'iid_denoising': preprocessors.iid_denoising,
  'iid_denoising_10': _iid(noise_density=0.10),
  'iid_denoising_25': _iid(noise_density=0.25),
  'iid_denoising_50': _iid(noise_density=0.50),
  'bert_style': _iid(style='bert'),
  'mass_style': _iid(style='mass'),
  'drop_tokens': _iid(style='drop'),
  'deshuffling': preprocessors.deshuffling,
  'prefix_lm': preprocessors.prefix_lm,
  'full_lm': preprocessors.full_lm,
  **UL2,
}

_SETTINGS = re.compile(
  r'(?P<base>span_corruption|iid_denoising|bert_style|mass_style|drop_tokens|prefix_lm)'
  r'(_rate(?P<noise_density>\d*\.?\d+))?(_span(?P<mean_noise_span_length>\d*\.?\d+))?'
)


def find_objective(name: str) -> Preprocessor | None:
  """Returns an objective of OBJECTIVES, or one with settings, or None.

  The name is `NAME`, `NAME_rate0.25`, `span_corruption_span5` or `span_corruption_rate0.25_span5`:
  the share of tokens that is noise (for prefix_lm the mean share of the targets), and the mean
  length of a span. UsageError if a rate or span has no meaning.
  """
  if name in OBJECTIVES:
    return OBJECTIVES[name]
  match = _SETTINGS.fullmatch(name)
  if match is None or (match['mean_noise_span_length'] and match['base'] != 'span_corruption'):
    return None
  given = match.groupdict().items()
  settings = {key: float(value) for key, value in given if value and key != 'base'}
  denoising.check_noise(**{'noise_density': 0.15, **settings})
  return functools.partial(OBJECTIVES[match['base']], **settings)
