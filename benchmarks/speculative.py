"""What a draft can save: a model alone, and with a draft it always or never agrees with, in turns.

  python benchmarks/speculative.py --model t5_1_1_base --draft t5_1_1_small --draft_tokens 4

Parameters are random. All of a draft is kept where a processor leaves both models one token, the
same, at every position, and hardly any where none does; what real models save lies between. The
processor runs in all three. Read train_step.py for how others are measured.
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np

import t5x_lite


def same(logits_RV, history):
  """Leaves one token."""
  token_R = 5 + history.length_R % 7
  return jnp.where(jnp.arange(logits_RV.shape[1]) == token_R[:, None], 0.0, -jnp.inf)


def own(logits_RV, history):
  """Does as much, and leaves all but the end."""
  token_R = 0 * history.length_R + 1
  return jnp.where(jnp.arange(logits_RV.shape[1]) == token_R[:, None], -jnp.inf, logits_RV)


def main() -> None:
  """Prints the shortest of some rounds."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', default='t5_1_1_base')
  parser.add_argument('--draft', default='t5_1_1_small')
  parser.add_argument('--draft_tokens', type=int, default=4)
  parser.add_argument('--batch_size', type=int, default=1)
  parser.add_argument('--inputs', type=int, default=64)
  parser.add_argument('--targets', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--dtype', default='float32')
  args = parser.parse_args()
  large, small = (
    t5x_lite.new(t5x_lite.named_config(name, dtype=args.dtype), seed=seed)
    for seed, name in enumerate((args.model, args.draft))
  )
  rows = np.random.default_rng(0).integers(3, 32000, (args.batch_size, args.inputs)).tolist()
  forms = {
    'alone': {'processors': [own]},
    'never agrees': {'processors': [own], 'draft': small},
    'always agrees': {'processors': [same], 'draft': small},
  }
  seconds: dict[str, list[float]] = {name: [] for name in forms}
  for _ in range(args.rounds + 1):
    for name, form in forms.items():
      start = time.perf_counter()
      length = {'max_new_tokens': args.targets, 'draft_tokens': args.draft_tokens}
      large.generate(rows, batch_size=args.batch_size, **length, **form)
      seconds[name].append(time.perf_counter() - start)
  print(vars(args))
  for name, each in seconds.items():
    best, alone = min(each[1:]), min(seconds['alone'][1:])
    rate = args.batch_size * args.targets / best
    print(f'{name:14}{best:8.3f} s{rate:10.1f} tokens/s{alone / best:7.2f}x')


if __name__ == '__main__':
  main()
