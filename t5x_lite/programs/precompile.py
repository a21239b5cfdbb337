"""Compiles a step for hardware that is not there; says whether it fits.

With libtpu the real XLA:TPU compiler runs on any machine. What it reports
(memory) and what its program says (collectives, traffic) come from it; FLOPs
come from flops.py and speeds from hardware.py.
"""

import collections
import dataclasses
import json as json_lib
import logging
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from t5x_lite.compiler import cost_model, flops, hlo, step_programs
from t5x_lite.data.config import DatasetConfig, batch_spec
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import hardware
from t5x_lite.parallel.hardware import Chip, find_chip, parse_topology
from t5x_lite.parallel.partitioning import MESH_AXES, MeshConfig
from t5x_lite.runs import memory_report
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optimizers import OptimizerConfig

log = logging.getLogger(__name__)

STEPS = ('train', 'decode')


class DoesNotFitError(RuntimeError):
  """The step needs more memory than the device has; already reported."""

  exit_code = 3


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
  """What the compiler says when a program does not fit, in bytes.

  Attributes:
    used: of the whole program; 0 if it was not said.
    available: what a program can have.
  """

  used: int
  available: int


def precompile(
  *,
  model: T5Config,
  dataset: DatasetConfig,
  optimizer: OptimizerConfig,
  total_steps: int = 1_000_000,
  loss: LossConfig | None = None,
  mesh: MeshConfig | None = None,
  num_microbatches: int = 1,
  decoding: DecodingConfig | None = None,
  topology: str = 'local',
  num_slices: int = 1,
  step: str = 'train',
  json: bool = False,
  hlo_file: str = '',
) -> dict[str, Any]:
  """Compiles the step of an experiment and reports what it costs.

  Args:
    model: the architecture.
    dataset: only its shapes are used; no data is read.
    optimizer: and its schedule.
    total_steps: of the experiment.
    loss: what is minimised.
    mesh: how devices are arranged.
    num_microbatches: parts that a batch is cut into.
    decoding: for step='decode'.
    topology: a TPU slice such as 'v5p:8x8x8', or 'local' for the devices at hand.
    num_slices: slices of that topology, joined by the data-center network.
    step: 'train' or 'decode'.
    json: print the report as one JSON object on the last line.
    hlo_file: where to write the compiled program's text, if anywhere.

  Returns:
    The report: what `json` prints.

  Raises:
    DoesNotFitError: if the compiler runs out of memory; reported like all else.
  """
  if step not in STEPS:
    raise UsageError(f'--step={step} is not one of {", ".join(STEPS)}')
  report, _ = compile_step(
    model=model,
    batch=batch_spec(dataset),
    optimizer=optimizer,
    total_steps=total_steps,
    loss=loss or LossConfig(),
    mesh=mesh or MeshConfig(),
    num_microbatches=num_microbatches,
    decoding=(decoding or DecodingConfig()) if step == 'decode' else None,
    topology=topology,
    num_slices=num_slices,
    hlo_file=hlo_file,
  )
  print(format_report(report))
  if json:
    print(json_lib.dumps(report), flush=True)
  if not report['fits']:
    raise DoesNotFitError
  return report


def find_devices(topology: str, num_slices: int = 1) -> Sequence[jax.Device]:
  """Returns the devices that a --topology means."""
  if topology == 'local':
    return jax.devices()
  parsed = parse_topology(topology)
  # Nothing runs; JAX must not wait for a TPU.
  jax.config.update('jax_platforms', 'cpu')
  return hardware.topology_devices(parsed, num_slices)


