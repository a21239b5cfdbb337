"""Reports of a run's size: what `--dry_run` prints, is logged at the start and kept in the run."""

import collections
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import humanize
import jax
from etils import epath

from t5x_lite.models import attention as attention_lib
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees
from t5x_lite.parallel.logical_axes import mesh_axes
from t5x_lite.runs import run_directory
from t5x_lite.training import train_state

SHARDING_FILE = 'sharding.txt'
# '1.50 GiB' for instance.
format_bytes = functools.partial(humanize.naturalsize, binary=True, format='%.2f')


def bytes_per_device(tree: Any) -> int:
  """Returns what one device holds of all arrays of a tree, which have shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def sharding_table(spec: train_state.StateSpec) -> str:
  """Returns a line for every array of the state."""
  rows = [('array', 'shape', 'dtype', 'logical axes', 'sharding', 'per device')]
  for path, leaf, names in pytrees.leaves_with_axes(spec.shapes, spec.axes):
    sizes = leaf.sharding.mesh.shape
    # Mesh axes of size 1 cut nothing.
    axes = [[axis for axis in mesh_axes(part) if sizes[axis] > 1] for part in leaf.sharding.spec]
    cut = ['+'.join(part) or '-' for part in axes]
    if set(cut) <= {'-'}:
      cut = ['replicated']
    shape = 'x'.join(map(str, leaf.shape)) or 'scalar'
    logical = ' '.join(axis or '-' for axis in names) or '-'
    size = format_bytes(bytes_per_device(leaf))
    rows.append(('/'.join(path), shape, str(leaf.dtype), logical, ' '.join(cut), size))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  padded = ('  '.join(map(str.ljust, row, widths)) for row in rows)
  return ''.join(f'{line.rstrip()}\n' for line in padded)


def parameter_summary(params: Any) -> str:
  """Returns the parameter count, in all and by top-level part."""
  parts: collections.Counter[str] = collections.Counter()
  for name, leaf in pytrees.flatten_names(params).items():
    parts[name.split('/')[0]] += math.prod(leaf.shape)
  detail = ', '.join(f'{name} {count:,}' for name, count in parts.items())
  return f'{parts.total():,} parameters ({detail})'


def state_memory(spec: train_state.StateSpec) -> str:
  """Returns bytes per device of what stays there between steps."""
  params = bytes_per_device(spec.shapes.params)
  opt_state = bytes_per_device(spec.shapes.opt_state)
  return f'per device: parameters {format_bytes(params)}, optimizer state {format_bytes(opt_state)}'


def compiled_memory(compiled: jax.stages.Compiled) -> str:
  """Returns the compiler's own account of a step's memory per device."""
  stats: Any = compiled.memory_analysis()
  outputs = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
  sizes = (stats.argument_size_in_bytes, stats.temp_size_in_bytes, outputs)
  text = 'per device, compiled: state and batch {}, temporaries {}, new outputs {}, together {}'
  return text.format(*map(format_bytes, (*sizes, sum(sizes))))


def attention_summary(model: T5Config, shapes: Mapping[str, Sequence[int]], platform: str) -> str:
  """Returns which implementation each attention gets, for the shapes of a batch's arrays."""
  inputs = shapes['encoder_input_tokens'][1] if model.has_encoder else 0
  targets = shapes['decoder_target_tokens'][1] if model.has_decoder else 0
  return attention_lib.describe(model.attention, inputs, targets, platform)


def print_dry_run(
  config: Mapping[str, Any],
  spec: train_state.StateSpec,
  mesh: jax.sharding.Mesh,
  compiled: jax.stages.Compiled,
  facts: Mapping[str, str] | None = None,
  *,
  file: str = '',
) -> None:
  """Prints what a run of these arguments would be; the caller has written nothing.

  The facts are more lines, by name. A file that is not '' gets all settings and how arrays are cut.
  """
  sizes = ', '.join(f'{name}={size}' for name, size in mesh.shape.items())
  kind = mesh.devices.flat[0].device_kind
  entry = run_directory.to_json(config)
  lines = [f'mesh           {sizes} on {mesh.size} x {kind}']
  for name in ('dataset', 'optimizer'):
    given = {key: x for key, x in entry.get(name, {}).items() if key != 'class' and x is not None}
    fields = [f'{key}={x}' for key, x in given.items() if not isinstance(x, dict)]
    lines.append(f'{name:14} {", ".join(fields[:6])}')
  for name in ('total_steps', 'num_microbatches', 'eval_period', 'seed'):
    lines.append(f'{name:14} {entry.get(name)}')
  lines += [f'{name:14} {fact}' for name, fact in (facts or {}).items()]
  lines += [parameter_summary(spec.shapes.params), state_memory(spec), compiled_memory(compiled)]
  print('\n'.join(lines))
  if file:
    text = json.dumps(entry, indent=2)
    epath.Path(file).write_text(f'# Configuration\n{text}\n\n# Sharding\n{sharding_table(spec)}')
    print(f'configuration and sharding of every array: {file}')
  else:
    print('--dry_run_file FILE writes configuration and sharding of every array')
  print('dry run: no run was begun')
