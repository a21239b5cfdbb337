"""Calls what `t5x-lite export` wrote beside this file. It needs jax, and nothing else of t5x_lite.

    import load_exported
    model = load_exported.Exported('DIRECTORY')
    rows, log_probs = model.generate([[100, 19, 207, 1]])

Rows are token ids, EOS included; vocabulary.model is for the sentencepiece package.
"""

import json
import pathlib
import struct

import jax
import jax.export
import ml_dtypes  # jax brings it
import numpy as np

_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}


class Exported:
  """The functions of one directory."""

  def __init__(self, directory):
    """Reads parameters and programs; what is there is in `functions`."""
    root = pathlib.Path(directory)
    self._about = json.loads((root / 'export.json').read_text())
    params = _read_safetensors(root / 'params.safetensors')
    self._params = [jax.device_put(params[name]) for name in self._about['params']]
    self.functions = {}
    for entry in self._about['functions']:
      exported = jax.export.deserialize((root / entry['file']).read_bytes())
      sizes = self.functions.setdefault(entry['function'], {})
      sizes[entry['input_length']] = jax.jit(exported.call)

  def generate(self, inputs):
    """Returns (rows of ids without EOS, log-probability of each)."""
    tokens, log_probs = self._call('generate', inputs)
    eos = self._about['eos_id']
    rows = [row[: [*row, eos].index(eos)] for row in np.asarray(tokens).tolist()]
    for row in rows:
      while row and row[-1] == self._about['pad_id']:  # it never ended
        row.pop()
    return rows, np.asarray(log_probs).tolist()

  def encode(self, inputs):
    """Returns the encoder's output at each position of each row, float32."""
    encoded = np.asarray(self._call('encode', inputs))
    return [vectors[: len(row)] for vectors, row in zip(encoded, inputs, strict=True)]

  def score(self, inputs, targets):
    """Returns the log-probability of each target, EOS included if it is in it."""
    return np.asarray(self._call('score', inputs, targets)).tolist()

  def _call(self, name, inputs, *more):
    longest = max(map(len, inputs))
    sizes = self.functions.get(name, {})
    length = min((size for size in sizes if size >= longest), default=None)
    if length is None:
      raise ValueError(f'{name} of {longest} tokens was not exported; there are {sorted(sizes)}')
    lengths = [length, *[self._about['target_length']] * len(more)]
    arrays = [self._padded(rows, n) for rows, n in zip((inputs, *more), lengths, strict=True)]
    return sizes[length](self._params, *arrays)

  def _padded(self, rows, length):
    array = np.full((len(rows), length), self._about['pad_id'], np.int32)
    for i, row in enumerate(rows):
      array[i, : len(row)] = row
    return array


def _read_safetensors(path):
  """Returns {name: array}: the format is a JSON header and raw bytes after it."""
  data = np.memmap(path, np.uint8, 'r')
  (size,) = struct.unpack('<Q', data[:8].tobytes())
  header = json.loads(data[8 : 8 + size].tobytes())
  arrays = {}
  for name, entry in header.items():
    if name != '__metadata__':
      begin, end = (8 + size + offset for offset in entry['data_offsets'])
      arrays[name] = data[begin:end].view(_DTYPES[entry['dtype']]).reshape(entry['shape'])
  return arrays
