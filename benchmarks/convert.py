"""Memory and time of converting a large checkpoint, there and back.

  python benchmarks/convert.py --model t5_1_0_3b --directory /path/with/space

Writes a random Hugging Face checkpoint of a named size, then runs `t5x-lite
convert` over every format and back, each in a process of its own. Peaks are
sampled from /proc: anonymous memory is what the process itself holds, file
pages are parts of mapped checkpoints, which the kernel can take back at any
time. The checkpoint that comes back must have the very bytes that went in.
Needs three times the checkpoint's size on disk, and removes it all.
"""

import argparse
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from etils import epath

from t5x_lite.interop import export, tensor_names
from t5x_lite.interop.checkpoint_source import Source
from t5x_lite.interop.tensors import Tensor
from t5x_lite.models.config import T5Config, named_config

GB = 1e9


def arguments() -> argparse.Namespace:
  """Returns the parsed command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', default='t5_1_0_3b', help='a named size')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--directory', help='where there is space')
  return parser.parse_args()


def random_tensors(cfg: T5Config) -> dict[str, Tensor]:
  """Returns tensors that are drawn, row by row, when they are read."""
  pool = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

  def tensor(i: int, shape: tuple[int, ...]) -> Tensor:
    def fetch(index):
      # Cheap and different everywhere: the pool, read from another offset.
      rows = range(*index[0].indices(shape[0]))
      out = np.empty((len(rows), *shape[1:]), np.float32)
      width = int(np.prod(shape[1:]))
      for j, row in enumerate(rows):
        start = (i * 7919 + row * 104729) % (len(pool) - width)
        out[j] = pool[start : start + width].reshape(shape[1:]) * 0.02
      return out

    return Tensor(shape, np.dtype(np.float32), fetch, f'random {i}')

  return {
    name: tensor(i, shape) for i, (name, shape) in enumerate(tensor_names.shapes(cfg).items())
  }


def run(source: pathlib.Path, target: pathlib.Path, to: str) -> None:
  """Converts in a process of its own and prints what that took."""
  start = time.monotonic()
  process = subprocess.Popen(
    [sys.executable, '-m', 't5x_lite.main', 'convert', str(source), str(target), '--to', to],
    stderr=subprocess.DEVNULL,
  )
  peak = {'RssAnon': 0, 'RssFile': 0}
  while process.poll() is None:
    try:
      status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
    except OSError:
      break
    for line in status.splitlines():
      name, _, value = line.partition(':')
      if name in peak:
        peak[name] = max(peak[name], int(value.split()[0]) * 1024)
    time.sleep(0.02)
  if process.wait():
    raise SystemExit(f'convert {source} to {to} failed')
  size = sum(p.stat().st_size for p in target.rglob('*') if p.is_file())
  print(
    f'{source.name:>8} -> {to:8} {time.monotonic() - start:7.1f} s   '
    f'{size / GB:6.2f} GB written   peak {peak["RssAnon"] / GB:5.2f} GB '
    f'anonymous, {peak["RssFile"] / GB:5.2f} GB of files',
    flush=True,
  )


def digests(directory: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of every weight file."""
  found = {}
  for path in sorted(directory.glob('*.safetensors')):
    with path.open('rb') as file:
      found[path.name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return found


def main() -> None:
  """Writes the checkpoint, converts it around, compares."""
  args = arguments()
  cfg = named_config(args.model, param_dtype=args.dtype)
  with tempfile.TemporaryDirectory(dir=args.directory) as name:
    root = pathlib.Path(name)
    tensors = random_tensors(cfg)
    count = sum(tensor.size for tensor in tensors.values())
    largest = max(tensor.size for tensor in tensors.values())
    bytes_each = 2 if args.dtype.endswith('16') else 4
    print(
      f'{args.model}: {count:,} parameters as {args.dtype}, '
      f'{count * bytes_each / GB:.2f} GB, largest tensor '
      f'{largest * bytes_each / GB:.2f} GB',
      flush=True,
    )
    export.write(epath.Path(root / 'hf'), Source('', 'hf', cfg, tensors), to='hf')
    before = digests(root / 'hf')
    for middle in ('t5x_lite', 't5x'):
      run(root / 'hf', root / middle, middle)
      run(root / middle, root / 'back', 'hf')
      same = digests(root / 'back') == before
      print(f'{"":>8}    {len(before)} files, identical bytes: {same}')
      shutil.rmtree(root / 'back')
      shutil.rmtree(root / middle)


if __name__ == '__main__':
  main()
