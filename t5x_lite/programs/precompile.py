"""Compiles a step for hardware that is not there; says whether it fits.

With libtpu the real XLA:TPU compiler runs on any machine: memory, collectives and traffic are its.
"""

import dataclasses
import json as json_lib
import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from t5x_lite.compiler import cost_model, flops, hlo, step_programs
from t5x_lite.data.config import DatasetConfig, batch_spec
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import check_one_of
from t5x_lite.models.config import T5Config
from t5x_lite.parallel.hardware import Chip, find_chip, topology_devices
from t5x_lite.parallel.partitioning import MESH_AXES, MeshConfig
from t5x_lite.runs import memory_report
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optimizers import OptimizerConfig

log = logging.getLogger(__name__)

# What both functions take.
_PASSED_ON = 'model optimizer total_steps num_microbatches topology num_slices hlo_file'.split()
# What lies in a device's memory: a key of the report, and how it is printed.
_PARTS = {'params_bytes': 'parameters', 'optimizer_bytes': 'optimizer state'}
_PARTS |= {'batch_bytes': 'batch', 'temporary_bytes': 'temporaries', 'code_bytes': 'code'}


class DoesNotFitError(RuntimeError):
  """The step needs more memory than the device has; already reported."""

  exit_code = 3


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

  Returns the report: what `json` prints. DoesNotFitError, after it, if memory is too little.

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
  """
  given = dict(locals())
  check_one_of('precompile.step', step, ('train', 'decode'))
  dataset.check_architecture(model.architecture)
  report, _ = compile_step(
    batch=batch_spec(dataset),
    loss=loss or LossConfig(),
    mesh=mesh or MeshConfig(),
    decoding=(decoding or DecodingConfig()) if step == 'decode' else None,
    **{name: given[name] for name in _PASSED_ON},
  )
  print(format_report(report))
  if json:
    print(json_lib.dumps(report), flush=True)
  if not report['fits']:
    raise DoesNotFitError
  return report


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
  devices = topology_devices(topology, num_slices)
  if topology != 'local' and mesh.num_slices is None:
    mesh = dataclasses.replace(mesh, num_slices=num_slices)
  both: dict[str, Any] = {'model': model, 'batch': batch, 'mesh': mesh, 'devices': devices}
  training: dict[str, Any] = {'optimizer': optimizer, 'loss': loss, 'total_steps': total_steps}
  how: dict[str, Any] = {'num_slices': num_slices, 'num_microbatches': num_microbatches}
  if decoding is not None:
    program = step_programs.decode_program(config=decoding, **both)
    (rows, inputs), _ = batch['encoder_input_tokens']
    size = {'batch_size': rows, 'inputs': inputs, 'targets': decoding.length}
    needed = flops.forward_flops(model, **size, outputs=decoding.rows_per_input)
  else:
    program = step_programs.train_program(num_microbatches=num_microbatches, **training, **both)
    needed = flops.batch_train_flops(model, program.arguments[1])
  chip = find_chip(devices[0].device_kind)
  sizes = {name: program.mesh.shape[name] for name in MESH_AXES}
  shapes = {name: shape for name, (shape, _) in batch.items()}
  held = _state_bytes(program)
  report: dict[str, Any] = {
    'topology': topology,
    'devices': len(devices),
    'device_kind': devices[0].device_kind,
    'step': 'train' if decoding is None else 'decode',
    'mesh': sizes,
    'batch_size': next(iter(shapes.values()))[0],
    'remat_policy': model.remat_policy,
    'attention': memory_report.attention_summary(model, shapes, devices[0].platform),
    'model_flops_per_step': needed,
    **how,
    **held,
  }
  setup = cost_model.Setup(
    model=model,
    batch=batch,
    sizes=sizes,
    chunk=loss.chunk,
    state_bytes=held['params_bytes'] + held['optimizer_bytes'],
    params_bytes=held['params_bytes'],
    **how,
  )
  if decoding is None and chip and cost_model.memory(setup)['largest'] > 2 * chip.hbm_bytes:
    # Not even half of its bits would fit, and such arrays make XLA:TPU abort the process.
    report |= {'lower_seconds': 0.0, 'compile_seconds': 0.0} | _does_not_fit(setup, chip, 0, 0)
    return report, program
  start = time.monotonic()
  lowered = program.lower()
  report['lower_seconds'] = round(time.monotonic() - start, 1)
  start = time.monotonic()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    out_of_memory = parse_out_of_memory(str(error), sum(held.values()))
    if out_of_memory is None:
      raise
    log.info('%s', str(error)[:4000])
    report |= _does_not_fit(setup, chip, *out_of_memory)
    if decoding is not None:  # the predictions are of training
      report |= {'levers': [], 'bound': None, 'roofline': None}
    return report, program
  finally:
    report['compile_seconds'] = round(time.monotonic() - start, 1)
  text = compiled.as_text() or ''
  if hlo_file:
    epath.Path(hlo_file).write_text(text)
  done = needed if decoding is not None else cost_model.hardware_flops(setup)
  costs = _costs(chip, list(program.mesh.devices.flat), text, done)
  return report | _memory(compiled, chip) | costs, program


def _state_bytes(program: step_programs.StepProgram) -> dict[str, Any]:
  """Bytes per device of what goes into the step, by kind."""
  state, batch, _ = program.arguments
  parts = (state, ()) if program.spec is None else (state.params, state.opt_state)
  sizes = map(memory_report.bytes_per_device, (*parts, batch))
  return dict(zip(('params_bytes', 'optimizer_bytes', 'batch_bytes'), sizes, strict=True))


def _memory(compiled: jax.stages.Compiled, chip: Chip | None) -> dict[str, Any]:
  """The compiler's own account of memory, in bytes per device."""
  stats: Any = compiled.memory_analysis()
  hbm = None if chip is None else chip.hbm_bytes
  peak = stats.peak_memory_in_bytes
  found = {'peak_bytes_per_device': peak, 'hbm_bytes_per_device': hbm}
  # Donated are outputs that lie where arguments were.
  names = {'argument': 'argument_size', 'temporary': 'temp_size', 'host': 'host_argument_size'}
  names |= {'code': 'generated_code_size', 'donated': 'alias_size'}
  found |= {f'{x}_bytes': getattr(stats, f'{name}_in_bytes') for x, name in names.items()}
  return {'fits': hbm is None or peak <= hbm, **found}


