"""Time and peak memory of each implementation of attention, side by side.

  python benchmarks/attention.py --lengths 512 2048 8192

A cell is the forward and backward pass of one layer's attention, with position
bias (its gradient too) and a mask of padding and segments, in a process of its
own. Seconds are the least of some calls, wall and CPU; `peak` is the most
memory the process had beyond what it had before its first call, and
`temporaries` the compiler's own count. Cells that do not fit are left out
(`--skip dense:32768`).
"""

import argparse
import json
import subprocess
import sys
import time


def arguments() -> argparse.Namespace:
  """Returns the parsed command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--lengths', type=int, nargs='+', default=[512, 2048, 8192])
  names = ['dense', 'blocked', 'pallas_tpu', 'pallas_gpu', 'cudnn']
  parser.add_argument('--implementations', nargs='+', choices=[*names, 'auto'], default=names)
  parser.add_argument('--skip', nargs='*', default=[], help='implementation:length')
  parser.add_argument('--kind', choices=('encoder', 'causal'), default='encoder')
  parser.add_argument('--batch_size', type=int, default=1)
  parser.add_argument('--num_heads', type=int, default=8)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--calls', type=int, default=5)
  parser.add_argument('--cell', help=argparse.SUPPRESS)
  return parser.parse_args()


def peak_bytes() -> int:
  """Returns the most memory so far: the device's, or the process's on CPUs."""
  import resource

  import jax

  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats['peak_bytes_in_use']
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_cell(args: argparse.Namespace) -> dict:
  """Times one implementation at one length."""
  import jax
  import jax.numpy as jnp

  from t5x_lite.errors import UsageError
  from t5x_lite.models import attention
  from t5x_lite.models.attention_inputs import Visibility, skew

  name, length = args.cell.split(':')
  L, B, H, K = int(length), args.batch_size, args.num_heads, args.head_dim
  try:
    attention.choose(name, L, L)
  except UsageError as error:
    return {'missing': str(error)}
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v = (jax.random.normal(key, (B, L, H, K), args.dtype) for key in keys[:3])
  values = jax.random.normal(keys[3], (H, 2 * L - 1))
  positions = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
  segments = 1 + positions * 4 // L
  visibility = Visibility(
    key_seen_BM=positions < L - L // 16 if args.kind == 'encoder' else None,
    segments=(segments, segments),
    causal=args.kind == 'causal',
  )

  def loss(arguments, visibility):
    q, k, v, bias = arguments
    if attention.takes_arrays(name, L, L):
      bias = skew(jnp.pad(bias, ((0, 0), (0, 1))), L, L)[None]
    mask = attention.mask(name, visibility, L, L)
    y = attention.attention(q, k, v, bias, mask, name)
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  compiled = jax.jit(jax.grad(loss)).lower((q, k, v, values), visibility).compile()
  before = peak_bytes()
  seconds, cpu_seconds = [], []
  for _ in range(args.calls):
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled((q, k, v, values), visibility))
    seconds.append(time.perf_counter() - wall)
    cpu_seconds.append(time.process_time() - cpu)
  return {
    'seconds': min(seconds),
    'cpu_seconds': min(cpu_seconds),
    'peak': peak_bytes() - before,
    'temporaries': compiled.memory_analysis().temp_size_in_bytes,
    'device': jax.devices()[0].device_kind,
  }


def main() -> None:
  """Prints a row for each implementation and length."""
  args = arguments()
  if args.cell:
    print(json.dumps(run_cell(args)))
    return
  print('| length | implementation | ms | CPU ms | peak MiB | temporaries MiB |')
  print('|---:|---|---:|---:|---:|---:|')
  devices, missing = set(), {}
  for length in args.lengths:
    for name in args.implementations:
      cell = f'{name}:{length}'
      if cell in args.skip or name in missing:
        continue
      command = [sys.executable, *sys.argv, '--cell', cell]
      done = subprocess.run(command, capture_output=True, text=True)
      if done.returncode:
        why = done.stderr.strip() or f'exit code {done.returncode}'
        print(f'| {length} | {name} | failed: {why.splitlines()[-1][:200]} |')
        continue
      found = json.loads(done.stdout.splitlines()[-1])
      if 'missing' in found:
        missing[name] = found['missing']
        continue
      devices.add(found['device'])
      print(
        f'| {length} | {name} | {1e3 * found["seconds"]:.1f} | {1e3 * found["cpu_seconds"]:.1f} '
        f'| {found["peak"] / 2**20:.0f} | {found["temporaries"] / 2**20:.0f} |',
        flush=True,
      )
  print(f'on {", ".join(sorted(devices))}; {args}')
  for name, why in missing.items():
    print(f'{name} is not there: {why}')


if __name__ == '__main__':
  main()
