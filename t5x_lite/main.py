"""The command line: `t5x-lite COMMAND --flag=... --gin.NAME=value ...`.

A command runs a keyword-only function of programs/. Its arguments come from gin files, `--gin.`
bindings and flags, which win; flags, their help and defaults are read from its source. Its module
is imported only when it runs: `--help` is instant, and inference does without TensorFlow.

Exit codes: 0 done; 2 a mistake of the user, told in one line on stderr; 3 a program that does not
fit into the device; 4 training diverged; 5 another process of the run was lost; 6 training stopped
early for SIGTERM or Ctrl-C and saved, the same command continues it; 7 a checkpoint, or another
file, could not be written, those before it are whole; 130 interrupted; 1 anything else, with a
traceback.
"""

import argparse
import dataclasses
import errno
import importlib
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from t5x_lite import __version__
from t5x_lite.errors import UsageError, refusing, suggest
from t5x_lite.parallel import host_memory
from t5x_lite.programs import command_flags

PROGRAM_NAME = 't5x-lite'
COMPLETION = 'completion'
EXIT_STOPPED = 6
DECODING = 't5x_lite.decoding.config.DecodingConfig'
# Flags of text; others may name files, whose names may be any bytes.
_TEXTS = 'prefix decoder_prefix template field tokens user_defined_symbols'.split()
# No bugs either: places that cannot be written to, and disks that are full or fail.
_CODES = {
  2: 'EACCES EPERM EROFS EEXIST ENOTDIR EISDIR ENOENT ENAMETOOLONG',
  7: 'ENOSPC EDQUOT EIO ESTALE ETIMEDOUT',
}
_FILE_ERRORS = {getattr(errno, name): code for code in _CODES for name in _CODES[code].split()}


@dataclasses.dataclass(frozen=True)
class Command:
  """What `t5x-lite NAME` runs."""

  # Dotted name of a keyword-only function; its parameters that can be written are flags.
  function: str
  help: str  # for the list of commands
  positional: tuple[str, ...] = ()  # parameters that are given without their name
  inherits: str = ''  # dotted name of the function whose experiment files this one reads
  computes: bool = False  # runs steps: temporaries and compiled programs are worth keeping
  decodes: bool = False  # has a parameter `decoding`, whose simple fields are flags too
  # Given gin files without their flag, checks and runs other commands, and is no process of theirs.
  runs_commands: bool = False

  def parameters(self) -> list[command_flags.Parameter]:
    """Returns what can be written on the command line."""
    found = [*command_flags.read_parameters(self.function), *self.fields()]
    return [parameter for parameter in found if parameter.type is not None]

  def fields(self) -> list[command_flags.Parameter]:
    """Returns the fields of `decoding`, if there is one."""
    return command_flags.read_parameters(DECODING) if self.decodes else []

  def bindings(self, given: dict[str, Any]) -> list[str]:
    """Takes the fields' flags out of `given` and returns them as gin statements."""
    names = [field.name for field in self.fields() if field.name in given]
    if not names:
      return []
    module, program = (name.rpartition('.')[0] for name in (DECODING, self.function))
    return [
      'from __gin__ import dynamic_registration',
      f'import {module}',
      f'import {program}',
      f'{self.function}.decoding = @{DECODING}()',
      *(f'{DECODING}.{name} = {given.pop(name)!r}' for name in names),
    ]


COMMANDS: dict[str, Command] = {}
# Commands whose program has another name.
_PROGRAMS = {'eval': 'evaluate', 'vocab': 'train_vocabulary', 'grow_vocab': 'grow_vocabulary'}


def _add(name: str, help: str, *positional: str, **more: Any) -> None:
  """Adds what runs the function of a module of programs/ that has the module's name."""
  program = _PROGRAMS.get(name, name)
  COMMANDS[name] = Command(f't5x_lite.programs.{program}.{program}', help, positional, **more)


