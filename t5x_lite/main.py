"""The command line: `t5x-lite PROGRAM --gin_file=... --gin.NAME=value ...`.

A program is a keyword-only function. Its arguments come from gin files, from
`--gin.` bindings and from the few flags in the table below; its module is
imported only when it is asked for, so that `--help` is instant and inference
does without TensorFlow.

Exit codes: 0 done; 2 a mistake of the user, told in one line on stderr; 3 a
precompiled program that does not fit; 4 training diverged; 5 another process of
the run was lost; 130 interrupted; 1 anything else, with a traceback.
"""

import argparse
import contextlib
import dataclasses
import importlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from t5x_lite.errors import UsageError
from t5x_lite.parallel import host_memory

PROGRAM_NAME = 't5x-lite'


@dataclasses.dataclass(frozen=True)
class Flag:
  """A command-line flag that is an argument of the program's function."""

  name: str
  help: str
  type: type = str
  choices: tuple[str, ...] | None = None
  many: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
  """Where a program's function lives, and what it takes besides gin."""

  function: str
  help: str
  positional: tuple[Flag, ...] = ()
  flags: tuple[Flag, ...] = ()
  # The program whose experiment files this one also reads.
  inherits: str = ''
  # It runs steps, whose temporaries are worth keeping (host_memory.py).
  computes: bool = False


_DRY_RUN = Flag('dry_run', 'say what would be done, write nothing', bool)

PROGRAMS: dict[str, Program] = {
  'train': Program(
    't5x_lite.programs.train.train',
    'train a model, or continue its run',
    computes=True,
    flags=(
      Flag(
        'dry_run',
        'print configuration, parameters, sharding and memory, train nothing',
        bool,
      ),
    ),
  ),
  'eval': Program(
    't5x_lite.programs.evaluate.evaluate',
    'evaluate a run on tasks by their own metrics',
    computes=True,
  ),
  'infer': Program(
    't5x_lite.programs.infer.infer',
    'predict for every line of a file',
    computes=True,
    flags=(
      Flag('model', 'run directory, or one STEP directory of it'),
      Flag('input', 'text, TSV or JSONL, one example a line'),
      Flag('output', 'JSONL, one object per input line'),
      Flag('input_format', 'auto, text, tsv or jsonl'),
      Flag('field', 'JSON field or number of the TSV column, from 0'),
      Flag('prefix', "put before every input, such as 'pronounce: '"),
      Flag('batch_size', 'lines decoded at a time', int),
      Flag('max_input_length', 'tokens; longer inputs are cut', int),
      Flag('max_decode_length', 'tokens; by default as in training', int),
      Flag('seed', 'of sampling', int),
      Flag('resume', 'continue an output that was interrupted', bool),
    ),
  ),
  'quickstart': Program(
    't5x_lite.programs.quickstart.quickstart',
    'pretrain, fine-tune, evaluate and predict on the embedded text',
    computes=True,
  ),
  'vocab': Program(
    't5x_lite.programs.train_vocabulary.train_vocabulary',
    'train a SentencePiece vocabulary on your own text',
    flags=(
      Flag('input', 'text, TSV or JSONL files or glob patterns', many=True),
      Flag('task', 'or the text of this SeqIO task or mixture'),
      Flag('output', 'the .model file to write'),
      Flag('vocab_size', 'pieces, sentinels not counted', int),
      Flag('model_type', 'unigram, bpe or char'),
      Flag('character_coverage', 'share of characters with a piece', float),
      Flag('byte_fallback', 'spell other characters as bytes', bool),
    ),
  ),
  'convert': Program(
    't5x_lite.programs.convert.convert',
    'convert checkpoints between t5x_lite, Hugging Face and T5X',
    positional=(
      Flag('source', 'checkpoint to read; its format is detected'),
      Flag('destination', 'directory to write'),
    ),
    flags=(
      Flag('to', 'format to write', choices=('t5x_lite', 'hf', 't5x')),
      Flag('dtype', 'of the numbers written; by default as they are'),
      Flag('vocabulary', "a SentencePiece model, 't5', 'byte' or 'none'"),
      Flag('dry_run', 'list how names map, write nothing', bool),
    ),
  ),
  'grow_vocab': Program(
    't5x_lite.programs.grow_vocabulary.grow_vocabulary',
    'add tokens or sentinels to a model and its vocabulary',
    positional=(
      Flag('source', 'checkpoint to read; its format is detected'),
      Flag('destination', 'directory to write'),
    ),
    flags=(
      Flag('tokens_file', 'new tokens, one a line'),
      Flag('extra_ids', 'sentinels in all; as many as there are', int),
      Flag('to', 'format to write', choices=('t5x_lite', 'hf', 't5x')),
      Flag('dry_run', 'say what would change, write nothing', bool),
    ),
  ),
  'precompile': Program(
    't5x_lite.programs.precompile.precompile',
    'compile a step for TPUs that you do not have; does it fit, what bounds it',
    flags=(
      Flag('topology', 'for example v5p:8x8x8 or v5e:16x16'),
      Flag('num_slices', 'slices of that topology', int),
      Flag('step', 'what is compiled', choices=('train', 'decode')),
      Flag('json', 'end with one JSON object on the last line', bool),
      Flag('hlo_file', "where to write the compiled program's text"),
    ),
    inherits='t5x_lite.programs.train.train',
  ),
  'plan': Program(
    't5x_lite.programs.plan.plan',
    'search mesh, remat policy and microbatches for a topology',
    flags=(
      Flag('topology', 'for example v5p:8x8x8 or v5e:16x16'),
      Flag('num_slices', 'slices of that topology', int),
      Flag('num_compiles', 'candidates that the compiler judges', int),
      Flag('json', 'end with one JSON object on the last line', bool),
      Flag('output', 'gin file to write the winning bindings to'),
    ),
    inherits='t5x_lite.programs.train.train',
  ),
}


