"""Fine-tuning from Python: a model and rows in memory become files, that the command line takes."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from t5x_lite.data import pairs as pairs_lib
from t5x_lite.data.pairs import Columns, Pairs
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators
from t5x_lite.parallel import distributed
from t5x_lite.programs import finetune as program
from t5x_lite.programs import quickstart, start_checks
from t5x_lite.runs import checkpoints, progress

START = 'start'
DATA = 'data'


def finetune(
  data: Any, validation: Any, *, output: str, save: Callable[[str], None], **arguments: Any
) -> str:
  """Runs `finetune.finetune` and returns the best checkpoint's directory.

  Data and validation, which may be empty, are files or rows; see `pairs.read`. `save` writes the
  model to start from into a directory. UsageError names an argument that the program has not.
  """
  known = inspect.signature(program.finetune).parameters
  for name in arguments:
    if name not in known or name == 'model':
      settings = ', '.join(sorted(known.keys() - {'model', 'train', 'output'}))
      raise UsageError(f'finetune has no setting {name!r}; there are {settings}')
  start_checks.check_writable(output)
  sources: dict[str, Any] = {'train': data, 'validation': validation}
  given = {name: part for name, part in sources.items() if not _empty(part)}
  if not all(map(pairs_lib.is_paths, given.values())):
    # All of it: the columns that are named hold for both.
    names = program.COLUMNS.items()
    columns = Columns(**{field: arguments.pop(name) for name, field in names if name in arguments})
    for name, part in given.items():
      sources[name] = _write(pairs_lib.read(part, columns, what=name), output, name)
  start = os.path.join(output, START)
  if distributed.is_primary() and not os.path.isdir(start):
    save(start)
  distributed.barrier('start')
  program.finetune(model=start, output=output, **sources, **arguments)
  if progress.in_notebook():
    path = os.path.join(output, quickstart.CURVES_FILE)
    quickstart.draw_losses({'fine-tuning': output}, path)
    progress.show_picture(path)
  step = distributed.from_primary(lambda: program.best_step(output))
  return os.path.join(output, checkpoints.CHECKPOINTS, str(step))


def _empty(source: Any) -> bool:
  return source is None or (isinstance(source, str | list | tuple | dict) and not source)


def _write(pairs: Pairs, output: str, name: str) -> str:
  """Writes pairs as JSON lines and returns the file."""
  path = epath.Path(output) / DATA / f'{name}.jsonl'
  if distributed.is_primary():
    rows = zip(pairs.inputs, pairs.targets, strict=True)
    evaluators.write_lines(path, [{'input': x, 'target': y} for x, y in rows])
  distributed.barrier('data')
  return os.fspath(path)
