"""The study program: a table of runs, as the T5 paper has them, and its report.

A cell is a row and a seed. It goes through the stages (pretrain, fine-tune, evaluate), each a
process of its own, which may fail alone. A run is named after what it is, so that equal stages, of
several studies with one output_dir too, are one run, and what is done is not done again.

  OUTPUT_DIR/runs/STAGE-FINGERPRINT/   a run; log.txt and outcome.json beside
  OUTPUT_DIR/NAME.md, NAME.html        the report, see study_report.py
"""

import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from t5x_lite.data.config import DatasetConfig
from t5x_lite.errors import UsageError, refusing
from t5x_lite.programs import report_runs
from t5x_lite.runs import files, progress

log = logging.getLogger(__name__)

OUTCOME_FILE = 'outcome.json'
LOG_FILE = 'log.txt'
# Exit codes that the same command would end with again: see main.py.
_FINAL = {0: 'done', 2: 'refused', 3: 'does not fit', 4: 'diverged'}

# What a row changes, by stage; '*' is every stage, None leaves a stage out.
Row = Mapping[str, Mapping[str, Any] | None]
# Raises UsageError if a command line would not work; returns its arguments.
Check = Callable[[Sequence[str]], Mapping[str, Any]]


class StoppedError(RuntimeError):
  """A signal stopped the study; what ran has saved itself."""

  exit_code = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """One command of a cell.

  In strings of `bindings`, {seed} is the cell's seed, {run} the directory of this run, {NAME} that
  of an earlier stage and {NAME/3} the same of seed 3.
  """

  name: str  # of letters, digits and underscores
  command: str = 'train'  # or 'eval', or another command
  gin_files: Sequence[str] = ()  # that it is given
  # Gin name to value; a string is written as after --gin.NAME=.
  bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Column of the table to metrics, whose mean it is. Of a training run 'eval/TASK/loss' and the
  # like, at the step where it is best, as in the paper; of `eval` 'TASK/METRIC', with or without
  # that 'infer_eval/'. 'a + b' is the mean of two of one step.
  scores: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  optional: bool = False  # only in rows that name it, or for a stage that does


@dataclasses.dataclass(frozen=True)
class StageRun:
  """One stage of one cell, ready to run; it needs the runs whose directories it names."""

  stage: Stage
  directory: str
  argv: tuple[str, ...]
  needs: tuple['StageRun', ...]

  def outcome(self) -> dict[str, Any]:
    """Returns what became of it; empty if it never ended."""
    return report_runs.read_json(epath.Path(self.directory) / OUTCOME_FILE)

  def in_order(self) -> list['StageRun']:
    """Returns what it stands on, and itself."""
    return [*(one for need in self.needs for one in need.in_order()), self]


