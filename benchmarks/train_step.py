"""Tokens per second of our train step beside Hugging Face's PyTorch T5.

  python benchmarks/train_step.py --versus hf

Both start from the same weights, see the same batch in every step (no padding)
and use AdamW with the same arguments, so that their losses can be compared
(`--optimizer adafactor`: T5's, with transformers' Adafactor beside it, which
factors more parameters, so that losses differ a little);
dropout is the same rate in both (0 unless given: T5 1.1's pre-training). Ours
is t5x_lite.training.steps jitted, norms and metrics in it; theirs is
loss, backward and a fused AdamW, eager and under torch.compile. Each has its
own process with all cores, and they run in turns (see side_by_side.py). Wall
and CPU seconds are medians over all steps; on a machine shared with other work
the CPU column is the one to read. The matmul ceiling is that of a jitted
product of two square float32 matrices, measured in turns with the rest; FLOPs
are those of `t5x_lite.compiler.flops`.

Our programs make glibc keep freed memory where the CPU computes, and so does
ours here (`--memory own`); `--memory kept` does the same for everyone,
`--memory glibc` for nobody.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side

from t5x_lite.parallel import host_memory

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01
CEILING_DIM = 2048


def arguments() -> argparse.Namespace:
  """Returns the parsed command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--versus', choices=('hf', 'none'), default='none')
  parser.add_argument('--model', default='t5_1_1_small', help='a named size')
  parser.add_argument('--num_layers', type=int, help="layers of each stack, if not the size's")
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--inputs', type=int, default=512)
  parser.add_argument('--targets', type=int, default=114)
  parser.add_argument('--optimizer', choices=('adamw', 'adafactor'), default='adamw')
  parser.add_argument('--dropout_rate', type=float, default=0.0)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=2, help='steps per turn')
  parser.add_argument('--scan_layers', action=argparse.BooleanOptionalAction, default=False)
  parser.add_argument('--remat_policy', default='none')
  parser.add_argument(
    '--huge_pages',
    action='store_true',
    help='start every contender with GLIBC_TUNABLES=glibc.malloc.hugetlb=1',
  )
  parser.add_argument(
    '--memory',
    choices=('own', 'kept', 'glibc'),
    default='own',
    help='who keeps freed memory: ours, as its programs do, everyone, nobody',
  )
  parser.add_argument('--skip', nargs='*', default=[], help='contenders')
  parser.add_argument('--weights', help=argparse.SUPPRESS)
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  return parser.parse_args()


def model_config(args: argparse.Namespace):
  """Returns our config of the shape in question, in float32."""
  from t5x_lite.models.config import named_config

  layers = {}
  if args.num_layers:
    layers = {'num_encoder_layers': args.num_layers, 'num_decoder_layers': args.num_layers}
  return named_config(
    args.model,
    dtype='float32',
    dropout_rate=args.dropout_rate,
    scan_layers=args.scan_layers,
    remat_policy=args.remat_policy,
    **layers,
  )