def compile_step(
  *,
  model: T5Config,
  batch: step_programs.BatchSpec,
  optimizer: OptimizerConfig,
  total_steps: int,
  loss: LossConfig,
  mesh: MeshConfig,
  num_microbatches: int,
  decoding: DecodingConfig | None = None,
  topology: str = 'local',
  num_slices: int = 1,
  hlo_file: str = '',
) -> tuple[dict[str, Any], step_programs.StepProgram]:
  """Compiles a step; returns the report and the program; see `precompile`."""
  devices = find_devices(topology, num_slices)
  if topology != 'local' and mesh.num_slices is None:
    mesh = dataclasses.replace(mesh, num_slices=num_slices)
  if decoding is not None:
    program = step_programs.decode_program(
      model=model, config=decoding, batch=batch, mesh=mesh, devices=devices
    )
  else:
    program = step_programs.train_program(
      model=model,
      optimizer=optimizer,
      loss=loss,
      batch=batch,
      mesh=mesh,
      total_steps=total_steps,
      num_microbatches=num_microbatches,
      devices=devices,
    )
  chip = find_chip(devices[0].device_kind)
  sizes = {name: program.mesh.shape[name] for name in MESH_AXES}
  report: dict[str, Any] = {
    'topology': topology,
    'num_slices': num_slices,
    'devices': len(devices),
    'device_kind': devices[0].device_kind,
    'step': 'train' if decoding is None else 'decode',
    'mesh': sizes,
    'batch_size': next(iter(batch.values()))[0][0],
    'num_microbatches': num_microbatches,
    'remat_policy': model.remat_policy,
    'attention': memory_report.attention_summary(
      model, {name: shape for name, (shape, _) in batch.items()}, devices[0].platform
    ),
  }
  report.update(_state_bytes(program))
  setup = cost_model.Setup(
    model=model,
    batch=batch,
    sizes=sizes,
    num_microbatches=num_microbatches,
    chunk=loss.chunk,
    state_bytes=report['params_bytes'] + report['optimizer_bytes'],
    params_bytes=report['params_bytes'],
    num_slices=num_slices,
  )
  start = time.monotonic()
  lowered = program.lower()
  report['lower_seconds'] = round(time.monotonic() - start, 1)
  start = time.monotonic()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    report['compile_seconds'] = round(time.monotonic() - start, 1)
    out_of_memory = parse_out_of_memory(str(error), sum(_state_bytes(program).values()))
    if out_of_memory is None:
      raise
    log.info('%s', str(error)[:4000])
    report.update(_model_flops(model, batch, decoding))
    report.update(_does_not_fit(setup, chip, out_of_memory))
    return report, program
  report['compile_seconds'] = round(time.monotonic() - start, 1)
  report.update(_memory(compiled, chip))
  report.update(_model_flops(model, batch, decoding))
  text = compiled.as_text() or ''
  if hlo_file:
    epath.Path(hlo_file).write_text(text)
  report.update(_costs(setup, chip, program, text, decoding is None))
  return report, program


def _state_bytes(program: step_programs.StepProgram) -> dict[str, Any]:
  """Bytes per device of what goes into the step, by kind."""
  state, batch, _ = program.arguments
  size = memory_report.tree_bytes_per_device
  if program.spec is None:
    params, opt_state = size(state), 0
  else:
    params, opt_state = size(state.params), size(state.opt_state)
  return {'params_bytes': params, 'optimizer_bytes': opt_state, 'batch_bytes': size(batch)}


def _memory(compiled: jax.stages.Compiled, chip: Chip | None) -> dict[str, Any]:
  """The compiler's own account of memory, in bytes per device."""
  stats = compiled.memory_analysis()
  hbm = None if chip is None else chip.hbm_bytes
  if stats is None:
    return {'fits': True, 'peak_bytes_per_device': None, 'hbm_bytes_per_device': hbm}
  peak = stats.peak_memory_in_bytes
  return {
    'fits': hbm is None or peak <= hbm,
    'peak_bytes_per_device': peak,
    'hbm_bytes_per_device': hbm,
    'argument_bytes': stats.argument_size_in_bytes,
    'temporary_bytes': stats.temp_size_in_bytes,
    'code_bytes': stats.generated_code_size_in_bytes,
    # Donation: outputs that lie where arguments were.
    'donated_bytes': stats.alias_size_in_bytes,
    'host_bytes': stats.host_argument_size_in_bytes,
  }


def _model_flops(
  model: T5Config, batch: step_programs.BatchSpec, decoding: DecodingConfig | None
) -> dict[str, Any]:
  rows, targets = batch['decoder_target_tokens'][0]
  inputs = 0
  if model.has_encoder:
    inputs = batch['encoder_input_tokens'][0][1]
  sizes = {'batch_size': rows, 'inputs': inputs}
  if decoding is None:
    total = flops.train_step_flops(model, targets=targets, **sizes)
  else:
    length = decoding.length
    total = flops.forward_flops(model, targets=length, **sizes)
  return {'model_flops_per_step': total}


def _costs(
  setup: cost_model.Setup,
  chip: Chip | None,
  program: step_programs.StepProgram,
  text: str,
  training: bool,
) -> dict[str, Any]:
  """Collectives, traffic and the roofline, from the compiled program."""
  devices = list(program.mesh.devices.flat)
  parsed = hlo.HloModule(text, len(devices))
  found = parsed.collectives()
  by_kind: dict[str, dict[str, float]] = collections.defaultdict(lambda: {'count': 0, 'bytes': 0.0})
  for one in found:
    by_kind[one.kind]['count'] += one.count
    by_kind[one.kind]['bytes'] += one.count * one.bytes
  hbm_bytes = parsed.hbm_bytes()
  result: dict[str, Any] = {
    'collectives': dict(by_kind),
    'collective_bytes_per_device': sum(k['bytes'] for k in by_kind.values()),
    'hbm_traffic_bytes_per_device': hbm_bytes,
  }
  if chip is None:
    return {**result, 'bound': None, 'roofline': None}
  total = cost_model.hardware_flops(setup) if training else (cost_model.forward_flops(setup))
  seconds = {
    'compute': total / len(devices) / chip.peak_flops,
    'HBM': hbm_bytes / chip.hbm_bandwidth,
    **cost_model.network_seconds(chip, devices, found),
  }
  return {**result, **_roofline(seconds)}


