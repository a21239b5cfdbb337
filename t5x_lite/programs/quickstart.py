"""The quickstart program: a T5 learns real text and real tasks, start to end.

The sizes are the gin file's; this is only the order of things.

  OUTPUT_DIR/            the fine-tuned run: `t5x-lite infer --model OUTPUT_DIR`
  OUTPUT_DIR/pretrain/   the pretraining run
  OUTPUT_DIR/test/       metrics.json, and TASK.jsonl with every prediction
  OUTPUT_DIR/results.json, report.html
"""

import dataclasses
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from t5x_lite.data.config import DatasetConfig
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators
from t5x_lite.parallel import distributed
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import evaluate, report, report_runs, start_checks
from t5x_lite.runs import files, progress
from t5x_lite.runs.checkpoints import CheckpointConfig

log = logging.getLogger(__name__)


def quickstart(
  *,
  pretrain: Callable[..., Any],
  finetune: Callable[..., Any],
  test: Sequence[DatasetConfig],
  output_dir: str = 'runs/quickstart',
  finetune_checkpoint: CheckpointConfig | None = None,
  mesh: MeshConfig | None = None,
  decoding: DecodingConfig | None = None,
  num_examples: int | None = None,
  num_shown: int = 3,
) -> dict[str, Any] | None:
  """Runs all phases; one that is finished is not run again.

  Returns what results.json holds, or None if a signal stopped a phase early.

  Args:
    pretrain: `train` with everything bound but model_dir.
    finetune: the same, and without checkpoint.
    test: tasks or mixtures, at their test splits.
    output_dir: becomes the fine-tuned run; see above for the rest.
    finetune_checkpoint: its restore_path is set to the pretraining run.
    mesh: devices of the test; all by default.
    decoding: of the test; greedy by default.
    num_examples: of each test task, the first this many; None for all.
    num_shown: predictions of each task that are printed; 0 for none.
  """
  if num_shown < 0:
    raise UsageError(f'quickstart.num_shown is {num_shown}; it must be 0 or more')
  start_checks.check_positive('quickstart.num_examples', num_examples)
  pretrain_dir, test_dir = (os.path.join(output_dir, name) for name in ('pretrain', 'test'))
  checkpoint = finetune_checkpoint or CheckpointConfig()
  checkpoint = dataclasses.replace(checkpoint, restore_path=pretrain_dir)
  start = time.monotonic()
  seconds: dict[str, float] = {}

  def phase_ends(name: str) -> None:
    seconds[name] = time.monotonic() - start - sum(seconds.values())
    log.info('quickstart: %s took %s', name, progress.format_duration(seconds[name]))

  # ---- Pretrain, fine-tune ----
  with distributed.stop_signal() as stop:
    if pretrain(model_dir=pretrain_dir) is None or stop.received:
      return None
    phase_ends('pretrain')
    if finetune(model_dir=output_dir, checkpoint=checkpoint) is None or stop.received:
      return None
    phase_ends('finetune')

  # ---- Test, show, report ----
  how = {'mesh': mesh, 'decoding': decoding, 'num_examples': num_examples}
  metrics = evaluate.evaluate(model_dir=output_dir, datasets=test, output=test_dir, **how)
  phase_ends('test')
  results: dict[str, Any] = {'test': metrics, 'seconds': seconds}
  report.report(runs=[output_dir, pretrain_dir])  # of all processes: it opens a checkpoint
  phase_ends('report')
  if distributed.is_primary():
    show_predictions(test_dir, list(metrics), num_shown)
    seconds['total'] = sum(seconds.values())
    path = epath.Path(output_dir) / 'results.json'
    files.write_json(path, results)
    print(f'\n{summary(results)}\n\nresults: {path}\n\n{next_steps(output_dir)}')
  return results


def summary(results: Mapping[str, Any]) -> str:
  """Returns the test metrics and times as a few lines of text."""
  text = ''
  for task, metrics in results['test'].items():
    shown = {k: v for k, v in metrics.items() if '/' not in k}
    text += f'{task:20} {evaluators.format_metrics(shown)}\n'
  times = [f'{name} {progress.format_duration(x)}' for name, x in results['seconds'].items()]
  return f'{text}{"time":20} {", ".join(times)}'


def typed() -> str:
  """Returns the command line's name as it can be typed: its path if it is not on PATH."""
  path = sys.argv[0]
  if shutil.which('t5x-lite') or os.path.basename(path) != 't5x-lite':
    return 't5x-lite'
  return shlex.quote(os.path.relpath(path))


def next_steps(output_dir: str) -> str:
  """Returns two commands to go on with."""
  run, model = typed(), shlex.quote(output_dir)
  return (
    f'try it:      echo "pronounce: hello" | {run} infer --model {model} --input - --output -\n'
    f'fine-tune:   {run} finetune --model {model} --train FILE.csv --output runs/mine'
  )


def show_predictions(directory: str, tasks: Sequence[str], num: int) -> None:
  """Prints predictions from all over each task beside their references."""
  for task in tasks if num else ():
    print(f'\n{task}')
    lines = report_runs.read_lines(epath.Path(directory) / f'{task}.jsonl')
    entries = list({entry['input']: entry for entry in lines}.values())
    for entry in entries[:: -(-len(entries) // num) or 1]:
      print(f'  input       {entry["input"]}')
      print(f'  prediction  {entry["prediction"]}')
      print(f'  reference   {entry["target"]}\n')