_LIKE_TRAIN = 't5x_lite.programs.train.train'
_add('train', 'train a model, or continue its run', computes=True)
_add('finetune', 'fine-tune a checkpoint on your own file, and export it', computes=True)
_add('eval', 'evaluate a run on tasks by their own metrics', computes=True, decodes=True)
_add('infer', 'predict for every line of a file', computes=True, decodes=True)
_add('serve', 'serve a model over HTTP, to OpenAI clients too', 'model', computes=True)
_add('quickstart', 'pretrain, fine-tune, evaluate and predict on the embedded text', computes=True)
_add('report', 'write one HTML page about a run, or about several side by side', 'runs')
_add('preview', 'look at what a task or mixture feeds the model', 'task')
_add('vocab', 'train a SentencePiece vocabulary on your own text')
_help = 'convert checkpoints between t5x_lite, Hugging Face and T5X'
_add('convert', _help, 'source', 'destination')
_help = 'write a model as StableHLO or a SavedModel, for programs without t5x_lite'
_add('export', _help, 'model', 'destination')
_add('average', 'average the last checkpoints of a run, or several runs', 'sources', 'destination')
_add('grow_vocab', 'add tokens or sentinels to a model and its vocabulary', 'source', 'destination')
_add('study', 'run a table of experiments, and report it beside the paper', runs_commands=True)
_help = 'compile a step for TPUs that you do not have; does it fit, what bounds it'
_add('precompile', _help, inherits=_LIKE_TRAIN)
_add('plan', 'search mesh, remat policy and microbatches for a topology', inherits=_LIKE_TRAIN)


class _Parser(argparse.ArgumentParser):
  """Reports mistakes like every other mistake: one line, exit code 2."""

  def error(self, message: str) -> NoReturn:
    raise UsageError(f'{message} (see {self.prog} --help)')

  # That of a subparser is called too, and has the flags.
  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    found, unknown = super().parse_known_args(args, namespace)
    if unknown:
      hint = suggest(unknown[0].split('=')[0], self._option_string_actions)
      self.error(f'unrecognized arguments: {" ".join(unknown)}{hint}')
    return found, unknown


def _make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
  """Returns the parser; only the command in argv gets its flags."""
  text = 'T5 in JAX. `t5x-lite COMMAND --help` lists its flags.'
  parser = _Parser(prog=PROGRAM_NAME, description=text, allow_abbrev=False)
  parser.add_argument('--version', action='version', version=__version__)
  subparsers = parser.add_subparsers(
    dest='command', metavar='COMMAND', required=True, parser_class=_Parser
  )

  def add(name: str, text: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)

  for name, command in COMMANDS.items():
    sub = add(name, command.help)
    if name in argv:
      for parameter in command.parameters():
        _add_flag(sub, parameter, positional=parameter.name in command.positional)
      if command.runs_commands:
        sub.add_argument('gin_files', metavar='FILE', nargs='*', default=[], help='gin files')
      _add_common_flags(sub)
      sub.epilog = _epilog(command)
  sub = add(COMPLETION, 'print a script that completes commands, flags and files in a shell')
  sub.add_argument('shell', choices=('bash', 'zsh'), metavar='SHELL', help='bash or zsh')
  return parser


def _print_completion(shell: str) -> int:
  """Prints the script; what an argument takes may be the name of a file."""
  import shtab

  parser = _make_parser(list(COMMANDS))
  for sub in parser._subparsers._group_actions[0].choices.values():  # type: ignore
    for action in sub._actions:
      if action.type in (None, str) and action.nargs != 0 and not action.choices:
        action.complete = shtab.FILE
  print(shtab.complete(parser, shell))
  return 0


def _epilog(command: Command) -> str:
  """Says what has no flag, since it is an object."""
  found = command_flags.read_parameters(command.function)
  own = ('summarize_config_fn', 'check')
  rest = [p.name for p in found if p.type is None and p.name not in own]
  return f'Set by gin alone: {", ".join(rest)}. See configs/runs/ for examples.' if rest else ''