def _roofline(seconds: dict[str, float]) -> dict[str, Any]:
  """The longest of the times that could all overlap names the bound."""
  bound = max(seconds, key=lambda name: seconds[name])
  return {'bound': bound, 'roofline': seconds, 'roofline_step_seconds': seconds[bound]}


# ---- Out of memory ----

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def parse_out_of_memory(text: str, argument_bytes: int = 0) -> OutOfMemory | None:
  """Returns what XLA says about a program that does not fit, else None.

  Args:
    text: the error's.
    argument_bytes: what goes in, which one form of the message leaves out.
  """
  if 'RESOURCE_EXHAUSTED' not in text and 'Ran out of memory' not in text:
    return None
  match = re.search(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)', text) or re.search(
    r'\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)', text
  )
  if match is None:
    return OutOfMemory(0, 0)
  used, available = (int(float(match[i]) * _UNITS[match[i + 1]]) for i in (1, 3))
  if 'HLO temporaries' in text:
    used += argument_bytes
  return OutOfMemory(used, available)


def _does_not_fit(setup: cost_model.Setup, chip: Chip | None, found: OutOfMemory) -> dict[str, Any]:
  available = found.available or (chip.hbm_bytes if chip else 0)
  predicted = cost_model.memory(setup).total
  peak = found.used or predicted
  levers = [
    {
      'lever': lever.text,
      'predicted_peak_bytes': int(lever.bytes * peak / predicted),
      'fits': lever.bytes * peak / predicted <= available,
    }
    for lever in cost_model.levers(setup)
  ]
  seconds = {} if chip is None else cost_model.seconds(setup, chip)
  return {
    'fits': False,
    'peak_bytes_per_device': peak,
    'hbm_bytes_per_device': available,
    'missing_bytes_per_device': max(0, peak - available),
    'collective_bytes_per_device': cost_model.collective_bytes(setup),
    'levers': levers,
    **(_roofline(seconds) if seconds else {'bound': None}),
    'predicted': True,  # all but the memory: there is no program to read
  }


# ---- The report as text ----


def format_report(report: dict[str, Any]) -> str:
  """Returns the report for people."""
  size = memory_report.format_bytes
  mesh = ' '.join(f'{name}={n}' for name, n in report['mesh'].items())
  lines = [
    f'{report["step"]} step on {report["topology"]}'
    + (f' x {report["num_slices"]} slices' if report['num_slices'] > 1 else '')
    + f': {report["devices"]} x {report["device_kind"]}, mesh {mesh}, batch '
    f'{report["batch_size"]} in {report["num_microbatches"]}, remat '
    f'{report["remat_policy"]}',
    f'attention: {report["attention"]}',
    'per device:',
    f'  parameters       {size(report["params_bytes"])}',
    f'  optimizer state  {size(report["optimizer_bytes"])}',
    f'  batch            {size(report["batch_bytes"])}',
  ]
  if report.get('temporary_bytes') is not None:
    lines += [
      f'  temporaries      {size(report["temporary_bytes"])} (gradients, '
      'activations, gathered weights)',
      f'  code             {size(report["code_bytes"])}',
    ]
  peak, hbm = report['peak_bytes_per_device'], report['hbm_bytes_per_device']
  if peak is not None:
    room = f' of {size(hbm)} ({100 * peak / hbm:.0f}%)' if hbm else ''
    lines.append(f'  peak             {size(peak)}{room}')
  if report['fits']:
    lines.append('fits')
  else:
    missing = size(report['missing_bytes_per_device'])
    lines.append(f'DOES NOT FIT: {missing} too much. What would change that:')
    for lever in report['levers']:
      verdict = 'fits' if lever['fits'] else 'still too much'
      lines.append(f'  {lever["lever"]}: about {size(lever["predicted_peak_bytes"])}, {verdict}')
  for kind, entry in sorted(report.get('collectives', {}).items()):
    lines.append(f'  {kind}: {entry["count"]:.0f} a step, {size(entry["bytes"])} received')
  lines.append(f'model FLOPs a step: {report["model_flops_per_step"]:.4g}')
  if report.get('roofline'):
    parts = ', '.join(
      f'{name} {_milliseconds(value)}' for name, value in report['roofline'].items()
    )
    lines.append(
      f'roofline: {parts}; bound by {report["bound"]}, at best '
      f'{_milliseconds(report["roofline_step_seconds"])} a step'
      + (' (predicted)' if report.get('predicted') else '')
    )
  lines.append(f'lowered in {report["lower_seconds"]} s, compiled in {report["compile_seconds"]} s')
  return '\n'.join(lines)


def _milliseconds(seconds: float) -> str:
  if not math.isfinite(seconds):
    return '?'
  return f'{1e3 * seconds:.3g} ms'
