"""Cached greedy decoding beside Hugging Face's `generate`, in turns.

  python benchmarks/decode.py --versus hf

Both run the encoder once and then decode exactly `targets` tokens for each row
with key and value caches, from the same weights; no row ends early. Ours is the
jitted step of `t5x_lite.decoding.steps`, theirs is eager PyTorch, which is what
`generate` runs. Read train_step.py for how they are measured.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import side_by_side
import train_step


def arguments() -> argparse.Namespace:
  """Returns the parsed command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--versus', choices=('hf', 'none'), default='none')
  parser.add_argument('--model', default='t5_1_1_small', help='a named size')
  parser.add_argument('--num_layers', type=int)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--inputs', type=int, default=512)
  parser.add_argument('--targets', type=int, default=114)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--scan_layers', action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument('--huge_pages', action='store_true')
  parser.add_argument('--weights', help=argparse.SUPPRESS)
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.dropout_rate, args.remat_policy = 0.0, 'none'
  return args


def run_ours(args: argparse.Namespace) -> None:
  """The jitted predict step."""
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax

  from t5x_lite.decoding import sampling, steps
  from t5x_lite.models import t5

  # No token has the id -1, so no row ends.
  cfg = train_step.model_config(args).replace(eos_id=-1)
  graphdef, _, _ = t5.abstract_params(cfg)
  if (Path(args.weights) / 'config.json').exists():
    from t5x_lite.interop import checkpoint_source, tensors

    params = tensors.place(checkpoint_source.open_source(args.weights).tensors, cfg)
  else:
    params = jax.jit(lambda key: t5.init_params(cfg, key))(jax.random.key(0))
  inputs = train_step.make_batch(args, cfg.vocab_size)['inputs']
  batch = {'encoder_input_tokens': jax.device_put(inputs.astype(np.int32))}
  predict = jax.jit(
    steps.make_predict_step(graphdef, sampling.DecodingConfig(max_decode_length=args.targets))
  )

  def step() -> float:
    return float(np.asarray(predict(params, batch)[0]).mean())

  side_by_side.work(step)


def run_hf(args: argparse.Namespace) -> None:
  """PyTorch's generate; it saves the weights for ours."""
  import torch

  model = train_step.hf_model(args).eval()
  model.save_pretrained(args.weights)
  inputs = torch.from_numpy(train_step.make_batch(args, model.config.vocab_size)['inputs'])
  mask = torch.ones_like(inputs)
  model.generation_config.eos_token_id = None

  def step() -> float:
    with torch.no_grad():
      tokens = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=args.targets,
        min_new_tokens=args.targets,
      )
    # The first is the start token.
    return float(tokens[:, 1:].double().mean())

  side_by_side.work(step, warm_up=1)


WORKERS = {'hf generate': run_hf, 'ours': run_ours}


def main() -> None:
  """Starts both, lets them run in turns, and prints a table."""
  args = arguments()
  if args.worker:
    WORKERS[args.worker](args)
    return
  names = ['hf generate', 'ours'] if args.versus == 'hf' else ['ours']
  with tempfile.TemporaryDirectory() as directory:
    forwarded = [*sys.argv[1:], '--weights', directory]
    contenders = [side_by_side.start(name, forwarded, args.huge_pages) for name in names]
    side_by_side.rounds(contenders, args.rounds, 1)
  ours = contenders[-1]
  tokens = args.batch_size * args.targets
  print(
    f'{args.model}, batch {args.batch_size}, {args.inputs} inputs, '
    f'{args.targets} tokens decoded greedily, float32, scan {args.scan_layers},'
    f' huge pages {args.huge_pages}, {os.cpu_count()} cores'
  )
  print(
    f'{"":12}{"tokens/s":>10}{"s":>8}{"ours is":>9}'
    f'{"tokens/CPU s":>15}{"CPU s":>8}{"ours is":>9}{"mean id":>12}'
  )
  for c in contenders:
    print(
      f'{c.name:12}{tokens / c.seconds:10.0f}{c.seconds:8.2f}'
      f'{c.seconds / ours.seconds:8.2f}x'
      f'{tokens / c.cpu_seconds:15.0f}{c.cpu_seconds:8.2f}'
      f'{c.cpu_seconds / ours.cpu_seconds:8.2f}x{c.last:12.3f}'
    )


if __name__ == '__main__':
  main()
