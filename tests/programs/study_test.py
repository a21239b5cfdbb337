import fcntl
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from t5x_lite import main
from t5x_lite.errors import UsageError
from t5x_lite.programs import study
from t5x_lite.programs.study import Grid, Stage

STAGES = [
  Stage(name='pretrain', bindings={'TASK': 'a', 'SEED': '{seed}', 'MODEL_DIR': '{run}'}),
  Stage(name='tune', bindings={'FROM': '{pretrain}', 'LR': 0.1, 'MODEL_DIR': '{run}'}),
  Stage(name='vote', command='eval', bindings={'MODELS': ['{tune/0}', '{tune/1}']}, optional=True),
]


def test_placeholders_are_filled_in():
  grid = Grid(STAGES, {'base': {}, 'votes': {'vote': {}}}, 'out')
  pretrain, tune = grid.cell('base', 1)
  assert pretrain.directory.startswith('out/runs/pretrain-')
  assert pretrain.argv == (
    'train',
    '--gin.TASK=a',
    '--gin.SEED=1',
    f'--gin.MODEL_DIR={pretrain.directory}',
  )
  assert f'--gin.FROM={pretrain.directory}' in tune.argv and '--gin.LR=0.1' in tune.argv
  assert tune.needs == (pretrain,)
  vote = grid.cell('votes', 0)[-1]
  tuned = [grid.run('tune', 'base', seed).directory for seed in (0, 1)]
  assert vote.argv == ('eval', f'--gin.MODELS={tuned!r}')
  # What it stands on, other seeds' too, is run and checked before it.
  before = [run.directory for run in vote.in_order()[:-1]]
  assert [one for one in before if 'tune' in one] == tuned and len(before) == 4


def test_equal_stages_are_one_run():
  rows = {'base': {}, 'fast': {'tune': {'LR': 0.5}}, 'other': {'*': {'TASK': 'b'}}}
  grid = Grid(STAGES[:2], rows, 'out')
  base, fast, other = (grid.cell(row, 0) for row in rows)
  assert base[0] == fast[0] and base[1].directory != fast[1].directory
  assert other[0].directory != base[0].directory
  # What a run stands on is part of what it is; where the study lies is not.
  assert other[1].directory != base[1].directory
  moved = Grid(STAGES[:2], rows, 'elsewhere').cell('base', 0)
  assert [os.path.basename(run.directory) for run in moved] == [
    os.path.basename(run.directory) for run in base
  ]


def test_a_row_may_leave_out_a_stage():
  rows = {'scratch': {'pretrain': None, 'tune': {'FROM': ''}}}
  [tune] = Grid(STAGES[:2], rows, 'out').cell('scratch', 0)
  assert '--gin.FROM=' in tune.argv and not tune.needs


@pytest.mark.parametrize(
  ('stages', 'rows', 'message'),
  [
    (STAGES, {'x': {'tume': {}}}, "'x' changes the stage 'tume'"),
    (STAGES[:2], {'x': {'pretrain': None}}, 'leaves out the stage pretrain, which tune names'),
    ([STAGES[1]], {'x': {}}, 'no earlier stage'),
    ([STAGES[0]] * 2, {'x': {}}, 'a name of its own'),
  ],
)
def test_mistakes_in_the_grid_are_told(stages, rows, message, tmp_path):
  with pytest.raises(UsageError, match=message):
    study.study(name='s', stages=stages, rows=rows, output_dir=str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def run(tmp_path, launcher, **overrides):
  """Runs two rows of one stage; the launcher stands for what becomes of them."""
  stage = Stage(name='one', bindings={'SEED': '{seed}'}, scores={'loss': ('eval/x/loss',)})
  settings = dict(name='s', stages=[stage], rows={'a': {}, 'b': {'one': {'X': 1}}}, seeds=[0])
  settings.update(output_dir=str(tmp_path), launcher=launcher, **overrides)
  return pathlib.Path(study.study(**settings)).read_text()


def outcomes(tmp_path):
  files = sorted(tmp_path.glob('runs/*/outcome.json'))
  return [json.loads(file.read_text())['exit_code'] for file in files]


def test_what_diverged_is_a_row_that_says_so_and_is_not_run_again(tmp_path):
  text = run(tmp_path, "sh -c 'echo loss is nan at step 7 >&2; exit 4'")
  assert '- a, seed 0: one diverged. loss is nan at step 7\n' in text
  assert '| b |  | 0 of 1 |' in text
  assert outcomes(tmp_path) == [4, 4]
  assert 'diverged' in run(tmp_path, 'true')
  assert outcomes(tmp_path) == [4, 4]
  assert (tmp_path / 's.html').read_text().count('one diverged') == 2


def test_what_was_killed_is_tried_again(tmp_path):
  assert 'a, seed 0: one killed by SIGKILL' in run(tmp_path, "sh -c 'kill -9 $$'")
  text = run(tmp_path, 'true', cell=1)
  assert 'a, seed 0: one killed by SIGKILL' in text
  # It ended well, and wrote nothing that the table asks for.
  assert 'b, seed 0: one has no metric eval/x/loss' in text


def test_what_another_process_runs_is_waited_for(tmp_path, caplog):
  """Such as the child of a study that was killed."""
  run(tmp_path, "sh -c 'kill -9 $$'")
  caplog.set_level(logging.INFO, logger='t5x_lite')
  with open(min(tmp_path.glob('runs/*/.study'))) as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.3, fcntl.flock, (held, fcntl.LOCK_UN)).start()
    run(tmp_path, 'true')
  assert caplog.text.count('waits for another process') == 1 and outcomes(tmp_path) == [0, 0]