def make_batch(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
  """Returns inputs and targets without padding."""
  rng = np.random.default_rng(0)
  return {
    name: rng.integers(2, vocab_size - 128, (args.batch_size, length))
    for name, length in (('inputs', args.inputs), ('targets', args.targets))
  }


# ---- Contenders ----


def run_ours(args: argparse.Namespace) -> None:
  """The jitted train step."""
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax
  import jax.numpy as jnp

  from t5x_lite.models import t5
  from t5x_lite.training import losses, optimizers, steps, train_state

  cfg = model_config(args)
  graphdef, shapes, axes = t5.abstract_params(cfg)
  adamw = {'b1': BETAS[0], 'b2': BETAS[1], 'eps': EPSILON, 'weight_decay': WEIGHT_DECAY}
  adamw['weight_decay_exclude'] = ''
  settings = adamw if args.optimizer == 'adamw' else {}
  config = optimizers.OptimizerConfig(name=args.optimizer, **settings)
  tx = optimizers.make_optimizer(config, axes, shapes)
  if (Path(args.weights) / 'config.json').exists():
    from t5x_lite.interop import checkpoint_source, tensors

    opened = checkpoint_source.open_source(args.weights)
    params = tensors.place(opened.tensors, cfg)
  else:
    params = jax.jit(lambda key: t5.init_params(cfg, key))(jax.random.key(0))
  state = train_state.TrainState(jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(params))
  data = make_batch(args, cfg.vocab_size)
  batch = {
    'encoder_input_tokens': data['inputs'],
    'decoder_target_tokens': data['targets'],
    'decoder_input_tokens': np.pad(data['targets'], ((0, 0), (1, 0)))[:, :-1],
  }
  batch = jax.device_put({k: v.astype(np.int32) for k, v in batch.items()})
  train_step = jax.jit(
    steps.make_train_step(graphdef, tx, lambda step: LEARNING_RATE, losses.LossConfig()),
    donate_argnums=0,
  )
  key = jax.random.key(0)
  compiled = train_step.lower(state, batch, key).compile()
  memory = compiled.memory_analysis()

  def step() -> float:
    nonlocal state
    state, metrics = compiled(state, batch, key)
    return float(jax.block_until_ready((state, metrics))[1]['loss'])

  side_by_side.work(step, temp_bytes=memory.temp_size_in_bytes)


def run_hf(args: argparse.Namespace, compiled: bool) -> None:
  """PyTorch's, with the head redrawn; the eager one saves its weights."""
  import torch

  model = hf_model(args)
  if not compiled:
    model.save_pretrained(args.weights)
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=LEARNING_RATE,
    betas=BETAS,
    eps=EPSILON,
    weight_decay=WEIGHT_DECAY,
    fused=True,
  )
  if args.optimizer == 'adafactor':
    from transformers.optimization import Adafactor

    optimizer = Adafactor(model.parameters(), lr=LEARNING_RATE, relative_step=False)
  forward = torch.compile(model) if compiled else model
  data = make_batch(args, model.config.vocab_size)
  inputs = torch.from_numpy(data['inputs'])
  targets = torch.from_numpy(data['targets'])
  mask = torch.ones_like(inputs)

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = forward(input_ids=inputs, attention_mask=mask, labels=targets).loss
    loss.backward()
    optimizer.step()
    return loss.item()

  side_by_side.work(step)


def hf_model(args: argparse.Namespace):
  """Returns HF's model of our config, untied where ours is."""
  import torch
  import transformers

  cfg = model_config(args)
  config = transformers.T5Config(
    vocab_size=cfg.vocab_size,
    d_model=cfg.emb_dim,
    d_kv=cfg.head_dim,
    d_ff=cfg.mlp_dim,
    num_layers=cfg.num_encoder_layers,
    num_decoder_layers=cfg.num_decoder_layers,
    num_heads=cfg.num_heads,
    dropout_rate=cfg.dropout_rate,
    feed_forward_proj=('gated-gelu' if len(cfg.mlp_activations) > 1 else 'relu'),
    decoder_start_token_id=0,
    use_cache=False,
  )
  # transformers 5 forces True in the constructor, whatever it is given.
  config.tie_word_embeddings = cfg.logits_via_embedding
  config.scale_decoder_outputs = cfg.logits_via_embedding
  torch.manual_seed(0)
  model = transformers.T5ForConditionalGeneration(config)
  if not cfg.logits_via_embedding:
    # Untied, it also unties the input tables of the two stacks.
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    # Drawn with deviation 1, the head makes logits so large that the softmax
    # is full of denormal numbers, which cost 3 to 4 times the time.
    with torch.no_grad():
      model.lm_head.weight.normal_(std=cfg.emb_dim**-0.5)
  return model.train()


