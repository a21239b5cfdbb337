"""What each cutoff of sampling leaves, by its paper's definition and every subset: a few tokens."""

import itertools

import numpy as np


def probabilities(
  logits,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  min_p=0.0,
  typical_p=1.0,
  epsilon_cutoff=0.0,
  eta_cutoff=0.0,
):
  """Returns what one row [V] is sampled by, in float64; 0 for what is hidden.

  The cutoffs go in this order, and each sees what the one before left. Of tokens as likely as each
  other all stay if any may.
  """
  logits = np.asarray(logits, np.float64) / temperature
  p = np.exp(logits - logits.max())
  p /= p.sum()

  def leave(kept):
    return np.where(kept, p, 0.0) / p[kept].sum()

  if top_k:  # Fan et al. 2018: the k tokens whose probabilities have the largest sum
    sizes = SUBSETS[len(p)].sum(axis=1) == min(top_k, len(p))
    p = leave(_union(p, sizes))
  if top_p < 1.0:  # Holtzman et al. 2020: the fewest that reach p, of these the likeliest
    reach = SUBSETS[len(p)] @ p >= top_p
    fewest = SUBSETS[len(p)].sum(axis=1)[reach].min()
    p = leave(_union(p, reach & (SUBSETS[len(p)].sum(axis=1) == fewest)))
  if min_p:  # Nguyen et al. 2024
    p = leave(p >= min_p * p.max())
  if typical_p < 1.0:  # Meister et al. 2022: the least distance from the entropy that reaches p
    distance = np.abs(-np.log(np.where(p > 0, p, 1.0)) - _entropy(p))
    distance[p == 0] = np.inf
    radius = min(r for r in distance if p[distance <= r].sum() >= typical_p)
    p = leave(distance <= radius)
  if epsilon_cutoff:  # Hewitt et al. 2022, section 4: and the likeliest, if it is less likely
    p = leave((p >= epsilon_cutoff) | (p == p.max()))
  if eta_cutoff:  # the same, section 4.3
    least = min(eta_cutoff, np.sqrt(eta_cutoff) * np.exp(-_entropy(p)))
    p = leave((p >= least) | (p == p.max()))
  return p


# All subsets of n tokens, [2**n, n].
SUBSETS = {n: np.asarray(list(itertools.product((False, True), repeat=n))) for n in (6, 8)}


def _union(p, allowed):
  """Tokens of any allowed subset of the largest sum."""
  sums = np.where(allowed, SUBSETS[len(p)] @ p, -1.0)
  return SUBSETS[len(p)][sums >= sums.max() - 1e-12].any(axis=0)


def _entropy(p):
  return -(p[p > 0] * np.log(p[p > 0])).sum()


# Each cutoff alone, where it keeps all, one and, last, some; then several at once.
SETTINGS = (
  {'temperature': 0.6},
  {'temperature': 1.7},
  *({'top_k': k} for k in (50, 1, 5, 3)),
  *({'top_p': p} for p in (0.98, 1e-6, 0.31, 0.77)),
  *({'min_p': p} for p in (0.01, 1.0, 0.2)),
  *({'typical_p': p} for p in (0.96, 0.03, 0.73, 0.5)),
  *({'epsilon_cutoff': p} for p in (0.001, 0.9, 0.1)),
  *({'eta_cutoff': p} for p in (0.001, 0.9, 0.1)),
  {'temperature': 1.3, 'top_k': 4, 'top_p': 0.83},
  {'temperature': 0.8, 'top_k': 2, 'top_p': 0.63},
  {'top_k': 6, 'min_p': 0.09, 'typical_p': 0.87},
  {'top_p': 0.93, 'epsilon_cutoff': 0.07, 'eta_cutoff': 0.11},
  {
    'temperature': 1.4,
    'top_k': 7,
    'top_p': 0.97,
    'min_p': 0.03,
    'typical_p': 0.93,
    'epsilon_cutoff': 0.02,
    'eta_cutoff': 0.07,
  },
)


def logits(size, tokens=8, seed=0):
  """Returns rows [size, tokens]: random, then with equal ones, then with hidden ones too."""
  rng = np.random.default_rng(seed)
  x = 2.0 * rng.standard_normal((size, tokens))
  tied = np.round(x)
  hidden = np.where(rng.random(x.shape) < 0.3, -np.inf, tied)
  hidden[:, 0] = tied[:, 0]  # something is left
  flat = np.zeros((1, tokens))
  return np.concatenate([x, tied, hidden, flat]).astype(np.float32)