def _costs(
  chip: Chip | None, devices: Sequence[jax.Device], text: str, hardware_flops: float
) -> dict[str, Any]:
  """Collectives, traffic and the roofline, from the compiled program's text."""
  parsed = hlo.HloModule(text, len(devices))
  found = parsed.collectives()
  by_kind: dict[str, dict[str, float]] = {}
  for one in found:
    entry = by_kind.setdefault(one.kind, {'count': 0, 'bytes': 0.0})
    entry['count'] += one.count
    entry['bytes'] += one.count * one.bytes
  hbm_bytes = parsed.hbm_bytes()
  received = sum(k['bytes'] for k in by_kind.values())
  result = {'collectives': by_kind, 'collective_bytes_per_device': received}
  result['hbm_traffic_bytes_per_device'] = hbm_bytes
  if chip is None:
    return {**result, 'bound': None, 'roofline': None}
  compute = hardware_flops / len(devices) / chip.peak_flops
  seconds = {'compute': compute, 'HBM': hbm_bytes / chip.hbm_bandwidth}
  return {**result, **_roofline(seconds | cost_model.network_seconds(chip, devices, found))}


def _roofline(seconds: dict[str, float]) -> dict[str, Any]:
  """The longest of the times that could all overlap names the bound."""
  bound = max(seconds, key=lambda name: seconds[name])
  return {'bound': bound, 'roofline': seconds, 'roofline_step_seconds': seconds[bound]}