class _Parser(argparse.ArgumentParser):
  """Reports mistakes like every other mistake: one line, exit code 2."""

  def error(self, message: str) -> NoReturn:
    raise UsageError(f'{message} (see {self.prog} --help)')


def _make_parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog=PROGRAM_NAME,
    description='T5 in JAX. `t5x-lite PROGRAM --help` lists its flags.',
    allow_abbrev=False,
  )
  subparsers = parser.add_subparsers(
    dest='program', metavar='PROGRAM', required=True, parser_class=_Parser
  )
  for name, program in PROGRAMS.items():
    sub = subparsers.add_parser(
      name, help=program.help, description=program.help, allow_abbrev=False
    )
    for flag in program.positional:
      sub.add_argument(flag.name, metavar=flag.name.upper(), help=flag.help)
    for flag in program.flags:
      _add_flag(sub, flag)
    _add_common_flags(sub)
  return parser


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
  # None stands for a flag that was not given: gin or the default decides.
  if flag.type is bool:
    parser.add_argument(
      f'--{flag.name}', action='store_const', const=True, help=flag.help
    )
  else:
    parser.add_argument(
      f'--{flag.name}',
      type=flag.type,
      choices=flag.choices,
      nargs='+' if flag.many else None,
      help=flag.help,
    )


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
  gin = parser.add_argument_group('configuration')
  gin.add_argument(
    '--gin_file',
    action='append',
    default=[],
    metavar='FILE',
    help='gin file; may be given several times, later ones win; configs/... '
    'that came with the package is found from anywhere',
  )
  gin.add_argument(
    '--gin_bindings',
    action='append',
    default=[],
    metavar='STATEMENT',
    help="a gin statement; --gin.NAME=value is short for 'NAME = value', where "
    'a value that is no number, @reference or %%macro is a string',
  )
  gin.add_argument(
    '--gin_search_paths',
    default='',
    metavar='DIRS',
    help='comma-separated directories in which gin files are looked for',
  )
  processes = parser.add_argument_group(
    'many processes (found by themselves on SLURM, Kubernetes, Open MPI, TPU)'
  )
  processes.add_argument('--coordinator_address', metavar='HOST:PORT')
  processes.add_argument('--process_count', type=int, metavar='N')
  processes.add_argument('--process_index', type=int, metavar='I')