def run_ceiling(args: argparse.Namespace) -> None:
  """A jitted product of square matrices, about a tenth of a second."""
  del args
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax

  x = jax.random.normal(jax.random.key(0), (CEILING_DIM, CEILING_DIM))
  product = jax.jit(lambda x: x @ x)

  def step() -> float:
    return float(product(x).block_until_ready()[0, 0])

  side_by_side.work(step)


WORKERS = {
  'hf eager': lambda args: run_hf(args, compiled=False),
  'hf compile': lambda args: run_hf(args, compiled=True),
  'ours': run_ours,
  'matmul': run_ceiling,
}


# ---- Report ----


def report(args: argparse.Namespace, contenders: list[side_by_side.Contender]) -> None:
  """Prints a line for each contender."""
  from t5x_lite.compiler import flops

  cfg = model_config(args)
  by_name = {c.name: c for c in contenders}
  ceiling = 2 * CEILING_DIM**3
  # The best of the ceiling's runs: it is there to be an upper bound.
  peak = ceiling / min(by_name['matmul'].wall)
  peak_cpu = ceiling / min(by_name['matmul'].cpu)
  work = 3 * flops.forward_flops(
    cfg, batch_size=args.batch_size, inputs=args.inputs, targets=args.targets
  )
  tokens = args.batch_size * (args.inputs + args.targets)
  ours = by_name['ours']
  print(
    f'{args.model}, {cfg.num_encoder_layers}+{cfg.num_decoder_layers} layers, '
    f'batch {args.batch_size}, {args.inputs}/{args.targets} tokens, float32, '
    f'{args.optimizer}, dropout {args.dropout_rate}, scan {args.scan_layers}, huge pages '
    f'{args.huge_pages}, memory {args.memory}, {os.cpu_count()} cores'
  )
  print(
    f'{work / 1e9:.0f} GFLOP a step; matmul ceiling {peak / 1e9:.0f} GFLOP/s, '
    f'{peak_cpu / 1e9:.0f} per core; our temporaries '
    f'{ours.ready["temp_bytes"] / 1e9:.2f} GB'
  )
  print(
    f'{"":12}{"tokens/s":>10}{"s/step":>9}{"of ceiling":>12}{"ours is":>9}'
    f'{"tokens/CPU s":>15}{"CPU s":>8}{"of ceiling":>12}{"ours is":>9}'
    f'{"last loss":>12}{"peak GB":>9}'
  )
  for c in contenders:
    if c.name == 'matmul':
      continue
    print(
      f'{c.name:12}{tokens / c.seconds:10.0f}{c.seconds:9.2f}'
      f'{work / c.seconds / peak:12.1%}{c.seconds / ours.seconds:8.2f}x'
      f'{tokens / c.cpu_seconds:15.0f}{c.cpu_seconds:8.2f}'
      f'{work / c.cpu_seconds / peak_cpu:12.1%}'
      f'{c.cpu_seconds / ours.cpu_seconds:8.2f}x{c.last:12.5f}'
      f'{c.peak / 1e9:9.2f}'
    )


def main() -> None:
  """Starts the contenders, lets them run in turns, and prints a table."""
  args = arguments()
  if args.worker:
    # Before jax or torch start threads.
    if args.memory == 'kept' or (args.memory, args.worker) == ('own', 'ours'):
      host_memory.keep_freed_memory({**os.environ, 'JAX_PLATFORMS': 'cpu'})
    WORKERS[args.worker](args)
    return
  names = ['ours', 'matmul']
  if args.versus == 'hf':
    # The eager model comes first: ours starts from the weights it saves.
    names = ['hf eager', *names, 'hf compile']
  with tempfile.TemporaryDirectory() as directory:
    forwarded = [*sys.argv[1:], '--weights', directory]
    contenders = [
      side_by_side.start(name, forwarded, args.huge_pages)
      for name in names
      if name not in args.skip
    ]
    side_by_side.rounds(contenders, args.rounds, args.steps)
  report(args, contenders)


if __name__ == '__main__':
  main()
