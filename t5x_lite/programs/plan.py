"""Searches mesh, remat policy and microbatches for an experiment and hardware.

A model of memory and time ranks what can work; the compiler judges the best few.
"""

import dataclasses
import functools
import itertools
import json as json_lib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from t5x_lite.compiler import cost_model
from t5x_lite.compiler.step_programs import BatchSpec
from t5x_lite.data.config import DatasetConfig, batch_spec
from t5x_lite.errors import UsageError, check_positive
from t5x_lite.models import t5
from t5x_lite.models.config import REMAT_POLICIES, T5Config
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.hardware import Chip, find_chip, topology_devices
from t5x_lite.parallel.partitioning import MESH_AXES, MeshConfig
from t5x_lite.parallel.placement import Placement
from t5x_lite.programs import precompile
from t5x_lite.runs import memory_report
from t5x_lite.training import optimizers
from t5x_lite.training.losses import LossConfig

log = logging.getLogger(__name__)

# Predictions are this far off; what is predicted to fill more is not tried.
_MEMORY_MARGIN = 0.92
_MOST_MICROBATCHES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate(cost_model.Setup):
  """One way to run the experiment, and what is predicted of it."""

  chip: Chip
  mesh: MeshConfig  # with the sizes
  written: bool = False  # it is what the experiment itself says

  @property
  def setting(self) -> tuple[Any, ...]:
    """What distinguishes it."""
    sizes = tuple(self.sizes[name] for name in MESH_AXES)
    return (*sizes, self.model.remat_policy, self.num_microbatches)

  @functools.cached_property
  def peak_bytes(self) -> float:
    """Per device."""
    return cost_model.memory(self)['peak']

  @functools.cached_property
  def seconds(self) -> dict[str, float]:
    """Of a step, by what takes them."""
    return cost_model.seconds(self, self.chip)


def rank(seconds: Mapping[str, float]) -> tuple[float, float]:
  """Returns the time that bounds a step, and among equals what all of them add up to."""
  return float(f'{max(seconds.values()):.3g}'), sum(seconds.values())


def plan(
  *,
  model: T5Config,
  dataset: DatasetConfig,
  optimizer: optimizers.OptimizerConfig,
  total_steps: int = 1_000_000,
  loss: LossConfig | None = None,
  mesh: MeshConfig | None = None,
  num_microbatches: int = 1,
  topology: str,
  num_slices: int = 1,
  num_compiles: int = 3,
  json: bool = False,
  output: str = '',
) -> dict[str, Any]:
  """Finds how to run an experiment on a topology, and prints a ranked table.

  Returns 'winner' (None if nothing fits) and 'table', best first. UsageError if the topology is not
  known, DoesNotFitError if nothing was found that fits.

  Args:
    model: the architecture; its remat policy is searched.
    dataset: only its shapes are used.
    optimizer: and its schedule.
    total_steps: of the experiment.
    loss: what is minimised.
    mesh: as the experiment has it; its sizes are searched, the rest is kept.
    num_microbatches: as the experiment has it; searched.
    topology: a TPU slice such as 'v5p:8x8x8'.
    num_slices: slices of that topology.
    num_compiles: candidates that the compiler judges, beside the experiment's own settings.
    json: print the result as one JSON object on the last line.
    output: gin file to write the winning bindings to.
  """
  check_positive('plan.num_compiles', num_compiles)
  dataset.check_architecture(model.architecture)
  devices = topology_devices(topology, num_slices)
  chip = find_chip(devices[0].device_kind)
  if chip is None:
    kind = devices[0].device_kind
    raise UsageError(f'--topology={topology}: nothing is known about speed and memory of {kind!r}')
  mesh = mesh or MeshConfig()
  mesh = dataclasses.replace(mesh, num_slices=mesh.num_slices or num_slices)
  experiment: dict[str, Any] = {'model': model, 'batch': batch_spec(dataset), 'mesh': mesh}
  experiment |= {'optimizer': optimizer, 'loss': loss or LossConfig(), 'num_slices': num_slices}
  search = Search(**experiment, chip=chip)
  candidates = search.candidates(len(devices))
  fitting = [c for c in candidates if c.peak_bytes <= _MEMORY_MARGIN * chip.hbm_bytes]
  log.info('%d candidates, %d predicted to fit', len(candidates), len(fitting))
  best: dict[tuple[Any, ...], Candidate] = {}  # one a mesh: small changes teach little
  for candidate in fitting or candidates[:1]:
    best.setdefault(candidate.setting[:3], candidate)
  chosen = list(best.values())[:num_compiles]
  written = search.written(devices, num_microbatches)
  if not chosen and written is None:
    sizes = f'the batch size {search.batch_size} and the {model.num_heads} heads'
    fix = 'use a larger batch or fewer devices'
    raise UsageError(f'no mesh of {len(devices)} devices divides {sizes}: {fix}')
  if written is not None:
    chosen = [written, *(c for c in chosen if c.setting != written.setting)]

  rows = []
  for i, candidate in enumerate(chosen):
    log.info('compiling %d of %d: %s', i + 1, len(chosen), candidate.setting)
    experiment['model'] = candidate.model
    experiment['mesh'] = candidate.mesh
    experiment['num_microbatches'] = candidate.num_microbatches
    report, _ = precompile.compile_step(**experiment, total_steps=total_steps, topology=topology)
    rows.append(_row(candidate, report))
  rows.sort(key=lambda row: (not row['fits'], row['rank']))
  winner = rows[0] if rows[0]['fits'] else None
  result = {'topology': topology, 'num_slices': num_slices, 'devices': len(devices)}
  result |= {'candidates': len(candidates), 'winner': winner, 'table': rows}
  print(format_table(rows))
  if winner is not None:
    bindings = gin_bindings(winner)
    print(bindings, end='')
    if output:
      epath.Path(output).write_text(bindings)
  if json:
    print(json_lib.dumps(result), flush=True)
  if winner is None:
    raise precompile.DoesNotFitError
  return result


