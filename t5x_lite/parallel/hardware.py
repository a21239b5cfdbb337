"""Facts about accelerators: memory, bandwidths, how they are connected.

The vendors' numbers, for meshes, ahead-of-time reports and the planner: some per cent matter not.
"""

import dataclasses
import os
import re
from typing import Any

import jax

from t5x_lite.errors import UsageError, first_line

GIB = 2**30

# Peak dense bfloat16 (float16 where there is none) FLOP/s per JAX device, from the vendors' data
# sheets. TPU v2, v3 and TPU7x chips show as two devices. The longest prefix of a kind counts.
PEAK_FLOPS: dict[str, float] = {
  'TPU v2': 22.5e12,
  'TPU v3': 61.5e12,
  'TPU v4 lite': 137e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'TPU7x': 1153.5e12,
  'Tesla V100': 125e12,
  'Tesla T4': 65e12,
  'NVIDIA A100': 312e12,
  'NVIDIA A10': 125e12,
  'NVIDIA L4': 121e12,
  'NVIDIA L40': 181e12,
  'NVIDIA L40S': 362e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA GH200': 989e12,
  'NVIDIA B200': 2250e12,
  'NVIDIA GB200': 2450e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns a device's peak FLOP/s, or None if it is not in the table."""
  names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
  return PEAK_FLOPS[max(names, key=len)] if names else None


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX counts them, in bytes and seconds."""

  kind: str  # prefix of jax.Device.device_kind
  # memory that a program can use. For TPUs this is what XLA:TPU (libtpu 0.0.42) itself says in its
  # out-of-memory errors, a little less than what is sold.
  hbm_bytes: int
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s one way: of one ICI link, or of all of NVLink
  dcn_bandwidth: float  # bytes/s one way to other slices or nodes, per chip
  # default size of the mesh's model axis: one cube edge, or the GPUs that NVLink joins
  model_axis: int
  name: str = ''  # of a TPU, as in a topology: 'v5p'
  torus_dims: int = 0  # dims of the ICI torus, each with two links; 0 is a full switch
  # least extent from which a torus dim closes to a ring: 4 where cubes are joined optically (v4,
  # v5p), 16 on v5e and v6e
  wrap: int = 0

  @property
  def peak_flops(self) -> float:
    """Peak dense bfloat16 FLOP/s."""
    peak = peak_flops(self.kind)
    assert peak is not None, self.kind
    return peak


# TPU sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables "System architecture" (HBM GB/s;
# bidirectional ICI per chip / ports / 2; DCN per chip or per pod / chips). v4's DCN and its links'
# 45 GB/s: "How to Scale Your Model" (jax-ml.github.io/scaling-book), section 2. GPU sources:
# NVIDIA's data sheets; NVLink one way is half of what they give, between nodes one 400 Gb/s adapter
# a GPU is assumed (200 Gb/s for A100).
CHIPS: tuple[Chip, ...] = (
  Chip('TPU v4', int(30.75 * GIB), 1228e9, 45e9, 6.25e9, 4, name='v4', torus_dims=3, wrap=4),
  Chip('TPU v5 lite', int(15.75 * GIB), 819e9, 50e9, 3.125e9, 4, name='v5e', torus_dims=2, wrap=16),
  Chip('TPU v5', int(95.74 * GIB), 2765e9, 100e9, 6.25e9, 4, name='v5p', torus_dims=3, wrap=4),
  Chip('TPU v6', int(31.25 * GIB), 1638e9, 100e9, 12.5e9, 4, name='v6e', torus_dims=2, wrap=16),
  Chip('NVIDIA A100-SXM4-40GB', 40 * 10**9, 1555e9, 300e9, 25e9, 8),
  Chip('NVIDIA A100-SXM4-80GB', 80 * 10**9, 2039e9, 300e9, 25e9, 8),
  Chip('NVIDIA H100 80GB', 80 * 10**9, 3350e9, 450e9, 50e9, 8),
  Chip('NVIDIA H200', 141 * 10**9, 4800e9, 450e9, 50e9, 8),
  Chip('NVIDIA B200', 180 * 10**9, 8000e9, 900e9, 50e9, 8),
  Chip('NVIDIA L4', 24 * 10**9, 300e9, 32e9, 12.5e9, 1),
  Chip('NVIDIA L40', 48 * 10**9, 864e9, 32e9, 12.5e9, 1),
)


def find_chip(device_kind: str) -> Chip | None:
  """Returns the chip of a jax.Device.device_kind, or None if unknown."""
  kind = device_kind.replace('v5e', 'v5 lite')
  found = [chip for chip in CHIPS if kind.startswith(chip.kind)]
  return max(found, key=lambda chip: len(chip.kind)) if found else None


def parse_topology(text: str) -> Chip:
  """Returns the chip of a TPU slice: its name, and how many there are along each torus dim.

  Such as 'v5e:16x16'; UsageError if there is or can be none.
  """
  tpus = {chip.name: chip for chip in CHIPS if chip.torus_dims}
  match = re.fullmatch(r'(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})', text)
  if match is None or match[1] not in tpus:
    raise UsageError(
      f'--topology={text} is none; write CHIP:AxB for v5e and v6e and CHIP:AxBxC for v4 and v5p, '
      f'with CHIP one of {", ".join(tpus)}, for example v5e:16x16'
    )
  chip = tpus[match[1]]
  if match[2].count('x') + 1 != chip.torus_dims:
    example = '8' + 'x8' * (chip.torus_dims - 1)
    dims = f'a {chip.name} slice has {chip.torus_dims} dimensions'
    raise UsageError(f'--topology={text}: {dims}, for example {chip.name}:{example}')
  return chip


# XLA:TPU estimates fused convolutions recursively and runs out of its threads' 64 kB stacks where
# dropout is recomputed (T5 base with remat_policy='full', dropout_rate=0.1, libtpu 0.0.42.1: a
# segmentation fault in the compiler).
_LIBTPU_STACK = '--fibers_default_thread_stack_size'


def prepare_libtpu() -> None:
  """Sets what libtpu reads from the environment when it is loaded."""
  flags = os.environ.get('LIBTPU_INIT_ARGS', '')
  if _LIBTPU_STACK not in flags:
    os.environ['LIBTPU_INIT_ARGS'] = f'{flags} {_LIBTPU_STACK}={4 * 2**20}'.strip()
  # Several compiles at a time; no question to a metadata server that is not there; errors only.
  for name in ('ALLOW_MULTIPLE_LIBTPU_LOAD', 'TPU_SKIP_MDS_QUERY'):
    os.environ.setdefault(name, '1')
  for name in ('TPU_MIN_LOG_LEVEL', 'TPU_STDERR_LOG_LEVEL'):
    os.environ.setdefault(name, '3')


def topology_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
  """Returns the devices of TPU slices that need not exist, or 'local' ones.

  UsageError if libtpu knows none such.
  """
  from jax.experimental import topologies

  if topology == 'local':
    return jax.devices()
  chip = parse_topology(topology)
  prepare_libtpu()
  # Nothing runs; JAX must not wait for a TPU.
  jax.config.update('jax_platforms', 'cpu')
  options: dict[str, Any] = {'num_slices': num_slices} if num_slices > 1 else {}
  if chip.name == 'v4':  # one device a chip, as v4 is used
    options['chip_config_name'] = 'megacore'
  try:
    found = topologies.get_topology_desc(topology, platform='tpu', **options)
  except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
    text = str(error).lower()
    if isinstance(error, NotImplementedError):
      message = f'--topology={topology} is refused'
    elif 'libtpu' in text or 'tpu plugin' in text:
      message = "compiling for TPUs needs libtpu: in a checkout, pip install '.[tpu]'"
    else:
      message = f'XLA:TPU knows no topology {topology}'
    raise UsageError(f'{message}: {first_line(error)}') from error
  return list(found.devices)