class Grid:
  """The runs of every cell."""

  def __init__(self, stages: Sequence[Stage], rows: Mapping[str, Row], output_dir: str):
    """Checks that the rows change what is there."""
    self._rows, self._root = rows, os.path.join(output_dir, 'runs')
    self._stages = {stage.name: stage for stage in stages}
    if len(self._stages) < len(stages) or not all(map(str.isidentifier, self._stages)):
      names = [stage.name for stage in stages]
      why = 'each needs a name of its own, of letters, digits and _'
      raise UsageError(f'study.stages are named {names}: {why}')
    for row, changes in rows.items():
      for name in changes.keys() - {'*', *self._stages}:
        there = ', '.join(self._stages)
        raise UsageError(f'study.rows: {row!r} changes the stage {name!r}; there are {there}')

  def cell(self, row: str, seed: int) -> list[StageRun]:
    """Returns the runs of a cell in order."""
    unnamed = {name: None if stage.optional else {} for name, stage in self._stages.items()}
    names = [x for x in self._stages if self._rows[row].get(x, unnamed[x]) is not None]
    return [self.run(name, row, seed) for name in names]

  def run(self, name: str, row: str, seed: int) -> StageRun:
    """Returns a stage as a row and a seed have it."""
    stage, changes, needs = self._stages[name], self._rows[row], []
    names = list(itertools.takewhile(lambda one: one != name, self._stages))

    def fill(match: re.Match) -> str:
      what, other = match.groups()
      if what in ('seed', 'run'):
        return str(seed) if what == 'seed' else match[0]
      if what not in names:
        why = f'names {match[0]}, which is no earlier stage, nor seed or run'
        raise UsageError(f'study: the stage {name} {why}')
      if changes.get(what, {}) is None:
        why = f'leaves out the stage {what}, which {name} names: bind that too'
        raise UsageError(f'study.rows: {row!r} {why}')
      needs.append(self.run(what, row, int(other or seed)))
      return needs[-1].directory

    bindings = {**stage.bindings, **(changes.get('*') or {}), **(changes.get(name) or {})}
    words = [stage.command, *(f'--gin_file={file}' for file in stage.gin_files)]
    for key, value in bindings.items():
      text = value if isinstance(value, str) else repr(value)
      words.append(f'--gin.{key}=' + re.sub(r'\{(\w+)(?:/(\d+))?\}', fill, text))
    identity = json.dumps(words).replace(self._root, '')
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:8]
    directory = os.path.join(self._root, f'{name}-{fingerprint}')
    argv = tuple(word.replace('{run}', directory) for word in words)
    return StageRun(stage, directory, argv, tuple(needs))


def study(
  *,
  name: str,
  stages: Sequence[Stage],
  rows: Mapping[str, Row],
  output_dir: str,
  seeds: Sequence[int] = (0, 1, 2),
  baseline: str = '',
  title: str = '',
  paper: Mapping[str, Sequence[float]] | None = None,
  paper_columns: Sequence[str] = (),
  paper_deviations: Sequence[float] = (),
  cell: int | None = None,
  launcher: str = '',
  report: bool = False,
  dry_run: bool = False,
  check: Check | None = None,
) -> str:
  """Runs the cells that are not done, one after another, and reports on all.

  Returns the report's Markdown file. UsageError if a command would be refused, and nothing has run
  then; StoppedError after SIGTERM or Ctrl-C.

  Args:
    name: of the report's files.
    stages: what every cell does, in order.
    rows: by title, what each changes: {'STAGE': {'gin name': value}}; see Row.
    output_dir: on a local or shared disk; studies with one share their runs.
    seeds: each row runs with all of them; see Stage for how they are bound.
    baseline: the row that the others are compared with.
    title: over the report; the name by default.
    paper: the published numbers of each row.
    paper_columns: what those are.
    paper_deviations: their standard deviations, where they are published.
    cell: run this one alone, from 0, as a job of an array; see launch/study.sbatch.
    launcher: words before every command, such as 'srun --wait=60'.
    report: run nothing, and report on what is there.
    dry_run: print the commands, and run nothing.
    check: looks at every command before the first one runs.
  """
  from t5x_lite.programs import study_report

  for row in [baseline, *(paper or {})]:
    if row and row not in rows:
      raise UsageError(f'study: there is no row {row!r}, only {", ".join(rows)}')
  for row, numbers in (paper or {}).items():
    if len(numbers) != len(paper_columns):
      raise UsageError(f'study.paper: {row!r} needs {len(paper_columns)} numbers')
  if not seeds or len(set(seeds)) < len(seeds):
    raise UsageError(f'study.seeds is {seeds!r}; name at least one, each once')
  grid = Grid(stages, rows, output_dir)
  cells = {(row, seed): grid.cell(row, seed) for row in rows for seed in seeds}
  if cell is not None and not 0 <= cell < len(cells):
    raise UsageError(f'study.cell is {cell}; there are {len(cells)} cells, from 0')
  todo = list(cells) if cell is None else [list(cells)[cell]]
  listed = (one for key in todo for run in cells[key] for one in run.in_order())
  runs = {run.directory: run for run in listed}
  if check is not None and not report:
    for run in runs.values():
      with refusing(f'stage {run.stage.name}', UsageError):
        _check_tasks(check(run.argv))
  if dry_run:
    for run in runs.values():
      print(shlex.join(['t5x-lite', *run.argv]))
    print(f'{len(todo)} cells, {len(runs)} runs; dry run: nothing was run')
    return ''
  tried: dict[str, dict[str, Any]] = {}
  try:
    for i, (row, seed) in enumerate([] if report else todo):
      where = f'cell {i + 1} of {len(todo)}, {row}, seed {seed}'
      for run in cells[row, seed]:
        _run(run, launcher, where, tried)
  finally:
    published = {row: dict(zip(paper_columns, x, strict=True)) for row, x in (paper or {}).items()}
    deviations = dict(zip(paper_columns, paper_deviations, strict=False))
    table = study_report.Table(cells, baseline, published, deviations)
    path = study_report.write(table, os.path.join(output_dir, name), title or name)
    print(path)
  return path


