"""Confidence intervals of metrics: the percentile bootstrap over examples.

The test set is drawn anew with replacement, as large, many times; 95% of what is measured on these
sets lies in the interval (Efron and Tibshirani 1993, section 13.3; of BLEU, Koehn 2004).
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np

SEED = 0  # the same sets for every model: their intervals can be compared
CHECKED = 5  # sets on which a mean must have been one, to be taken for it


def measured(
  measure: Callable[..., dict[str, float]], columns: Sequence[Sequence], num_sets: int
) -> dict[str, float]:
  """Returns what `measure(*columns)` does, and NAME_low and NAME_high of each, of so many sets.

  A metric that is the mean over examples is measured once on each, others on every set. What
  has no value on some set, such as a correlation of equal numbers, gets no interval.
  """
  whole, num = measure(*columns), len(columns[0])
  if not num_sets:
    return whole

  def values(chosen: Sequence[int]) -> list[float]:
    found: dict[str, float] = {}
    # What libraries say of a set that is all of one class.
    with contextlib.suppress(ArithmeticError, ValueError), warnings.catch_warnings():
      warnings.simplefilter('ignore')
      found = measure(*([column[i] for i in chosen] for column in columns))
    return [found.get(name, np.nan) for name in whole]

  each_NM = np.asarray([values([i]) for i in range(num)])
  is_mean_M, found_SM = np.full(len(whole), True), []
  rng = np.random.default_rng(SEED)
  for s in range(num_sets):
    chosen = rng.integers(num, size=num)
    mean_M = each_NM[chosen].mean(axis=0)
    measured_M = values(chosen.tolist()) if s < CHECKED or not is_mean_M.all() else mean_M
    # Of all examples, or a set, macro F1 may happen to be the mean too.
    is_mean_M &= np.isclose(mean_M, measured_M, rtol=1e-9, atol=1e-9)
    found_SM.append(np.where(is_mean_M, mean_M, measured_M))
  bounds_2M = np.quantile(found_SM, [0.025, 0.975], axis=0).tolist()
  found = dict(whole)
  for end, bounds in zip(('low', 'high'), bounds_2M, strict=True):
    found |= {f'{k}_{end}': x for k, x in zip(whole, bounds, strict=True) if np.isfinite(x)}
  return found
