import functools
import json
import os
import signal

import pytest

from t5x_lite.errors import UsageError
from t5x_lite.programs import evaluate, quickstart
from t5x_lite.programs.infer import infer
from t5x_lite.programs.train import train
from t5x_lite.runs import metric_writers
from t5x_lite.runs.checkpoints import CheckpointConfig
from tests import tiny_run


class Phase:
  """Stands for `train`: remembers its arguments and logs two losses."""

  def __init__(self, calls, stop=False):
    self.calls, self.stop = calls, stop

  def __call__(self, **arguments):
    self.calls.append(arguments)
    os.makedirs(arguments['model_dir'], exist_ok=True)
    with metric_writers.MetricWriter(arguments['model_dir'], first_step=0) as writer:
      for step in (1, 2):
        writer.write(step, {'loss': 3.0 / step, 'eval/pronounce/loss': 2.0})
    if self.stop:
      os.kill(os.getpid(), signal.SIGTERM)
    return object()


@pytest.fixture
def fake_evaluate(monkeypatch):
  def run(*, output, **arguments):
    os.makedirs(output)
    line = {'prediction': 'AH0', 'target': 'EY1'}
    with open(os.path.join(output, 'pronounce.jsonl'), 'w') as file:
      for i in range(20):  # each twice; shown are different ones
        file.write(json.dumps({'input': f'pronounce: a{i // 2}', **line}) + '\n')
    return {'pronounce': {'phoneme_error_rate': 12.5, 'examples': 10.0}}

  monkeypatch.setattr(evaluate, 'evaluate', run)


def test_order_of_things(tmp_path, fake_evaluate, capsys):
  calls = []
  results = quickstart.quickstart(
    pretrain=Phase(calls),
    finetune=Phase(calls),
    test=[tiny_run.dataset(split='test')],
    output_dir=str(tmp_path),
    finetune_checkpoint=CheckpointConfig(period=7),
  )
  first, second = calls
  assert first == {'model_dir': str(tmp_path / 'pretrain')}
  assert second['model_dir'] == str(tmp_path)
  assert second['checkpoint'] == CheckpointConfig(period=7, restore_path=str(tmp_path / 'pretrain'))
  saved = json.loads((tmp_path / 'results.json').read_text())
  assert saved == results
  assert saved['test']['pronounce']['phoneme_error_rate'] == 12.5
  assert {'pretrain', 'finetune', 'test', 'total'} <= set(saved['seconds'])
  page = (tmp_path / 'report.html').read_text()
  assert 'aria-label="loss"' in page
  printed = capsys.readouterr().out
  assert [part in printed for part in (': a0\n', ': a4\n', ': a8\n')] == [True] * 3
  assert printed.count('reference   EY1') == 3
  assert f't5x-lite infer --model {tmp_path}' in printed


def test_nothing_need_be_shown(tmp_path, fake_evaluate, capsys):
  arguments = dict(test=[], output_dir=str(tmp_path))
  calls = []
  phases = dict(pretrain=Phase(calls), finetune=Phase(calls))
  quickstart.quickstart(**phases, **arguments, num_shown=0)
  assert (tmp_path / 'results.json').exists()
  assert 'reference' not in capsys.readouterr().out
  calls.clear()
  with pytest.raises(UsageError, match='num_shown is -1'):
    quickstart.quickstart(**phases, **arguments, num_shown=-1)
  assert not calls  # nothing was trained before that was said


def test_a_stopped_phase_stops_the_rest(tmp_path, fake_evaluate):
  calls = []
  results = quickstart.quickstart(
    pretrain=Phase(calls, stop=True), finetune=Phase(calls), test=[], output_dir=str(tmp_path)
  )
  assert results is None
  assert len(calls) == 1
  assert not (tmp_path / 'results.json').exists()


@pytest.mark.slow
def test_all_phases_really(tmp_path):
  """Tiny, but nothing is faked; the result is ready for inference."""

  def phase(name):
    arguments = tiny_run.arguments('', dataset=tiny_run.dataset(name))
    del arguments['model_dir'], arguments['checkpoint']
    return functools.partial(train, **arguments)

  results = quickstart.quickstart(
    pretrain=phase('shakespeare_span_corruption'),
    finetune=phase('quickstart_mixture'),
    test=[tiny_run.dataset('quickstart_mixture', split='test')],
    output_dir=str(tmp_path / 'run'),
    num_examples=3,
  )
  assert results is not None
  assert set(results['test']) == {'language_id', 'pronounce', 'syllables'}
  (tmp_path / 'in.txt').write_text('pronounce: hello\n')
  output = tmp_path / 'out.jsonl'
  infer(model=str(tmp_path / 'run'), input=str(tmp_path / 'in.txt'), output=str(output))
  assert json.loads(output.read_text())['input'] == 'pronounce: hello'


def test_the_commands_at_the_end_can_be_typed(tmp_path, monkeypatch):
  """After `make quickstart` the command is in .venv/bin, and not on PATH."""
  program = tmp_path / '.venv' / 'bin' / 't5x-lite'
  program.parent.mkdir(parents=True)
  program.write_text('#!/bin/sh\n')
  program.chmod(0o755)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('sys.argv', [str(program)])
  monkeypatch.setenv('PATH', '/nowhere')
  assert quickstart.typed() == '.venv/bin/t5x-lite'
  assert ".venv/bin/t5x-lite finetune --model 'my runs'" in quickstart.next_steps('my runs')
  monkeypatch.setenv('PATH', str(program.parent))
  assert quickstart.typed() == 't5x-lite'
  monkeypatch.setattr('sys.argv', ['pytest'])
  assert quickstart.typed() == 't5x-lite'
