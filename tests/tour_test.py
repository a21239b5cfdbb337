"""Runs every command of docs/tour.md, in its order, in an empty directory.

All in one process of its own, which is started once: as a module, this is that
process.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from t5x_lite import main
from tests import xla_flags

pytest.importorskip('torch')
pytest.importorskip('transformers')

ROOT = pathlib.Path(__file__).parents[1]
TOUR = ROOT / 'docs' / 'tour.md'


def blocks():
  return re.findall(r'^```(\w+)\n(.*?)^```', TOUR.read_text(), re.M | re.S)


def run(kind, code):
  """Runs one block and returns what it printed."""
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    if kind == 'python':
      exec(code, {'__name__': '__main__'})
      return printed.getvalue()
    for line in code.replace('\\\n', ' ').splitlines():
      words = shlex.split(line)
      if words[:1] == ['t5x-lite']:
        assert main.main(words[1:]) == 0, line
      else:
        subprocess.run(['bash', '-euc', line], check=True)
  return printed.getvalue()


def test_every_block_is_of_a_kind_that_runs():
  assert {kind for kind, _ in blocks()} == {'bash', 'python'}


@pytest.mark.slow
def test_every_command_runs(tmp_path):
  environment = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    # The tour is for one device.
    'XLA_FLAGS': xla_flags.QUICK,
  }
  result = subprocess.run(
    [sys.executable, '-m', 'tests.tour_test', 'printed.json'],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
  printed = json.loads((tmp_path / 'printed.json').read_text())
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


if __name__ == '__main__':
  sys.modules['triton'] = None  # tests/conftest.py says why
  pathlib.Path(sys.argv[1]).write_text(json.dumps([run(kind, code) for kind, code in blocks()]))