def _rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
  """Turns --gin.NAME=value into --gin_bindings, so that their order stays."""
  from t5x_lite.gin_front import configuration

  rewritten = []
  for argument in argv:
    match = re.fullmatch(r'--gin\.([^=\s]+)=(.*)', argument, re.DOTALL)
    if match:
      rewritten.append(
        '--gin_bindings=' + configuration.binding(*match.groups())
      )
    elif argument.startswith('--gin.'):
      raise UsageError(f'{argument} needs a value: write {argument}=value')
    else:
      rewritten.append(argument)
  return rewritten


def _load(program: Program) -> Any:
  module, name = program.function.rsplit('.', 1)
  with _quiet_stderr():
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
  """Holds back what libraries say while they are imported.

  TensorFlow reports on oneDNN and CUDA from C++, before it has read the log
  level it was given. Shown after all if it ends in a bug.
  """
  sys.stderr.flush()
  with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), 'wb') as stderr:
    os.dup2(held.fileno(), 2)
    try:
      yield
    except UsageError:
      raise
    except BaseException:
      held.seek(0)
      stderr.write(held.read())
      raise
    finally:
      os.dup2(stderr.fileno(), 2)


def _write_config(model_dir: str, text: str) -> None:
  """Writes config.gin; a run that is killed meanwhile leaves all or nothing."""
  from etils import epath

  directory = epath.Path(model_dir)
  directory.mkdir(parents=True, exist_ok=True)
  temporary = directory / 'config.gin.tmp'
  temporary.write_text(text)
  temporary.replace(directory / 'config.gin')


def _run(argv: Sequence[str]) -> Any:
  """Parses the command line, checks everything, runs the program."""
  if any(argument.startswith('--gin.') for argument in argv):
    argv = _rewrite_gin_flags(argv)
  args = _make_parser().parse_args(argv)
  program = PROGRAMS[args.program]
  flags = [flag.name for flag in (*program.positional, *program.flags)]
  given = {name: getattr(args, name) for name in flags}
  given = {name: value for name, value in given.items() if value is not None}

  if program.computes:
    host_memory.keep_freed_memory()  # before a thread is started

  from t5x_lite.gin_front import configuration
  from t5x_lite.parallel import distributed

  distributed.initialize(
    coordinator_address=args.coordinator_address or '',
    process_count=args.process_count,
    process_index=args.process_index,
  )
  function = _load(program)
  with _quiet_stderr():  # gin files import modules too
    configured = configuration.configure(
      function,
      gin_files=args.gin_file,
      bindings=args.gin_bindings,
      search_paths=[path for path in args.gin_search_paths.split(',') if path],
      given=given,
      flags=flags,
      programs=[program.function for program in PROGRAMS.values()],
      inherits=program.inherits,
      write_config=_write_config,
    )
  return configured.call()


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a program and returns the exit code."""
  # TensorFlow reads the first at import; it only feeds data here.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  logging.basicConfig(
    format='%(asctime)s %(levelname).1s %(message)s', datefmt='%H:%M:%S'
  )
  logging.getLogger('t5x_lite').setLevel(logging.INFO)
  # A console script does not look there, `python -m` does: the user's own
  # module of tasks is found either way.
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    _run(sys.argv[1:] if argv is None else argv)
  except UsageError as error:
    print(f'{PROGRAM_NAME}: {str(error).splitlines()[0]}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f'{PROGRAM_NAME}: interrupted', file=sys.stderr)
    return 130
  except Exception as error:
    # What a run can meet without a bug in it names its exit code.
    code = getattr(error, 'exit_code', None)
    if code is None:
      raise
    if str(error):  # some have said it all already
      print(f'{PROGRAM_NAME}: {str(error).splitlines()[0]}', file=sys.stderr)
    if getattr(error, 'exit_at_once', False):
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    return code
  return 0


if __name__ == '__main__':
  sys.exit(main())
