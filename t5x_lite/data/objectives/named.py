"""The pre-training objectives by name: the rows of the paper's tables 4-7."""

import functools
from collections.abc import Callable

import tensorflow as tf

from t5x_lite.data.objectives import preprocessors

Preprocessor = Callable[..., tf.data.Dataset]


def _objective(fn: Callable, **settings) -> Preprocessor:
  return functools.partial(fn, **settings)


# The rows of the T5 paper's tables 4 to 7, and ByT5's spans of 20 bytes.
OBJECTIVES: dict[str, Preprocessor] = {
  'span_corruption': preprocessors.span_corruption,
  'span_corruption_2': _objective(preprocessors.span_corruption, mean_noise_span_length=2.0),
  'span_corruption_5': _objective(preprocessors.span_corruption, mean_noise_span_length=5.0),
  'span_corruption_10': _objective(preprocessors.span_corruption, mean_noise_span_length=10.0),
  'span_corruption_20': _objective(preprocessors.span_corruption, mean_noise_span_length=20.0),
  'iid_denoising': preprocessors.iid_denoising,
  'iid_denoising_10': _objective(preprocessors.iid_denoising, noise_density=0.10),
  'iid_denoising_25': _objective(preprocessors.iid_denoising, noise_density=0.25),
  'iid_denoising_50': _objective(preprocessors.iid_denoising, noise_density=0.50),
  'bert_style': _objective(preprocessors.iid_denoising, style='bert'),
  'mass_style': _objective(preprocessors.iid_denoising, style='mass'),
  'drop_tokens': _objective(preprocessors.iid_denoising, style='drop'),
  'deshuffling': preprocessors.deshuffling,
  'prefix_lm': preprocessors.prefix_lm,
  'full_lm': preprocessors.full_lm,
}
