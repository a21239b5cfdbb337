"""Every shipped gin file parses, and builds what it says it builds."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import pathlib

import gin
import jax
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_lite import main
from t5x_lite.data import vocabularies
from t5x_lite.data.config import batch_spec
from t5x_lite.data.rows.dataset_iterator import DatasetIterator
from t5x_lite.data.tasks import catalog, tfds_source
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.gin_front import configuration
from t5x_lite.models import t5
from t5x_lite.models.config import NAMED_CONFIGS, T5Config
from t5x_lite.programs import evaluate, infer, plan, precompile, quickstart, study, train
from t5x_lite.training import optimizers, schedules
from t5x_lite.training.optimizers import OptimizerConfig

CONFIGS = configuration.shipped_root() / 'configs'
MODELS = sorted(path.stem for path in CONFIGS.glob('models/*.gin'))
EXPERIMENTS = sorted(path.name for path in CONFIGS.glob('experiments/*.gin'))
STUDIES = sorted(path.name for path in CONFIGS.glob('studies/*table_*.gin'))
PROGRAMS = [command.function for command in main.COMMANDS.values()]

# Parameters as published: HF's checkpoints of the same name hold so many.
PARAMETERS = {
  't5_1_0_small': 60_506_624,
  't5_1_0_base': 222_903_552,
  't5_1_0_large': 737_668_096,
  't5_1_0_3b': 2_851_598_336,
  't5_1_0_11b': 11_307_321_344,
  't5_1_1_small': 76_961_152,
  't5_1_1_base': 247_577_856,
  't5_1_1_large': 783_150_080,
  't5_1_1_xl': 2_849_757_184,
  't5_1_1_xxl': 11_135_332_352,
  'mt5_small': 300_176_768,
  'mt5_base': 582_401_280,
  'mt5_large': 1_229_581_312,
  'mt5_xl': 3_742_619_648,
  'mt5_xxl': 12_921_057_280,
  'byt5_small': 299_637_760,
  'byt5_base': 581_653_248,
  'byt5_large': 1_228_183_552,
  'byt5_xl': 3_737_801_728,
  'byt5_xxl': 12_906_899_328,
}

REQUIRED = {
  'MIXTURE_OR_TASK_NAME': 'pronounce',
  'TASK_FEATURE_LENGTHS': "{'inputs': 64, 'targets': 32}",
  'TRAIN_STEPS': '1000',
  'MODEL_DIR': '/tmp/run',
}


@pytest.fixture(autouse=True)
def clean_gin():
  yield
  gin.clear_config()


def arguments(program, files, settings=()):
  """Returns what gin would call a program with."""
  configuration.configure(
    program,
    gin_files=files,
    bindings=[configuration.binding(*item) for item in dict(settings).items()],
    programs=PROGRAMS,
  )
  return gin.get_bindings(program)


def model_settings(name):
  settings = dict(REQUIRED)
  if name.startswith(('mt5', 'umt5')):
    # Theirs is not shipped; any SentencePiece model will do here.
    settings['VOCABULARY_PATH'] = vocabularies.model_path(VocabularyConfig())
  return settings


@pytest.mark.parametrize('name', MODELS)
def test_models_are_the_named_ones(name):
  files = [f'configs/models/{name}.gin', 'configs/runs/pretrain.gin']
  built = arguments(train.train, files, model_settings(name))
  assert isinstance(built['model'], T5Config)
  assert built['model'] == NAMED_CONFIGS[name]
  assert built['loss'].z_loss == 1e-4
  size = vocabularies.make_vocabulary(built['vocabulary']).vocab_size
  assert size <= built['model'].vocab_size
  _, params, _ = t5.abstract_params(built['model'])
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  if name in PARAMETERS:
    assert count == PARAMETERS[name]
  else:
    assert name.startswith(('umt5', 'ul2'))
  # The file's first line says how many there are.
  first = (CONFIGS / 'models' / f'{name}.gin').read_text().splitlines()[0]
  said = f'{count / 1e9:.1f}B' if count >= 1e9 else f'{count / 1e6:.0f}M'
  assert f' {said} parameters' in first


def test_every_published_size_has_a_file():
  same_shape = ('t5_1_1_lm_', 'flan_')
  names = {n for n in NAMED_CONFIGS if not n.startswith(same_shape)}
  assert names == set(MODELS)


def test_pretraining_is_t5s():
  files = ['configs/models/t5_1_1_small.gin', 'configs/runs/pretrain.gin']
  built = arguments(train.train, files, REQUIRED)
  optimizer = built['optimizer']
  assert isinstance(optimizer, OptimizerConfig)
  assert optimizer.name == 'adafactor'
  assert optimizer.schedule.factors == 'constant * rsqrt_decay'
  assert optimizer.schedule.warmup_steps == 10_000
  assert built['dataset'].batch_size == 128
  assert built['dataset'].pack
  assert built['model'].dropout_rate == 0.0
  assert [cfg.split for cfg in built['train_eval']] == ['validation']


def test_files_may_come_in_any_order():
  files = ['configs/models/t5_1_1_small.gin', 'configs/runs/pretrain.gin']
  one, other = (arguments(train.train, x, REQUIRED) for x in (files, files[::-1]))
  assert one.pop('summarize_config_fn') and other.pop('summarize_config_fn')  # a closure each
  assert one == other


def test_finetuning_starts_from_a_checkpoint():
  files = ['configs/models/t5_1_1_small.gin', 'configs/runs/finetune.gin']
  with pytest.raises(UsageError, match='INITIAL_CHECKPOINT_PATH'):
    arguments(train.train, files, REQUIRED)
  settings = {**REQUIRED, 'INITIAL_CHECKPOINT_PATH': '/tmp/old'}
  built = arguments(train.train, files, settings)
  assert built['checkpoint'].restore_path == '/tmp/old'
  assert not built['checkpoint'].restore_optimizer
  assert built['optimizer'].schedule.factors == 'constant'
  assert built['optimizer'].schedule.base_learning_rate == 1e-3
  assert built['model'].dropout_rate == 0.1
  [decoded] = built['infer_eval']
  assert (decoded.split, decoded.pack) == ('validation', False)


def test_lora_is_finetuning_with_a_changed_model():
  settings = {**REQUIRED, 'INITIAL_CHECKPOINT_PATH': '/tmp/old', 'LORA_RANK': '4'}
  built = arguments(train.train, ['configs/runs/finetune_lora.gin'], settings)
  model = T5Config().replace(**built['model_changes'])
  assert (model.lora_rank, model.lora_alpha, model.dropout_rate) == (4, 32.0, 0.1)
  assert built['optimizer'].name == 'adamw'
  assert built['optimizer'].schedule.shape == 'linear'


def test_eval_and_infer_need_no_model_file():
  settings = {k: v for k, v in REQUIRED.items() if k != 'TRAIN_STEPS'}
  built = arguments(evaluate.evaluate, ['configs/runs/eval.gin'], settings)
  assert built['datasets'][0].split == 'validation'
  configured = configuration.configure(
    infer.infer,
    gin_files=['configs/runs/infer.gin'],
    bindings=['TEMPERATURE = 0.5'],
    given={'model': 'a', 'input': 'b', 'output': 'c'},
  )
  assert 'temperature = %TEMPERATURE' in configured.text
  assert gin.get_bindings(infer.infer)['decoding'].temperature == 0.5


def test_required_settings_are_named_together():
  files = ['configs/models/t5_1_1_small.gin', 'configs/runs/pretrain.gin']
  with pytest.raises(UsageError) as caught:
    arguments(train.train, files)
  for name in REQUIRED:
    assert f'--gin.{name}=' in str(caught.value)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_experiments_open_with_what_they_are_for(name):
  """What it reproduces, on what, how long, and the command itself."""
  text = (CONFIGS / 'experiments' / name).read_text()
  header = text.split('from __gin__')[0]
  for word in ('Reproduces:', 'Hardware:', 'Time:', 'Expected', 'Command:'):
    assert word in header
  assert f'--gin_file=configs/experiments/{name}' in header


@pytest.mark.parametrize('name', [name for name in EXPERIMENTS if name != 'quickstart.gin'])
def test_experiments_build_what_train_takes(name):
  files = [f'configs/experiments/{name}']
  settings = model_settings(name)
  for setting in REQUIRED:
    if setting != 'MODEL_DIR':
      del settings[setting]  # an experiment says these itself
  built = arguments(train.train, files, settings)
  _, params, axes = t5.abstract_params(built['model'])
  tx = optimizers.make_optimizer(built['optimizer'], axes, params)
  assert jax.tree.leaves(jax.eval_shape(tx.init, params))
  schedules.make_schedule(built['optimizer'].schedule, built['total_steps'])
  assert built['model_dir'] == '/tmp/run'


def test_experiments_can_be_precompiled_and_planned_as_they_are():
  files = ['configs/experiments/t5_1_1_xxl_pretrain.gin']
  for program in (precompile.precompile, plan.plan):
    configuration.configure(
      program,
      gin_files=files,
      given={'topology': 'v5p:8x8x8'},
      programs=PROGRAMS,
      inherits='t5x_lite.programs.train.train',
    )
    built = gin.get_bindings(program)
    assert built['model'].emb_dim == 4096
    assert built['mesh'].preset == 'fsdp_tp'
    assert built['dataset'].batch_size == 2048


def test_the_quickstart_trains_two_phases_of_one_model():
  built = arguments(quickstart.quickstart, ['configs/experiments/quickstart.gin'])
  assert built['output_dir'] == 'runs/quickstart'
  phases = {}
  for name in ('pretrain', 'finetune'):
    with gin.config_scope(name):
      phases[name] = gin.get_bindings(train.train)
  assert phases['pretrain']['model'] == phases['finetune']['model']
  assert phases['pretrain']['vocabulary'] == phases['finetune']['vocabulary']
  assert 'span_corruption' in phases['pretrain']['dataset'].mixture_or_task_name
  assert [cfg.split for cfg in built['test']] == ['test']
  for phase in phases.values():
    assert dataclasses.is_dataclass(phase['dataset'])
    assert phase['dataset'].split == 'train'


@pytest.mark.parametrize('name', STUDIES)
def test_studies_open_with_what_they_are_for(name):
  header = (CONFIGS / 'studies' / name).read_text().split('include')[0]
  for word in ('Reproduces: ', 'Hardware: ', 'Time: ', 'Expected: ', 'Command:'):
    assert word in header
  assert f't5x-lite study configs/studies/{name}' in header


@pytest.mark.parametrize('name', STUDIES)
def test_every_command_of_a_study_would_be_taken(name, capsys):
  if name.startswith('table') and not importlib.util.find_spec('t5x_lite.data.tasks.benchmarks'):
    pytest.skip('C4 and the benchmarks have no names yet')
  file = f'configs/studies/{name}'
  assert main.main(['study', file, '--dry_run']) == 0, capsys.readouterr().err
  printed = capsys.readouterr().out.splitlines()
  rows = gin_rows(name)
  assert f'{3 * rows if name.startswith("small") else rows} cells' in printed[-1]
  assert len(set(printed)) == len(printed)


@pytest.mark.slow
def test_what_trains_on_pods_gets_its_first_batch(monkeypatch):
  """Of TFDS's mock data, every single task once; mixtures of them take minutes."""
  catalog.import_modules()
  file = 'configs/experiments/t5_1_1_xxl_pretrain.gin'
  commands = [['train', f'--gin_file={file}', '--gin.MODEL_DIR=x']]
  for name in ('table_2', 'table_4', 'table_5', 'table_6'):  # of the others most are mixtures
    built = arguments(study.study, [f'configs/studies/{name}.gin'])
    gin.clear_config()
    grid = study.Grid(built['stages'], built['rows'], built['output_dir'])
    for row in built['rows']:
      runs = itertools.chain(*(run.in_order() for run in grid.cell(row, built['seeds'][0])))
      commands += [run.argv for run in runs if run.stage.command == 'train']

  builders = functools.cache(tfds.builder)
  loader = tfds_source._Loader
  monkeypatch.setattr(loader, '_get_builder', lambda self, *_: builders(self.name.split(':')[0]))
  monkeypatch.setattr(loader, 'size', lambda self, split: 300)
  source = tfds_source.PreparedSource
  monkeypatch.setattr(source, 'list_shards', lambda self, split: ['0'])
  read = source.get_dataset

  def get_dataset(self, split=None, **more):
    if 'wsc' not in self.tfds_dataset.name:
      return read(self, split, **more)
    # Random numbers are no places in a text.
    row = {'text': 'Tom said he ran', 'span1_text': 'Tom', 'span2_text': 'he', 'span2_index': 2}
    return tf.data.Dataset.from_tensors({**row, 'label': 1}).repeat(30)

  monkeypatch.setattr(source, 'get_dataset', get_dataset)
  seen = set()
  with tfds.testing.mock_data(300):
    for argv in commands:
      built = main._configure(main._parse(argv)).arguments()
      gin.clear_config()
      vocabulary = built.get('vocabulary') or VocabularyConfig()
      # A buffer to shuffle in would be filled from so few rows again and again.
      config = dataclasses.replace(built['dataset'], batch_size=2, seed=0, shuffle=False)
      name = catalog.resolve(config.mixture_or_task_name, vocabulary)
      config = dataclasses.replace(config, mixture_or_task_name=name)
      key = name, repr(config.task_feature_lengths), config.feature_converter
      if hasattr(catalog.task_provider(config), 'tasks') or key in seen:
        continue
      seen.add(key)
      with contextlib.closing(DatasetIterator(config)) as iterator:
        batch = next(iterator)
      assert {k: (x.shape, x.dtype) for k, x in batch.items()} == batch_spec(config), argv
  assert len(seen) > 10


def gin_rows(name):
  """Returns how many rows of the paper's table a study has."""
  built = arguments(study.study, [f'configs/studies/{name}'])
  assert set(built['paper']) <= set(built['rows'])
  return len(built['rows'])


def test_configs_bind_only_programs_and_their_dataclasses():
  """No config reaches into layers (house rule)."""
  for path in CONFIGS.rglob('*.gin'):
    for line in path.read_text().splitlines():
      words = line.split()
      if words[:1] == ['from'] and words[1] != '__gin__':
        assert words[1].startswith('t5x_lite.')
        assert words[3] != 'layers'
        module = pathlib.Path(*words[1].split('.'), words[3] + '.py')
        assert (pathlib.Path(train.__file__).parents[2] / module).is_file()