def _add_flag(parser: Any, parameter: command_flags.Parameter, *, positional: bool) -> None:
  name, text = parameter.name, parameter.help
  if parameter.default:
    text = f'{text} (default: {parameter.default})'
  text = text.replace('%', '%%')
  if parameter.type is bool and not positional:
    # None stands for a flag that was not given: gin or the default decides.
    parser.add_argument(f'--{name}', action=argparse.BooleanOptionalAction, default=None, help=text)
    return
  options: dict[str, Any] = {} if positional else {'type': parameter.type}
  flag = name if positional else f'--{name}'
  options |= {'nargs': '+', 'action': 'extend'} if parameter.many else {}  # given twice, of both
  parser.add_argument(flag, metavar=name.upper(), help=text, **options)


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
  gin = parser.add_argument_group('configuration')
  text = (
    'gin file; may be given several times, later ones win; configs/... that came with the package '
    'is found from anywhere'
  )
  gin.add_argument('--gin_file', action='append', default=[], metavar='FILE', help=text)
  text = (
    "a gin statement; --gin.NAME=value is short for 'NAME = value', where a value that is no "
    'number, @reference or %%macro is a string'
  )
  gin.add_argument('--gin_bindings', action='append', default=[], metavar='STATEMENT', help=text)
  text = 'comma-separated directories in which gin files are looked for'
  gin.add_argument('--gin_search_paths', default='', metavar='DIRS', help=text)
  data = parser.add_argument_group('data')
  text = 'where TFDS has prepared datasets; TFDS_DATA_DIR'
  data.add_argument('--tfds_data_dir', metavar='DIR', help=text)
  text = 'comma-separated directories of what seqio_cache_tasks wrote'
  data.add_argument('--seqio_additional_cache_dirs', metavar='DIRS', help=text)
  title = 'many processes (found by themselves on SLURM, Kubernetes, Open MPI, TPU)'
  processes = parser.add_argument_group(title)
  processes.add_argument('--coordinator_address', metavar='HOST:PORT')
  processes.add_argument('--process_count', type=int, metavar='N')
  processes.add_argument('--process_index', type=int, metavar='I')


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  def rewrite(argument: str) -> str:
    """Turns --gin.NAME=value into --gin_bindings, so that their order stays."""
    if match := re.fullmatch(r'--gin\.([^=\s]+)=(.*)', argument, re.DOTALL):
      from t5x_lite.gin_front import configuration

      return '--gin_bindings=' + configuration.binding(*match.groups())
    if argument.startswith('--gin.'):
      raise UsageError(f'{argument} needs a value: write {argument}=value')
    return argument

  argv = [rewrite(argument) for argument in argv]
  return _make_parser(argv).parse_args(argv)


def _configure(args: argparse.Namespace) -> Any:
  """Checks everything, and returns what can be called."""
  from t5x_lite.gin_front import configuration
  from t5x_lite.runs import progress

  command = COMMANDS[args.command]
  flags = [parameter.name for parameter in command.parameters()]
  given: dict[str, Any] = {x: found for x in flags if (found := getattr(args, x)) is not None}
  for name, value in given.items():
    if re.match(r"(\['?)?(https?|ftp)://", str(value)):
      raise UsageError(f'--{name} {value}: nothing is read from the network, download it first')
    if isinstance(value, float) and not math.isfinite(value):
      raise UsageError(f'--{name} is {value}; give a finite number')
    if name in _TEXTS:
      with refusing(f'--{name} is {value!a}, which is not UTF-8', UnicodeError):
        ''.join(value).encode()
  fields = command.bindings(given)
  if command.runs_commands:
    given['check'] = lambda argv: _configure(_parse(argv)).arguments()
  # Read when data is: TensorFlow is not imported for these.
  if args.tfds_data_dir:
    os.environ['TFDS_DATA_DIR'] = args.tfds_data_dir
  if args.seqio_additional_cache_dirs:
    os.environ['SEQIO_CACHE_DIRS'] = args.seqio_additional_cache_dirs
  module, _, name = command.function.rpartition('.')
  with progress.quiet_stderr():  # gin files import modules too
    return configuration.configure(
      getattr(importlib.import_module(module), name),
      gin_files=[*getattr(args, 'gin_files', ()), *args.gin_file],
      bindings=[*args.gin_bindings, *fields],
      search_paths=[path for path in args.gin_search_paths.split(',') if path],
      given=given,
      flags=flags,
      programs=[command.function for command in COMMANDS.values()],
      inherits=command.inherits,
    )


