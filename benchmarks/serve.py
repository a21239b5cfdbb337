"""A server under load on loopback, with one slot and with several.

  python benchmarks/serve.py --clients 1 8 64

Starts `t5x-lite serve` twice, with `--slots` and with one slot (no batching), on a model of a named
size with random weights, and lets that many clients ask at a time, in turns. Outputs have random
lengths of 1 to `--new_tokens`, as answers do: random weights hardly ever end by themselves. Prints
requests and tokens a second and percentiles of latency. Bounded: `--requests` for each cell.
"""

import argparse
import concurrent.futures
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

import httpx


def start(model: str, slots: int) -> tuple[subprocess.Popen, str]:
  """Returns a server that is ready, and its address."""
  command = [sys.executable, '-m', 't5x_lite.main', 'serve', model, '--port=0']
  process = subprocess.Popen(
    [*command, f'--num_slots={slots}', '--max_queue=4096', '--request_seconds=600'],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': os.environ.get('JAX_PLATFORMS', 'cpu')},
  )
  assert process.stdout is not None
  found = re.search(r'http://\S+:\d+', process.stdout.readline())
  assert found, 'the server did not start'
  return process, found[0]


def load(address: str, clients: int, requests: int, new_tokens: int, words: int) -> dict:
  """Returns what `clients` at a time see."""
  rng = random.Random(0)
  bodies = [
    {
      'inputs': ' '.join(rng.choices(['the', 'window', 'is', 'open', 'and', 'good'], k=words)),
      'max_new_tokens': rng.randint(1, new_tokens),
    }
    for _ in range(requests)
  ]

  def ask(body: dict) -> tuple[float, int]:
    began = time.monotonic()
    answer = client.post('/generate', json=body)
    answer.raise_for_status()
    return time.monotonic() - began, answer.json()['outputs'][0]['num_tokens']

  with httpx.Client(base_url=address, timeout=600, limits=httpx.Limits()) as client:
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
      list(pool.map(ask, bodies[: 2 * clients]))  # compiles what is not compiled yet
      began = time.monotonic()
      answers = list(pool.map(ask, bodies))
      wall = time.monotonic() - began
  seconds = sorted(s for s, _ in answers)
  return {
    'rate': requests / wall,
    'tokens': sum(n for _, n in answers) / wall,
    'p50': statistics.median(seconds),
    'p90': seconds[int(0.9 * len(seconds))],
    'p99': seconds[min(int(0.99 * len(seconds)), len(seconds) - 1)],
  }


def main() -> None:
  """Prints one line a cell."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', default='t5_1_1_small', help='a named size')
  parser.add_argument('--clients', type=int, nargs='+', default=[1, 8, 64])
  parser.add_argument('--slots', type=int, default=8)
  parser.add_argument('--requests', type=int, default=64)
  parser.add_argument('--new_tokens', type=int, default=64)
  parser.add_argument('--words', type=int, default=40)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    code = (
      'import t5x_lite; t5x_lite.new(t5x_lite.named_config('
      f'{args.model!r}), t5x_lite.VocabularyConfig()).save({folder + "/model"!r})'
    )
    subprocess.run(
      [sys.executable, '-c', code], check=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}
    )
    servers = {slots: start(f'{folder}/model', slots) for slots in (args.slots, 1)}
    try:
      print('clients slots  requests/s  tokens/s  p50 s  p90 s  p99 s')
      for clients in args.clients:
        for slots, (_, address) in servers.items():
          cell = load(address, clients, args.requests, args.new_tokens, args.words)
          print(
            f'{clients:7} {slots:5}  {cell["rate"]:10.2f}  {cell["tokens"]:8.1f}  '
            f'{cell["p50"]:5.2f}  {cell["p90"]:5.2f}  {cell["p99"]:5.2f}',
            flush=True,
          )
    finally:
      for process, _ in servers.values():
        process.terminate()
        process.wait(timeout=60)


if __name__ == '__main__':
  main()