def parse_out_of_memory(text: str, argument_bytes: int = 0) -> tuple[int, int] | None:
  """Returns (used, available) of XLA's error about a program that does not fit, else None.

  In bytes; 0 if it was not said.
  """
  if 'RESOURCE_EXHAUSTED' not in text and 'Ran out of memory' not in text:
    return None
  size = r'([\d.]+)([KMGT]?)'
  forms = (rf'Used {size} of {size}', rf'\({size}\) exceeds available HBM \({size}\)')
  match = re.search(forms[0], text) or re.search(forms[1], text)
  if match is None:
    return 0, 0
  units = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  used, available = (int(float(match[i]) * units[match[i + 1]]) for i in (1, 3))
  if 'HLO temporaries' in text:  # which leaves out what goes in
    used += argument_bytes
  return used, available


def _does_not_fit(
  setup: cost_model.Setup, chip: Chip | None, used: int, available: int
) -> dict[str, Any]:
  available = available or (chip.hbm_bytes if chip else 0)
  predicted = cost_model.memory(setup)['peak']
  peak = used or predicted
  sizes = {lever: size * peak / predicted for lever, size in cost_model.levers(setup).items()}
  device = {'peak': peak, 'hbm': available, 'missing': max(0, peak - available)}
  device['collective'] = cost_model.collective_bytes(setup)
  return {
    'fits': False,
    **{f'{name}_bytes_per_device': size for name, size in device.items()},
    'levers': [
      {'lever': text, 'predicted_peak_bytes': int(size), 'fits': size <= available}
      for text, size in sizes.items()
    ],
    **({'bound': None} if chip is None else _roofline(cost_model.seconds(setup, chip))),
    'predicted': True,  # all but the memory: there is no program to read
  }


def format_report(report: dict[str, Any]) -> str:
  """Returns the report for people."""
  size = memory_report.format_bytes
  mesh = ' '.join(f'{name}={n}' for name, n in report['mesh'].items())
  slices = f' x {report["num_slices"]} slices' if report['num_slices'] > 1 else ''
  lines = [
    f'{report["step"]} step on {report["topology"]}{slices}: {report["devices"]} x '
    f'{report["device_kind"]}, mesh {mesh}, batch {report["batch_size"]} in '
    f'{report["num_microbatches"]}, remat {report["remat_policy"]}',
    f'attention: {report["attention"]}',
    'per device:',
  ]
  for key, label in _PARTS.items():
    if key in report:
      note = ' (gradients, activations, gathered weights)' if key == 'temporary_bytes' else ''
      lines.append(f'  {label:15}  {size(report[key])}{note}')
  peak, hbm = report['peak_bytes_per_device'], report['hbm_bytes_per_device']
  room = f' of {size(hbm)} ({100 * peak / hbm:.0f}%)' if hbm else ''
  lines.append(f'  peak             {size(peak)}{room}')
  if report['fits']:
    lines.append('fits')
  else:
    missing = size(report['missing_bytes_per_device'])
    fix = 'What would change that:' if report['levers'] else 'Use a smaller batch.'
    lines.append(f'DOES NOT FIT: {missing} too much. {fix}')
    for lever in report['levers']:
      verdict = 'fits' if lever['fits'] else 'still too much'
      lines.append(f'  {lever["lever"]}: about {size(lever["predicted_peak_bytes"])}, {verdict}')
  for kind, entry in sorted(report.get('collectives', {}).items()):
    lines.append(f'  {kind}: {entry["count"]:.0f} a step, {size(entry["bytes"])} received')
  lines.append(f'model FLOPs a step: {report["model_flops_per_step"]:.4g}')
  if report.get('roofline'):
    parts = ', '.join(f'{name} {1e3 * x:.3g} ms' for name, x in report['roofline'].items())
    note = ' (predicted)' if report.get('predicted') else ''
    best = f'{1e3 * report["roofline_step_seconds"]:.3g} ms a step{note}'
    lines.append(f'roofline: {parts}; bound by {report["bound"]}, at best {best}')
  done = f'lowered in {report["lower_seconds"]} s, compiled in {report["compile_seconds"]} s'
  lines.append(done if report['compile_seconds'] else 'not compiled: an array is twice as large')
  return '\n'.join(lines)