def _run(argv: Sequence[str]) -> int:
  """Parses the command line, checks everything, runs the command."""
  args = _parse(argv)
  if args.command == COMPLETION:
    return _print_completion(args.shell)
  command = COMMANDS[args.command]
  if command.computes:
    host_memory.keep_freed_memory()  # before a thread is started

  from t5x_lite.compiler import compilation_cache
  from t5x_lite.parallel import distributed

  if not command.runs_commands:
    group = {'process_count': args.process_count, 'process_index': args.process_index}
    distributed.initialize(coordinator_address=args.coordinator_address or '', **group)
  if command.computes:
    compilation_cache.keep_compiled_programs()
  _configure(args).call()
  return EXIT_STOPPED if distributed.stopped_by() else 0


def _out_of_memory(error: Exception) -> str:
  """Says what a device had too little for, and which levers there are."""
  asked = re.search(r'allocat\w+ ([\d.]+ ?\w+)', str(error))
  what = f' ({asked[1]} more were asked for)' if asked else ''
  return (
    f'the device is out of memory{what}: use a smaller batch (DatasetConfig.batch_size, '
    '--batch_tokens of finetune, --batch_size of infer), num_microbatches, shorter inputs, '
    'T5Config.remat_policy, or more devices along fsdp or model (docs/launch.md)'
  )


def _tell(message: object) -> None:
  """Prints the first line of what the user should know."""
  print(f'{PROGRAM_NAME}: {str(message).splitlines()[0]}', file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a program and returns the exit code."""
  # TensorFlow reads the first at import; it only feeds data here.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  logging.basicConfig(format='%(asctime)s %(levelname).1s %(message)s', datefmt='%H:%M:%S')
  logging.getLogger('t5x_lite').setLevel(logging.INFO)
  # `python -m` looks there too: the user's own module of tasks is found either way.
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    return _run(sys.argv[1:] if argv is None else argv)
  except UsageError as error:
    _tell(error)
    cause = error.__cause__ or getattr(error.__context__, '__cause__', None)  # gin raises a copy
    return _FILE_ERRORS.get(getattr(cause, 'errno', None) or 0, 2)
  except KeyboardInterrupt:
    _tell('interrupted')
    return 130
  except Exception as error:
    if 'RESOURCE_EXHAUSTED' in str(error) and not hasattr(error, 'exit_code'):
      from t5x_lite.runs import files

      on_disk = isinstance(error, ValueError)  # tensorstore's; JAX's are RuntimeErrors
      _tell(f'cannot write: {files.cause(error)}' if on_disk else _out_of_memory(error))
      return 7 if on_disk else 3
    # gin raises a copy of an error, without what OSError holds.
    found = error if getattr(error, 'errno', None) else error.__context__
    if isinstance(found, OSError) and found.errno in _FILE_ERRORS:
      _tell(f'{found.strerror}: {found.filename or "a file"}')
      return _FILE_ERRORS[found.errno]
    # What a run can meet without a bug in it names its exit code.
    code = getattr(error, 'exit_code', None)
    if code is None:
      raise
    if str(error):  # some have said it all already
      _tell(error)
    if getattr(error, 'exit_at_once', False):
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    return code


if __name__ == '__main__':
  sys.exit(main())
