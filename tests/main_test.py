import dataclasses
import errno
import importlib
import os
import shutil
import subprocess
import sys
import textwrap

import gin
import pytest
from etils import epath

from t5x_lite import main as main_lib
from t5x_lite.main import Command, main
from t5x_lite.parallel import distributed
from t5x_lite.runs import files

TOY = """
from t5x_lite.errors import UsageError, refusing

def play(*, text: str, times: int = 1, verbose: bool = False,
        share: float | None = None, dry_run: bool = False,
        summarize_config_fn=None):
  '''Prints.

  Args:
    text: what to print.
    times: how often; 100% of
      the time.
    verbose: say more.
    share: unused.
    dry_run: write nothing.

  Raises:
    UsageError: at times: never.
  '''
  if text == 'usage':
    raise UsageError('text is usage\\nsecond line')
  if text == 'interrupt':
    raise KeyboardInterrupt
  if text == 'bug':
    raise RuntimeError('a bug')
  if text == 'lost':
    raise Lost('lost a process\\nwith details')
  if text == 'oom':
    raise RuntimeError('RESOURCE_EXHAUSTED: ran out; allocating 3.5GiB (x)')
  if text == 'output':
    with refusing('cannot write out', OSError):
      raise OSError(28, 'No space left on device')
  if text == 'disk':
    raise ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device [y]')
  if not dry_run:
    summarize_config_fn('out')
  print(text * times, verbose)

class Lost(RuntimeError):
  exit_code = 5
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """`t5x-lite toy TEXT`, in an empty working directory."""
  (tmp_path / 'toy_program.py').write_text(TOY)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'toy_program', raising=False)
  program = Command('toy_program.play', 'a toy', positional=('text',))
  monkeypatch.setitem(main_lib.COMMANDS, 'toy', program)
  empty = tmp_path / 'cwd'
  empty.mkdir()
  monkeypatch.chdir(empty)
  with gin.config.interactive_mode():
    yield empty
  gin.clear_config()
  sys.modules.pop('toy_program', None)


def test_flags_become_arguments(toy, capfd):
  assert main(['toy', 'ab', '--times=2', '--verbose']) == 0
  assert capfd.readouterr().out == 'abab True\n'


def test_a_flag_may_take_what_the_shell_expands(toy, monkeypatch):
  vocab = main_lib.COMMANDS['vocab']
  monkeypatch.setitem(main_lib.COMMANDS, 'vocab', dataclasses.replace(vocab, function='given.get'))
  (toy.parent / 'given.py').write_text(
    'from collections.abc import Sequence\n'
    'def get(*, input: str | Sequence[str], output: str):\n'
    '  open(output, "w").write(" ".join(input))\n'
  )
  flags = ['--input', 'a.txt', 'b.txt', '--output', 'seen']
  assert main(['vocab', *flags]) == 0
  assert (toy / 'seen').read_text() == 'a.txt b.txt'
  assert main(['vocab', *flags, '--input', 'c.txt']) == 0
  assert (toy / 'seen').read_text() == 'a.txt b.txt c.txt'


def test_gin_bindings_become_arguments_and_flags_win(toy, capfd):
  assert main(['toy', 'ab', '--gin.toy_program.play.times=3']) == 0
  assert main(['toy', 'ab', '--gin_bindings=play.times = 2']) == 0
  assert main(['toy', 'ab', '--gin.play.times=3', '--times=1']) == 0
  assert capfd.readouterr().out == 'ababab False\nabab False\nab False\n'


def test_the_resolved_config_is_written_by_the_program(toy):
  assert main(['toy', 'ab', '--gin.play.times=3']) == 0
  text = (toy / 'out' / 'config.gin').read_text()
  assert 'play.times = 3' in text
  assert not [*(toy / 'out').glob('config.gin.tmp*')]


def test_a_dry_run_writes_nothing(toy):
  assert main(['toy', 'ab', '--dry_run']) == 0
  assert list(toy.iterdir()) == []


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], 'the following arguments are required: COMMAND'),
    (['trian'], "invalid choice: 'trian'"),
    (['toy'], 'required: TEXT'),
    (['toy', 'a', '--tims=2'], 'unrecognized arguments: --tims=2; did you mean --times?'),
    (['toy', 'a', '--times=x'], "invalid int value: 'x'"),
    (['toy', 'a', '--gin.play.times'], 'write --gin.play.times=value'),
    (['toy', 'a', '--gin.play.tims=2'], 'did you mean times'),
    (['toy', 'a', '--gin.play.times=two'], 'must be of type int'),
    (['toy', 'a', '--gin_file=no.gin'], "no gin file 'no.gin'"),
    (['toy', 'usage'], 'text is usage'),
    (['toy', 'https://x.org/a'], 'nothing is read from the network'),
    (['toy', 'a', '--process_index=1'], 'give all of coordinator_address'),
    (['train'], 'required settings are missing'),
    (['train', '--gin_file=configs/runs/pretrain.gin'], 'MODEL_DIR=...'),
    (['infer', '--input=x'], 'add --model=... --output=...'),
    (['infer', '--forbidden_tokens', '3,x'], "invalid ids value: '3,x'"),
    (['infer', '--temperature=nan'], '--temperature is nan; give a finite number'),
    (['infer', '--prefix=a\udcff'], r"--prefix is 'a\udcff', which is not UTF-8"),
    (['grow_vocab', 'a', 'b', '--tokens', 'c', '\udcff'], r"--tokens is ['c', '\udcff'], which"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(toy, capfd, argv, message):
  assert main(argv) == 2
  out, err = capfd.readouterr()
  assert out == ''
  assert message in err
  assert err.startswith('t5x-lite: ') and err.count('\n') == 1
  assert list(toy.iterdir()) == []


def test_a_device_out_of_memory_is_one_line(toy, capfd):
  assert main(['toy', 'oom']) == 3
  [line] = capfd.readouterr().err.splitlines()
  assert 'out of memory (3.5GiB more' in line and 'num_microbatches' in line


def test_a_full_disk_is_no_full_device(toy, capfd):
  assert main(['toy', 'disk']) == 7
  assert capfd.readouterr().err == 't5x-lite: cannot write: No space left on device\n'
  assert main(['toy', 'output']) == 7
  assert capfd.readouterr().err == 't5x-lite: cannot write out: No space left on device\n'


def test_other_exits(toy, capfd):
  assert main(['toy', 'interrupt']) == 130
  assert main(['toy', 'lost']) == 5
  assert capfd.readouterr().err == ('t5x-lite: interrupted\nt5x-lite: lost a process\n')
  with pytest.raises(RuntimeError, match='a bug'):
    main(['toy', 'bug'])


@pytest.mark.parametrize('program', main_lib.COMMANDS)
def test_every_program_has_help_and_only_flags_it_understands(program, capsys):
  with pytest.raises(SystemExit) as caught:
    main([program, '--help'])
  assert caught.value.code == 0
  assert '--gin_file' in capsys.readouterr().out


def test_help_is_the_functions_own(toy, capsys):
  with pytest.raises(SystemExit):
    main(['toy', '--help'])
  printed = ' '.join(capsys.readouterr().out.split())
  assert '--times TIMES how often; 100% of the time. (default: 1)' in printed
  assert '--dry_run, --no-dry_run write nothing.' in printed
  assert '--share SHARE unused.' in printed
  assert 'never' not in printed


def test_a_switch_can_be_turned_off(toy, capfd):
  assert main(['toy', 'ab', '--gin.play.verbose=True']) == 0
  assert main(['toy', 'ab', '--gin.play.verbose=True', '--no-verbose']) == 0
  assert capfd.readouterr().out == 'ab True\nab False\n'


def test_stopped_early_has_a_code_of_its_own(toy, monkeypatch):
  """A scheduler can tell it from a run that is done."""
  monkeypatch.setattr(distributed, 'stopped_by', lambda: 'SIGTERM')
  assert main(['toy', 'ab', '--dry_run']) == 6


def test_version(capsys):
  with pytest.raises(SystemExit) as caught:
    main(['--version'])
  assert caught.value.code == 0
  assert capsys.readouterr().out.strip() == main_lib.__version__


def test_imports_are_as_late_as_they_can_be():
  code = textwrap.dedent("""
    import sys, t5x_lite.main
    for name in ('', *t5x_lite.main.COMMANDS):
      try:
        t5x_lite.main.main([name, '--help'] if name else ['--help'])
      except SystemExit:
        pass
    print(sorted({'jax', 'tensorflow', 'gin', 'numpy'} & set(sys.modules)))
  """)
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert result.stdout.endswith('[]\n'), result.stderr


def test_as_a_process_with_clean_stderr(tmp_path):
  """What a person sees."""
  flags = ['--model=no_such_run', '--input=-', '--output=-']
  result = subprocess.run(
    [sys.executable, '-m', 't5x_lite.main', 'infer', *flags],
    capture_output=True,
    text=True,
    input='hello\n',
    cwd=tmp_path,
  )
  assert result.returncode == 2
  assert result.stdout == ''
  assert 'no_such_run' in result.stderr
  assert result.stderr.count('\n') == 1
  assert list(tmp_path.iterdir()) == []


def test_version_matches_the_metadata():
  import importlib.metadata

  import t5x_lite

  try:
    installed = importlib.metadata.version('t5x_lite')
  except importlib.metadata.PackageNotFoundError:
    pytest.skip('t5x_lite is not installed here')
  assert installed == t5x_lite.__version__


def test_modules_in_the_current_directory_are_found(tmp_path, monkeypatch):
  """As a console script starts: its own folder is searched, not this one."""
  (tmp_path / 'tasks_of_my_own.py').write_text('REGISTERED = True\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [p for p in sys.path if p not in ('', '.')])
  with pytest.raises(ModuleNotFoundError):
    importlib.import_module('tasks_of_my_own')
  missing = ['infer', '--model', 'missing', '--input', 'x', '--output', 'y']
  assert main(missing) == 2
  assert importlib.import_module('tasks_of_my_own').REGISTERED


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_completion_knows_every_flag_of_every_command(capfd, shell):
  assert main(['completion', shell]) == 0
  script = capfd.readouterr().out
  for name, command in main_lib.COMMANDS.items():
    assert name in script
    for parameter in command.parameters():
      if parameter.name not in command.positional:
        assert f'--{parameter.name}' in script, (name, parameter.name)
  assert main(['completion', 'fish']) == 2


def test_completion_in_a_real_bash(capfd, tmp_path):
  bash = shutil.which('bash')
  if bash is None:
    pytest.skip('no bash here')
  assert main(['completion', 'bash']) == 0
  (tmp_path / 'complete.sh').write_text(capfd.readouterr().out)
  (tmp_path / 'lines.txt').write_text('')

  def complete(*words):
    quoted = ' '.join(f"'{word}'" for word in words)
    code = (
      f'source ./complete.sh; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; '
      '_shtab_t5x_lite; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = subprocess.run([bash, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    return set(found.stdout.split())

  assert set(main_lib.COMMANDS) <= complete('t5x-lite', '')
  assert complete('t5x-lite', 'infer', '--in') == {'--input', '--input_format'}
  assert complete('t5x-lite', 'infer', '--input', 'li') == {'lines.txt'}


@pytest.mark.parametrize(
  ('code', 'exit_code'),
  [('EROFS', 2), ('EACCES', 2), ('EISDIR', 2), ('ENOENT', 2), ('ENOSPC', 7), ('EIO', 7)],
)
def test_a_file_system_that_refuses_is_no_bug(toy, capfd, monkeypatch, code, exit_code):
  """Told in one line, also through gin, which raises a copy of the error."""
  error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)), 'some/file')

  def refuse(self, text):
    raise error

  monkeypatch.setattr(epath.Path, 'write_text', refuse)
  monkeypatch.setattr(files.time, 'sleep', lambda _: None)
  assert main(['toy', 'ab', '--gin.play.times=3']) == exit_code
  [line] = capfd.readouterr().err.splitlines()
  assert line == f't5x-lite: {error.strerror}: some/file'