def with_sizes(mesh: MeshConfig, sizes: Mapping[str, int]) -> MeshConfig:
  """Returns the config with other sizes and the same rules."""
  changes: dict[str, Any] = {'preset': 'auto', 'num_partitions': None, **sizes}
  return dataclasses.replace(mesh, parameter_dims=mesh.parameter_dims or 2, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """What stays the same over all candidates."""

  model: T5Config
  batch: BatchSpec
  optimizer: optimizers.OptimizerConfig
  loss: LossConfig
  mesh: MeshConfig
  num_slices: int
  chip: Chip

  @property
  def batch_size(self) -> int:
    """Rows of a global batch."""
    return next(iter(self.batch.values()))[0][0]

  @functools.cached_property
  def _trees(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Shapes and logical axes of parameters and of the optimizer's state."""
    _, shapes, axes = t5.abstract_params(self.model)
    tx = optimizers.make_optimizer(self.optimizer, axes, shapes)
    opt_axes = optimizers.opt_state_axes(tx, shapes, axes)
    return (shapes, axes), (jax.eval_shape(tx.init, shapes), opt_axes)

  def candidates(self, num_devices: int) -> list[Candidate]:
    """Returns all candidates, the best predicted first."""
    found = []
    for sizes in self._meshes(num_devices):
      rows = self.batch_size // (sizes['data'] * sizes['fsdp'])
      divisors = [n for n in _divisors(rows) if n <= _MOST_MICROBATCHES]
      first = self.candidate(sizes)
      for policy, parts in itertools.product(REMAT_POLICIES, divisors):
        model = self.model.replace(remat_policy=policy)
        found.append(dataclasses.replace(first, model=model, num_microbatches=parts))
    return sorted(found, key=lambda candidate: rank(candidate.seconds))

  def written(self, devices: Sequence[jax.Device], num_microbatches: int) -> Candidate | None:
    """Returns what the experiment says, unless it leaves that to 'auto'."""
    given = [getattr(self.mesh, name) for name in (*MESH_AXES, 'num_partitions')]
    if self.mesh.preset == 'auto' and not any(given):
      return None
    resolved = partitioning.resolve(self.mesh, devices, num_heads=self.model.num_heads)
    search = dataclasses.replace(self, mesh=resolved)
    found = search.candidate({name: getattr(resolved, name) for name in MESH_AXES})
    return dataclasses.replace(found, num_microbatches=num_microbatches, written=True)

  def _meshes(self, num_devices: int) -> Iterator[dict[str, int]]:
    """Yields meshes on which the batch divides and heads are not cut."""
    per_slice = num_devices // self.num_slices
    for model in _divisors(per_slice):
      if self.model.num_heads % model or model > 4 * self.chip.model_axis:
        continue
      for fsdp in _divisors(per_slice // model):
        data = num_devices // (model * fsdp)
        if self.batch_size % (data * fsdp) == 0:
          yield {'data': data, 'fsdp': fsdp, 'model': model}

  def candidate(self, sizes: Mapping[str, int]) -> Candidate:
    """Returns a mesh with the model's own policy and no microbatches."""
    config = with_sizes(self.mesh, sizes)
    mesh: Any = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    placement = Placement(mesh, partitioning.logical_axis_rules(config), config)
    trees = (placement.specs(*tree) for tree in self._trees)
    params, opt_state = map(memory_report.bytes_per_device, trees)
    held = {'params_bytes': params, 'chunk': self.loss.chunk}
    held['state_bytes'] = params + (0 if self.mesh.offload_optimizer else opt_state)
    same = {name: getattr(self, name) for name in ('model', 'batch', 'num_slices', 'chip')}
    return Candidate(sizes=sizes, mesh=config, num_microbatches=1, **held, **same)


def _divisors(number: int) -> list[int]:
  return [i for i in range(1, number + 1) if number % i == 0]


def _row(candidate: Candidate, report: Mapping[str, Any]) -> dict[str, Any]:
  same = ('fits', 'roofline_step_seconds', 'bound', 'compile_seconds')
  return {
    'mesh': dict(candidate.sizes),
    'parameter_dims': candidate.mesh.parameter_dims,
    'remat_policy': candidate.model.remat_policy,
    'num_microbatches': candidate.num_microbatches,
    'written': candidate.written,
    'predicted_peak_bytes': int(candidate.peak_bytes),
    'compiled_peak_bytes': report['peak_bytes_per_device'],
    'hbm_bytes': report['hbm_bytes_per_device'],
    'predicted_step_seconds': max(candidate.seconds.values()),
    **{name: report[name] for name in same},
    'rank': rank(report['roofline']),
  }


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the candidates as a table, best first."""
  size = memory_report.format_bytes
  lines = [
    f'{"":2}{"data":>6}{"fsdp":>6}{"model":>6}  {"remat":<11}{"parts":>5}'
    f'{"predicted peak":>16}{"compiled peak":>16}{"predicted":>11}{"roofline":>11}  bound'
  ]
  for i, row in enumerate(rows):
    mesh = ''.join(f'{row["mesh"][name]:>6}' for name in MESH_AXES)
    verdict = row['bound'] if row['fits'] else 'DOES NOT FIT'
    note = '  (as written)' if row['written'] else ''
    peaks = [size(row[f'{kind}_peak_bytes']) for kind in ('predicted', 'compiled')]
    times = [1e3 * row[f'{kind}_step_seconds'] for kind in ('predicted', 'roofline')]
    lines.append(
      f'{i + 1:<2}{mesh}  {row["remat_policy"]:<11}{row["num_microbatches"]:>5}{peaks[0]:>16}'
      f'{peaks[1]:>16}{times[0]:>8.0f} ms{times[1]:>8.0f} ms  {verdict}{note}'
    )
  return '\n'.join(lines)


def gin_bindings(row: Mapping[str, Any]) -> str:
  """Returns a gin file with a row's settings, for after the experiment's."""
  mesh = '\n'.join(f'  {name} = {row["mesh"][name]}' for name in MESH_AXES)
  return f"""from __gin__ import dynamic_registration

from t5x_lite.models import config as models
from t5x_lite.parallel import partitioning
from t5x_lite.programs import train

partitioning.MeshConfig:
  preset = 'auto'
  num_partitions = None
  parameter_dims = {row['parameter_dims']}
{mesh}

models.T5Config.remat_policy = {row['remat_policy']!r}
train.train.num_microbatches = {row['num_microbatches']}
"""
