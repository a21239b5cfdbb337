"""Fine-tuning from Python: a model and rows in memory become files of the run.

So that it can be run again, and continued, by the command line as well.
"""

import inspect
import json
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from t5x_lite.data import pairs as pairs_lib
from t5x_lite.data.pairs import Columns, Pairs
from t5x_lite.errors import UsageError
from t5x_lite.parallel import distributed
from t5x_lite.programs import finetune as program
from t5x_lite.programs import quickstart, start_checks
from t5x_lite.runs import checkpoints, files, progress

START = 'start'
DATA = 'data'
# Fields of Columns by the program's names.
_COLUMNS = {'input_column': 'input', 'target_column': 'target'}
_COLUMNS |= {name: name for name in ('template', 'prefix', 'skip_bad_rows')}


def finetune(
  data: Any, validation: Any, *, output: str, save: Callable[[str], None], **arguments: Any
) -> str:
  """Runs `finetune.finetune` and returns the best checkpoint's directory.

  Args:
    data: files or rows; see `pairs.read`.
    validation: likewise, or empty.
    output: the run's directory.
    save: writes the model to start from into a directory.
    **arguments: of `finetune.finetune`.

  Raises:
    UsageError: if an argument is unknown or the data cannot be read.
  """
  known = inspect.signature(program.finetune).parameters
  for name in arguments:
    if name not in known or name == 'model':
      settings = ', '.join(sorted(known.keys() - {'model', 'train', 'output'}))
      raise UsageError(f'finetune has no setting {name!r}; there are {settings}')
  start_checks.check_writable(output)
  parts = {'train': data, 'validation': validation}
  sources: dict[str, Any] = dict(parts)
  if not all(map(_in_files, parts.values())):
    # All of it: the columns that are named hold for both.
    named = {field: arguments.pop(name) for name, field in _COLUMNS.items() if name in arguments}
    for name, part in parts.items():
      if not _empty(part):
        pairs = pairs_lib.read(part, Columns(**named), what=name)
        sources[name] = _write(pairs, output, name)
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


def _in_files(source: Any) -> bool:
  return _empty(source) or pairs_lib.is_paths(source)


def _write(pairs: Pairs, output: str, name: str) -> str:
  """Writes pairs as JSON lines and returns the file."""
  path = epath.Path(output) / DATA / f'{name}.jsonl'
  if distributed.is_primary():
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(pairs.inputs, pairs.targets, strict=True)
    lines = (json.dumps({'input': x, 'target': y}, ensure_ascii=False) for x, y in rows)
    files.write_text(path, ''.join(f'{line}\n' for line in lines))
  distributed.barrier('data')
  return os.fspath(path)