def test_one_cell_can_be_run_alone(tmp_path):
  text = run(tmp_path, 'true', cell=1)
  assert 'a, seed 0: one not run' in text and outcomes(tmp_path) == [0]
  with pytest.raises(UsageError, match=r'study.cell is 2; there are 2 cells'):
    run(tmp_path, 'true', cell=2)


def test_what_needs_a_run_that_failed_is_not_run(tmp_path):
  stages = [Stage(name='first'), Stage(name='second', bindings={'FROM': '{first}'})]
  study.study(
    name='s', stages=stages, rows={'a': {}}, output_dir=str(tmp_path), launcher='false', seeds=[0]
  )
  text = (tmp_path / 's.md').read_text()
  assert 'first failed (1)' in text and 'second' not in text


def test_a_signal_stops_the_study_and_the_run(tmp_path):
  code = (
    'from t5x_lite.programs.study import Stage, study; '
    "study(name='s', stages=[Stage(name='one')], rows={'a': {}}, seeds=[0], "
    f"output_dir={str(tmp_path)!r}, launcher='sh -c \"trap \\'exit 6\\' TERM; sleep 60 & wait\"')"
  )
  process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
  while not list(tmp_path.glob('runs/*/log.txt')):
    assert process.poll() is None
    time.sleep(0.1)
  time.sleep(0.5)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=60)
  assert 'the same command continues it' in errors
  assert outcomes(tmp_path) == [6]
  assert 'one stopped' in (tmp_path / 's.md').read_text()


STUDY = """
from __gin__ import dynamic_registration
from t5x_lite.programs import study
study.study:
  name = 'tiny'
  output_dir = '{output}'
  stages = [@study.Stage()]
  seeds = [0]
  baseline = 'base'
  rows = {{'base': {{}}, 'changed': {{'train': {change}}}}}
study.Stage:
  name = 'train'
  gin_files = ['configs/models/t5_1_1_small.gin', 'configs/runs/pretrain.gin']
  bindings = {{
    'MIXTURE_OR_TASK_NAME': 'pronounce', 'TASK_FEATURE_LENGTHS': {{'inputs': 32, 'targets': 16}},
    'TRAIN_STEPS': 2, 'BATCH_SIZE': 4, 'MODEL_DIR': '{{run}}', 'RANDOM_SEED': '{{seed}}',
    'vocabularies.VocabularyConfig.kind': 'byte', 'vocabularies.VocabularyConfig.path': "''",
    'models.T5Config.vocab_size': 384, 'models.T5Config.emb_dim': 8, 'models.T5Config.mlp_dim': 8,
    'models.T5Config.num_heads': 1, 'models.T5Config.num_encoder_layers': 1,
    'models.T5Config.num_decoder_layers': 1, 'train.train.eval_steps': 1,
    'schedules.ScheduleConfig.warmup_steps': 2,
  }}
  scores = {{'loss': ['eval/pronounce/loss']}}
"""


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ("{'models.T5Config.emb_dmi': 8}", "has no parameter 'emb_dmi'"),
    ("{'BATCH_SIZES': 8}", 'nothing uses the gin macro BATCH_SIZES'),
    ("{'models.T5Config.dropout_rate': 2}", 'dropout_rate'),
    ("{'MIXTURE_OR_TASK_NAME': 'pronouns'}", "no task or mixture 'pronouns'"),
  ],
)
def test_an_unknown_binding_is_one_line_before_anything_runs(change, message, tmp_path, capsys):
  file = tmp_path / 'tiny.gin'
  file.write_text(STUDY.format(output=tmp_path / 'out', change=change))
  assert main.main(['study', str(file)]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and 'stage train' in error and message in error
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_real_study(tmp_path, capsys):
  """Rows that train and that diverge, each in processes of their own."""
  file = tmp_path / 'tiny.gin'
  out = tmp_path / 'out'
  change = "{'schedules.ScheduleConfig.base_learning_rate': 1e38}"
  file.write_text(STUDY.format(output=out, change=change))
  assert main.main(['study', str(file), '--dry_run']) == 0
  assert '2 cells, 2 runs' in capsys.readouterr().out and not out.exists()
  assert main.main(['study', str(file)]) == 0
  text = (out / 'tiny.md').read_text()
  [base] = [line for line in text.splitlines() if line.startswith('| ★ base')]
  assert '1 of 1' in base
  assert '- changed, seed 0: train diverged.' in text