def _check_tasks(arguments: Mapping[str, Any]) -> None:
  """Raises UsageError if a data set of a command is not registered."""
  found = itertools.chain(*(x if isinstance(x, list) else [x] for x in arguments.values()))
  for dataset in (one for one in found if isinstance(one, DatasetConfig)):
    from t5x_lite.data.tasks import catalog

    catalog.import_modules(dataset.module)
    if not catalog.is_registered(dataset.mixture_or_task_name):
      vocabulary = arguments.get('vocabulary') or catalog.VOCABULARIES['t5']
      catalog.resolve(dataset.mixture_or_task_name, vocabulary)


def _run(run: StageRun, launcher: str, where: str, tried: dict[str, dict[str, Any]]) -> dict:
  """Runs what is neither done nor in `tried`, after what it needs; returns its outcome."""
  if run.directory in tried:
    return tried[run.directory]
  for need in run.needs:
    if _run(need, launcher, where, tried).get('exit_code') != 0:
      return {}  # the report says what became of the other
  os.makedirs(run.directory, exist_ok=True)
  logged = os.path.join(run.directory, LOG_FILE)
  with open(os.path.join(run.directory, '.study'), 'w') as lock, open(logged, 'ab') as output:
    where = f'{where}: {run.stage.name}'
    # Another cell may be at it, or the child of a killed study: the lock is the child's too.
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log.info('%s: waits for another process that runs it (%s)', where, logged)
      fcntl.flock(lock, fcntl.LOCK_EX)
    before = run.outcome()
    if before.get('exit_code') in _FINAL:
      return before
    log.info('%s (%s)', where, logged)
    start = time.monotonic()
    argv = [*shlex.split(launcher), sys.executable, '-m', 't5x_lite.main', *run.argv]
    streams = {'stdin': subprocess.DEVNULL, 'stdout': output, 'stderr': subprocess.STDOUT}
    apart: dict[str, Any] = {'start_new_session': True, 'pass_fds': [lock.fileno()]}
    process, received = subprocess.Popen(argv, **streams, **apart), list[int]()

    def stop(number: int, frame: Any) -> None:
      received.append(number)
      os.killpg(process.pid, signal.SIGTERM)

    previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
      code = process.wait()
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)
    seconds = before.get('seconds', 0.0) + time.monotonic() - start
    *_, message = ['', *report_runs.read_text(epath.Path(logged)).strip().splitlines()]
    outcome = {'exit_code': code, 'seconds': seconds, 'message': message.strip() if code else ''}
    files.write_json(epath.Path(run.directory) / OUTCOME_FILE, outcome)
    tried[run.directory] = outcome
  log.info('%s: %s after %s', where, state(outcome), progress.format_duration(seconds))
  if received:
    raise StoppedError('the study was stopped; the same command continues it')
  return outcome


def state(outcome: Mapping[str, Any]) -> str:
  """Returns one or two words on what became of a run."""
  if (code := outcome.get('exit_code')) is None:
    return 'not run'
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  return _FINAL.get(code, 'stopped' if code == StoppedError.exit_code else f'failed ({code})')
