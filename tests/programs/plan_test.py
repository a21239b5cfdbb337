"""Candidates are legal and ranked; the winner is what its bindings say."""

import importlib.util
import json
import types

import jax
import numpy as np
import pytest

from t5x_lite.data.config import batch_spec
from t5x_lite.errors import UsageError
from t5x_lite.gin_front import configuration
from t5x_lite.parallel.hardware import find_chip
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import plan, precompile
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optimizers import OptimizerConfig
from tests import tiny_run
from tests.models import tiny

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed (the tpu extra)'
)


def search(**overrides):
  chip = find_chip('TPU v5 lite')
  assert chip is not None
  fields = dict(
    model=tiny.config(emb_dim=128, mlp_dim=256),
    batch=batch_spec(tiny_run.dataset(batch_size=64)),
    optimizer=OptimizerConfig(),
    loss=LossConfig(),
    mesh=MeshConfig(),
    num_slices=1,
    chip=chip,
  )
  return plan.Search(**{**fields, **overrides})


def test_candidates_are_legal_and_the_best_comes_first():
  found = search().candidates(16)
  assert len({c.setting for c in found}) == len(found) > 50
  for c in found:
    sizes = c.sizes
    assert sizes['data'] * sizes['fsdp'] * sizes['model'] == 16
    assert 64 % (sizes['data'] * sizes['fsdp'] * c.num_microbatches) == 0
    assert 4 % sizes['model'] == 0
  ranks = [plan.rank(c.seconds) for c in found]
  assert ranks == sorted(ranks)
  # With room for everything nothing is recomputed.
  assert found[0].model.remat_policy in ('none', 'minimal')


def test_replicas_span_slices():
  for c in search(num_slices=4).candidates(16):
    assert c.sizes['data'] % 4 == 0


def test_state_bytes_are_those_of_the_shards():
  one = search()
  whole = one.candidate({'data': 8, 'fsdp': 1, 'model': 1})
  cut = one.candidate({'data': 1, 'fsdp': 4, 'model': 2})
  report, _ = precompile.compile_step(
    model=one.model,
    batch=one.batch,
    optimizer=one.optimizer,
    total_steps=10,
    loss=one.loss,
    mesh=MeshConfig(fsdp=4, model=2),
    num_microbatches=1,
  )
  assert cut.state_bytes == report['params_bytes'] + report['optimizer_bytes']
  # Adafactor keeps at most one value a parameter: those too small to factor.
  assert whole.params_bytes < whole.state_bytes < 2 * whole.params_bytes


@pytest.mark.parametrize(
  ('config', 'dims'),
  [
    (MeshConfig(fsdp=8, parameter_dims=1), 1),
    (MeshConfig(num_partitions=2), 1),
    (MeshConfig(fsdp=8), 2),
  ],
)
def test_what_is_written_is_kept(config, dims):
  found = search(mesh=config).written(jax.devices(), 1)
  assert found is not None and found.mesh.parameter_dims == dims


def row(**overrides):
  fields = dict(mesh={'data': 1, 'fsdp': 4, 'model': 2}, parameter_dims=2)
  fields |= dict(remat_policy='save_names', num_microbatches=2)
  return {**fields, **overrides}


def test_the_winners_bindings_win_over_the_experiments(tmp_path):
  winner = tmp_path / 'plan.gin'
  winner.write_text(plan.gin_bindings(row()))
  configured = configuration.configure(
    precompile.precompile,
    gin_files=['configs/experiments/t5_1_1_xxl_pretrain.gin', str(winner)],
    programs=['t5x_lite.programs.train.train', 't5x_lite.programs.precompile.precompile'],
    inherits='t5x_lite.programs.train.train',
  )
  for setting in (
    'MeshConfig.fsdp = 4',
    'MeshConfig.model = 2',
    "MeshConfig.preset = 'auto'",
    "T5Config.remat_policy = 'save_names'",
    'precompile.num_microbatches = 2',
  ):
    assert setting in configured.text, configured.text


def test_the_table_shows_both_peaks():
  text = plan.format_table(
    [
      row(
        predicted_peak_bytes=2**30,
        compiled_peak_bytes=2 * 2**30,
        predicted_step_seconds=0.5,
        roofline_step_seconds=0.75,
        bound='ICI',
        fits=True,
        written=True,
      )
    ]
  )
  assert '1.00 GiB' in text and '2.00 GiB' in text
  assert '750 ms  ICI  (as written)' in text


def test_mistakes_are_told():
  given = dict(
    model=tiny.config(), dataset=tiny_run.dataset(batch_size=16), optimizer=OptimizerConfig()
  )
  with pytest.raises(UsageError, match='nothing is known'):
    plan.plan(**given, topology='local')
  with pytest.raises(UsageError, match='at least 1'):
    plan.plan(**given, topology='v5e:2x2', num_compiles=0)
  given['model'] = tiny.config(architecture='encoder')
  with pytest.raises(UsageError, match="'encoder' needs none that trains"):
    plan.plan(**given, topology='v5e:2x2')


def test_more_devices_than_can_be_used_are_an_error(monkeypatch):
  devices = [types.SimpleNamespace(device_kind='TPU v5 lite', platform='tpu')] * 256
  monkeypatch.setattr(plan, 'topology_devices', lambda *_: devices)
  with pytest.raises(UsageError, match='no mesh of 256 devices divides the batch size 8'):
    plan.plan(
      model=tiny.config(),
      dataset=tiny_run.dataset(),
      optimizer=OptimizerConfig(),
      topology='v5e:16x16',
    )


@needs_libtpu
@pytest.mark.slow
def test_a_plan_for_a_small_slice(tmp_path, capsys):
  output = tmp_path / 'plan.gin'
  result = plan.plan(
    model=tiny.config(emb_dim=128, mlp_dim=256),
    dataset=tiny_run.dataset(batch_size=64),
    optimizer=OptimizerConfig(),
    mesh=MeshConfig(fsdp=4),
    topology='v5e:2x2',
    num_compiles=1,
    output=str(output),
    json=True,
  )
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
  assert output.read_text() == plan.gin_bindings(result['winner'])
  written = [r for r in result['table'] if r['written']]
  assert len(written) == 1
  assert np.all([result['winner']['rank'] <= r['rank'] for r in result['table']])
