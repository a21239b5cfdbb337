"""What is reported is what the compiler and the arrays say."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from t5x_lite import main
from t5x_lite.data.config import batch_spec
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.parallel import hardware
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import precompile
from t5x_lite.training import train_state
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optimizers import OptimizerConfig
from tests import tiny_run
from tests.models import tiny

HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason='libtpu is not installed (the tpu extra)')

REQUIRED = {
  'topology',
  'devices',
  'fits',
  'peak_bytes_per_device',
  'hbm_bytes_per_device',
  'model_flops_per_step',
  'collective_bytes_per_device',
  'bound',
  'compile_seconds',
}


def arguments(**overrides):
  fields = dict(
    model=tiny.config(emb_dim=128, mlp_dim=256, num_decoder_layers=2),
    dataset=tiny_run.dataset(batch_size=16),
    optimizer=OptimizerConfig(),
    mesh=MeshConfig(fsdp=4, model=2),
  )
  return {**fields, **overrides}


def last_json(text):
  return json.loads(text.splitlines()[-1])


def test_a_report_for_the_devices_at_hand(capsys):
  precompile.precompile(**arguments(), json=True)
  out = capsys.readouterr().out
  report = last_json(out)
  assert report.keys() >= REQUIRED
  assert report['devices'] == 8 and report['fits']
  assert report['mesh'] == {'data': 1, 'fsdp': 4, 'model': 2}
  # Each of the 4 layers gathers its weights and scatters its gradients.
  assert report['collective_bytes_per_device'] > 0
  assert 'parameters' in out and 'all-gather' in out


def test_reported_bytes_are_those_of_the_arrays():
  given = arguments()
  report, program = precompile.compile_step(
    model=given['model'],
    batch=batch_spec(given['dataset']),
    optimizer=given['optimizer'],
    total_steps=10,
    loss=LossConfig(),
    mesh=given['mesh'],
    num_microbatches=2,
  )
  key = jax.random.key(0)
  state = train_state.init_state(given['model'], program.tx, program.spec, key)

  def held(tree):
    device = jax.devices()[3]
    return sum(
      shard.data.nbytes
      for x in jax.tree.leaves(tree)
      for shard in x.addressable_shards
      if shard.device == device
    )

  assert report['params_bytes'] == held(state.params)
  assert report['optimizer_bytes'] == held(state.opt_state)
  compiled = program.lower().compile()
  stats = compiled.memory_analysis()
  assert report['peak_bytes_per_device'] == stats.peak_memory_in_bytes
  # The step's arguments are the state (its step counter too), the key and the
  # batch, but for features that the step does not read (positions): jax drops
  # those.
  rest = report['argument_bytes'] - held(state)
  assert 0 < rest < report['batch_bytes'] + 64


@needs_libtpu
def test_a_step_for_a_tpu_that_is_not_there(capsys):
  precompile.precompile(**arguments(), topology='v5e:2x4', json=True)
  report = last_json(capsys.readouterr().out)
  assert report.keys() >= REQUIRED
  assert report['device_kind'] == 'TPU v5 lite'
  assert report['devices'] == 8 and report['fits']
  state = report['params_bytes'] + report['optimizer_bytes']
  assert state < report['peak_bytes_per_device'] < 2**30
  assert report['hbm_bytes_per_device'] == 15.75 * 2**30
  assert report['bound'] in ('compute', 'HBM', 'ICI')
  assert report['roofline_step_seconds'] == max(report['roofline'].values())
  kinds = set(report['collectives'])
  assert kinds & {'all-gather', 'all-reduce', 'reduce-scatter'}


LONG = {'inputs': 2**17, 'targets': 8}


@needs_libtpu
@pytest.mark.parametrize(
  ('model', 'dataset', 'lever'),
  [
    # 64 GiB of logits, which no remat policy helps.
    (dict(vocab_size=2**20), dict(batch_size=2048), 'chunk'),
    # All pairs of positions: the compiler would abort.
    (dict(attention='dense'), dict(batch_size=4, task_feature_lengths=LONG), 'blocked'),
  ],
)
def test_out_of_memory_is_an_answer(model, dataset, lever, capsys):
  huge = arguments(
    model=tiny.config(**model), dataset=tiny_run.dataset(**dataset), mesh=MeshConfig(preset='dp')
  )
  with pytest.raises(precompile.DoesNotFitError) as error:
    precompile.precompile(**huge, topology='v5e:2x2', json=True)
  assert error.value.exit_code == 3
  out = capsys.readouterr().out
  report = last_json(out)
  assert report.keys() >= REQUIRED
  assert not report['fits']
  missing = report['peak_bytes_per_device'] - report['hbm_bytes_per_device']
  assert report['missing_bytes_per_device'] == missing > 0
  assert any(lever in one['lever'] for one in report['levers'])
  assert 'DOES NOT FIT' in out
  assert ('not compiled' in out) == (lever == 'blocked') == (report['compile_seconds'] == 0)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x2'])
def test_the_attention_kernel_compiles_on_a_cut_mesh(topology, tmp_path, capsys):
  """Rows over fsdp, heads over model; forward and backward kernels in the program."""
  model = arguments()['model'].replace(attention='pallas_tpu', dtype='bfloat16')
  file = tmp_path / 'step.hlo'
  report = precompile.precompile(**arguments(model=model), topology=topology, hlo_file=str(file))
  assert report['fits']
  assert report['attention'] == 'encoder pallas_tpu, decoder pallas_tpu, cross pallas_tpu'
  assert 'attention: encoder pallas_tpu' in capsys.readouterr().out
  # Encoder, decoder and cross-attention, each forward and backward.
  assert file.read_text().count('custom_call_target="tpu_custom_call"') >= 6


@needs_libtpu
@pytest.mark.slow
def test_a_decode_step_and_two_slices(capsys):
  precompile.precompile(
    **arguments(decoding=DecodingConfig(max_decode_length=8)), topology='v5e:2x4', step='decode'
  )
  # 32 GiB of logits; what would help is not what helps training.
  huge = dict(model=tiny.config(vocab_size=2**20), dataset=tiny_run.dataset(batch_size=2**16))
  with pytest.raises(precompile.DoesNotFitError):
    precompile.precompile(**arguments(**huge), topology='v5e:2x4', step='decode')
  assert 'too much. Use a smaller batch.' in capsys.readouterr().out
  two = arguments(mesh=MeshConfig(preset='fsdp'))
  report = precompile.precompile(**two, topology='v5e:2x2', num_slices=2)
  assert report['devices'] == 8
  assert report['mesh'] == {'data': 2, 'fsdp': 4, 'model': 1}
  assert report['roofline']['DCN'] > 0


@pytest.mark.parametrize(
  ('text', 'used', 'available'),
  [
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory '
      'in memory space hbm. Used 22.81G of 15.75G hbm. Exceeded hbm capacity '
      'by 7.06G.',
      22.81,
      15.75,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (447.18G) exceeds available HBM (30.75G).',
      448.18,
      30.75,
    ),
  ],
)
def test_both_forms_of_the_compilers_message(text, used, available):
  found = precompile.parse_out_of_memory(text, argument_bytes=2**30)
  np.testing.assert_allclose(found, (used * 2**30, available * 2**30))


def test_other_errors_are_not_about_memory():
  assert precompile.parse_out_of_memory('INVALID_ARGUMENT: no') is None
  found = precompile.parse_out_of_memory('RESOURCE_EXHAUSTED: in other words')
  assert found == (0, 0)


def test_mistakes_are_told():
  with pytest.raises(UsageError, match='example v5e:16x16'):
    precompile.precompile(**arguments(), topology='v5p-1024')
  with pytest.raises(UsageError, match="'decoder' needs 'lm' or 'prefix_lm'"):
    precompile.precompile(**arguments(model=tiny.config(architecture='decoder')))
  with pytest.raises(UsageError, match='decode, train'):
    precompile.precompile(**arguments(), step='eval')


@needs_libtpu
def test_a_topology_that_cannot_be_is_told():
  with pytest.raises(UsageError, match='v5e:3x5'):
    hardware.topology_devices('v5e:3x5')


def test_the_command_line_reads_an_experiment_of_training(capsys):
  code = main.main(
    [
      'precompile',
      '--gin_file=configs/models/t5_1_1_small.gin',
      '--gin_file=configs/runs/pretrain.gin',
      '--gin.MIXTURE_OR_TASK_NAME=never_read',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
      '--gin.TRAIN_STEPS=100',
      '--gin.BATCH_SIZE=8',
      '--gin.models.T5Config.emb_dim=64',
      '--gin.models.T5Config.num_encoder_layers=1',
      '--gin.models.T5Config.num_decoder_layers=1',
      '--gin.models.T5Config.vocab_size=128',
      '--topology=local',
      '--json',
    ]
  )
  report = last_json(capsys.readouterr().out)
  assert code == 0
  assert report['mesh'] == {'data': 8, 'fsdp': 1, 'model': 1}
