"""A module of tasks as T5X's users have them runs as it is."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig

ROOT = pathlib.Path(__file__).parents[2]

MODULE = """
import functools

import seqio
import tensorflow as tf

VOCABULARY = seqio.SentencePieceVocabulary('{vocabulary}', extra_ids=100)
OUTPUT_FEATURES = {{
  'inputs': seqio.Feature(vocabulary=VOCABULARY, add_eos=True, required=False),
  'targets': seqio.Feature(vocabulary=VOCABULARY, add_eos=True),
}}


@seqio.map_over_dataset
def to_inputs_and_targets(line, prefix):
  parts = tf.strings.split(line, '\t')
  return {{'inputs': tf.strings.join([prefix, parts[0]]), 'targets': parts[1]}}


def exact(targets, predictions):
  return {{'exact': 100.0 * sum(t == p for t, p in zip(targets, predictions)) / len(targets)}}


for name in ('first', 'second'):
  seqio.TaskRegistry.add(
    f'my_{{name}}_task',
    source=seqio.TextLineDataSource(
      split_to_filepattern={{'train': '{file}', 'validation': '{file}'}}, skip_header_lines=1
    ),
    preprocessors=[
      functools.partial(to_inputs_and_targets, prefix=f'{{name}}: '),
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim,
    ],
    postprocess_fn=lambda text, **unused: text.strip(),
    metric_fns=[exact],
    output_features=OUTPUT_FEATURES,
  )
seqio.MixtureRegistry.add('my_mixture', [('my_first_task', 3.0), ('my_second_task', 1)])
"""


@pytest.mark.slow
def test_train_on_a_users_module(tmp_path):
  """Two steps on a mixture, with its rates told and the loss of each task."""
  (tmp_path / 'rows.tsv').write_text('a\tb\n' + 'to be\tor not\n' * 40)
  (tmp_path / 'my_tasks.py').write_text(
    MODULE.format(
      vocabulary=vocabularies.model_path(VocabularyConfig()), file=tmp_path / 'rows.tsv'
    )
  )
  settings = {
    'MIXTURE_OR_TASK_MODULE': 'my_tasks',
    'MIXTURE_OR_TASK_NAME': 'my_mixture',
    'TASK_FEATURE_LENGTHS': "{'inputs': 16, 'targets': 8}",
    'TRAIN_STEPS': 2,
    'BATCH_SIZE': 4,
    'MODEL_DIR': tmp_path / 'run',
    'train/data.DatasetConfig.per_task_loss': True,
    'train.train.stats_period': 2,
    'train.train.eval_steps': 1,
    **{f'models.T5Config.{field}': 16 for field in ('emb_dim', 'head_dim', 'mlp_dim')},
    **{f'models.T5Config.num_{part}_layers': 1 for part in ('encoder', 'decoder')},
    'models.T5Config.num_heads': 2,
  }
  command = [sys.executable, '-m', 't5x_lite.main', 'train']
  command += [f'--gin_file=configs/{name}.gin' for name in ('models/t5_1_1_small', 'runs/pretrain')]
  command += [f'--gin.{name}={value}' for name, value in settings.items()]
  environment = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{tmp_path}'}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'my_first_task    75.000%' in done.stderr
  lines = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  metrics = {name: value for line in lines for name, value in line.items()}
  for task in ('my_first_task', 'my_second_task'):
    assert metrics[f'cross_entropy/{task}'] > 0
    assert metrics[f'eval/{task}/loss'] > 0
