"""Runs every command of docs/tour.md, in its order, in an empty directory."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

ROOT = pathlib.Path(__file__).parents[1]
TOUR = ROOT / 'docs' / 'tour.md'


def blocks():
  return re.findall(r'^```(\w+)\n(.*?)^```', TOUR.read_text(), re.M | re.S)


def run(kind, code, folder):
  """Runs one block and returns what it printed."""
  command = [sys.executable, '-c', code]
  if kind == 'bash':
    # The console script, whether or not the package is installed.
    program = f't5x-lite() {{ {sys.executable} -m t5x_lite.main "$@"; }}'
    command = ['bash', '-euc', f'{program}\n{code}']
  environment = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    # The tour is for one device.
    'XLA_FLAGS': '',
  }
  result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, f'{code}\n{result.stdout}\n{result.stderr}'
  return result.stdout


def test_every_block_is_of_a_kind_that_runs():
  assert {kind for kind, _ in blocks()} == {'bash', 'python'}


@pytest.mark.slow
def test_every_command_runs(tmp_path):
  printed = [run(kind, code, tmp_path) for kind, code in blocks()]
  by_code = dict(zip((code for _, code in blocks()), printed, strict=True))

  def output(part):
    (found,) = (out for code, out in by_code.items() if part in code)
    return found

  assert output("load('flan')").startswith('2 32100')
  assert 'shared.weight' in output('--dry_run')
  # transformers and we generate the same text from what was exported.
  theirs = re.sub('<pad>|</s>', '', output('AutoModelForSeq2SeqLM')).strip()
  ours = output("load('exported')").strip()
  assert eval(ours)[0].strip() == eval(theirs)[0].strip()
  assert '32100 ids become 32103, 32128 rows 32128' in output('grow_vocab')
  for name in ('runs/tuned/checkpoints/10', 'exported_t5x/checkpoint_10'):
    assert (tmp_path / name).is_dir()
