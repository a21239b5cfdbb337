"""The eval program: a trained run on tasks, by their own metrics; see evaluators.py."""

import dataclasses
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from t5x_lite.data import metrics as metrics_lib
from t5x_lite.data.config import DatasetConfig
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators as evaluators_lib
from t5x_lite.evaluation.evaluators import Metrics
from t5x_lite.interop import trained_model
from t5x_lite.models import model_sharding
from t5x_lite.parallel import distributed
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import report_runs, start_checks
from t5x_lite.runs import checkpoints, files, metric_writers, run_directory

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 5  # between two looks for new checkpoints


def evaluate(
  *,
  model_dir: str | Sequence[str],
  datasets: Sequence[DatasetConfig],
  output: str = '',
  last: int = 1,
  steps: Sequence[str] = (),
  follow: bool = False,
  param_dtype: str = '',
  mesh: MeshConfig | None = None,
  decoding: DecodingConfig | None = None,
  num_examples: int | None = None,
  teacher_forced: bool = True,
  metrics: Sequence[str] = (),
  bootstrap: int | None = None,
  continuous: bool = False,
  report_to: str | Sequence[str] = 'tensorboard',
) -> dict[str, Metrics]:
  """Evaluates a run's newest checkpoint, the given one, or several, on tasks.

  Returns metrics by task, of the last. UsageError if there is no run, or a dataset does not fit it.

  Args:
    model_dir: a run directory or one STEP directory of its checkpoints, a folder of transformers or
      T5X, or NAME@REVISION of the hub; several decode together, by their mean log-probability.
    datasets: tasks or mixtures, their splits and lengths.
    output: directory for metrics.json and TASK.jsonl (input, prediction and target of each
      example); by default MODEL_DIR/eval/STEP of a run; what is no run, or several, needs it. In it
      or above STEP: metrics.md, a table of all that is there, metrics.jsonl and TensorBoard's.
    last: evaluate the mean of this many of the newest checkpoints.
    steps: evaluate these checkpoints of a run, or 'all', each into a folder STEP of the output,
      except those that were evaluated with the same settings before.
    follow: do so as checkpoints appear: the given steps, else all until SIGTERM or Ctrl-C.
    param_dtype: to keep parameters in: 'bfloat16' takes half of float32's memory, 'int8' a fourth;
      the checkpoint's own by default.
    mesh: how devices are arranged; decided by their number by default.
    decoding: how to decode; greedy, as long as the targets, by default.
    num_examples: of each task, the first this many, for losses in whole batches; None for all.
    teacher_forced: also measure loss and token accuracy, of a single model.
    metrics: beside the tasks' own: names, such as 'rouge', or 'module:function' for a function of
      (targets, predictions), or (targets, predictions, inputs), that returns {name: number}.
    bootstrap: test sets to draw, such as 1000, for the 95% interval of each metric of decoded text,
      NAME_low and NAME_high.
    continuous: rows whose outputs have ended make room for others at once; see docs/generation.md.
    report_to: tensorboard, wandb or both, beside metrics.jsonl; or none.
  """
  for name, count in (('num_examples', num_examples), ('last', last), ('bootstrap', bootstrap)):
    start_checks.check_positive(f'evaluate.{name}', count)
  if not datasets:
    raise UsageError('evaluate.datasets is empty: name at least one task')
  reporters = metric_writers.reporters(report_to) if distributed.is_primary() else ()
  metric_fns = [metrics_lib.with_inputs(name) for name in metrics]
  steps, several = [*map(str, steps)], bool(steps) or follow
  settings = {'decoding': decoding, 'num_examples': num_examples, 'teacher_forced': teacher_forced}
  settings |= {'metrics': metrics, 'bootstrap': bootstrap, 'param_dtype': param_dtype}
  settings = run_directory.to_json({'datasets': datasets, **settings})
  evaluators, results = list[evaluators_lib.Evaluators](), dict[str, Metrics]()

  def measure(path: str | Sequence[str]) -> dict[str, Metrics]:
    models = trained_model.open_together(path, last, param_dtype=param_dtype)
    run = models[0]
    if continuous and len(models) > 1:
      raise UsageError('continuous batching is of one model')
    root = epath.Path(output) / (str(run.step) if several else '')
    if not output:
      if run.format != 't5x_lite' or len(models) > 1:
        why = f'{model_dir} is no run to write into: name a directory with --output'
        raise UsageError(f'evaluate.output is empty, and {why}')
      mean = f'-mean-of-{last}' if last > 1 else ''
      root = epath.Path(run.directory) / 'eval' / f'{run.step}{mean}'
    if results := _measured(root, settings) if several else {}:
      log.info('%s is evaluated already, in %s', path, root)
      return results
    start_checks.check_writable(str(root))
    placement = model_sharding.place_model(run.config, mesh)
    for config in () if evaluators else datasets:
      config = start_checks.resolve_dataset(config, run.config, run.vocabulary)
      batch_size = placement.whole_batch(config.batch_size)
      config = dataclasses.replace(config, batch_size=batch_size, shuffle=False)
      one = evaluators_lib.Evaluators(
        run.config,
        run.vocabulary,
        placement=placement,
        train_eval=[config] if teacher_forced and len(models) == 1 else [],
        infer_eval=[config] if 'inputs' in config.lengths else [],
        eval_steps=None if num_examples is None else -(-num_examples // batch_size),
        infer_eval_examples=num_examples,
        decoding=decoding,
        continuous=continuous,
        metric_fns=metric_fns,
        num_bootstrap=bootstrap or 0,
      )
      evaluators.append(one)
    evaluators_lib.check_distinct([n for one in evaluators for n in one.names])
    specs = model_sharding.inference_params(run.config, placement)
    params = trained_model.load_together(models, specs)
    failed, scalars = list[str](), dict[str, float]()
    samples: dict[str, evaluators_lib.Lines] = {}
    for result in itertools.chain.from_iterable(one.results(params) for one in evaluators):
      found = results.setdefault(result.task, {})
      failed += result.failed
      prefix = f'{result.kind}/{result.task}'
      scalars |= {f'{prefix}/{k}': v for k, v in result.metrics.items()}
      if result.kind == 'eval':
        found |= {f'eval/{k}': v for k, v in result.metrics.items()}
        continue
      found |= {**result.metrics, 'examples': float(len(result.lines))}
      if distributed.is_primary():
        evaluators_lib.write_lines(root / f'{result.task}.jsonl', result.lines)
        samples[prefix] = result.lines[: metric_writers.NUM_SAMPLES]

    def write() -> None:
      checkpoint = ', '.join(one.checkpoint for one in models)
      summary: Any = {'checkpoint': checkpoint, 'step': run.step, 'tasks': results}
      summary['settings'] = None if failed else settings  # None is measured again
      files.write_json(root / 'metrics.json', summary)
      home = root.parent if several or (not output and last == 1) else root
      # Steps may be evaluated in any order, and keep what was written of others.
      how = {'first_step': sys.maxsize, 'report_to': reporters}
      with metric_writers.MetricWriter(str(home), **how) as writer:
        writer.write(run.step, scalars)
        for name, lines in samples.items():
          writer.write_samples(run.step, name, lines)
      table = _table([root] if home == root else report_runs.listed(home))
      files.write_text(home / 'metrics.md', table)
      print(table, end='', flush=True)
      log.info('metrics and predictions are in %s', root)

    distributed.primary_alone(root, write)
    if failed:
      raise UsageError(f'{failed[0]}; predictions and other metrics are in {root}')
    return results

  for path in _checkpoints(model_dir, last, steps, follow) if several else [model_dir]:
    try:
      results = measure(path)
    except Exception:
      # Several hosts may not agree on it.
      if not follow or jax.process_count() > 1 or not isinstance(path, str):
        raise
      time.sleep(FOLLOW_SECONDS)  # that a deletion may take
      if epath.Path(path).exists():
        raise
      log.warning('%s was deleted before it was evaluated', path)
  return results


def _table(folders: Sequence[epath.Path]) -> str:
  """Returns Markdown: a line for each metric of a task, a column for each evaluation."""
  folders = sorted(folders, key=lambda one: (len(one.name), one.name))  # steps by number
  every = {one.name: report_runs.read_json(one / 'metrics.json').get('tasks') for one in folders}
  columns = {name: report_runs.as_dict(tasks) for name, tasks in every.items() if tasks}
  tasks = dict.fromkeys(itertools.chain.from_iterable(columns.values()))
  lines = [['task', 'metric', *columns], ['---', '---', *['---:'] * len(columns)]]
  for task in tasks:
    found = [evaluators_lib.shown(tasks.get(task, {})) for tasks in columns.values()]
    for name in dict.fromkeys(itertools.chain.from_iterable(found)):
      lines.append([task, name, *(one.get(name, '') for one in found)])
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _measured(root: epath.Path, settings: Any) -> dict[str, Metrics]:
  """Returns what was measured with these settings before; empty if it was not."""
  found = report_runs.read_json(root / 'metrics.json')
  return report_runs.as_dict(found.get('tasks')) if found.get('settings') == settings else {}


def _checkpoints(model_dir: Any, last: int, steps: Sequence[str], follow: bool) -> Iterator[str]:
  """Yields the folders of a run's steps; followed, also of those to come."""
  [path, *more] = [model_dir] if isinstance(model_dir, str) else model_dir
  root = epath.Path(path) / checkpoints.CHECKPOINTS
  if more or last > 1:
    raise UsageError('evaluate.steps and follow are of one run, and of no mean of checkpoints')
  if wrong := [step for step in steps if not step.isdecimal() and [*steps] != ['all']]:
    raise UsageError(f"evaluate.steps has {wrong[0]!r}; give numbers, or 'all' alone")
  wanted, seen = {int(step) for step in steps if step.isdecimal()}, set[int]()
  there = checkpoints.steps_in(root)
  if not follow and (not there or wanted - {*there}):
    what = f'has checkpoints of the steps {there}, not {sorted(wanted) or "any"}'
    raise UsageError(f'{path} {what}: name others, or wait for them with --follow')

  def next_step() -> int:
    left = {*checkpoints.steps_in(root)} - seen  # training may have deleted some
    return min(left & wanted if wanted else left, default=0)

  with distributed.stop_signal() as stop:
    for look in itertools.count():
      step = distributed.from_primary(next_step)
      if stop.requested(look) or not (step or follow) or (wanted and wanted <= seen):
        return
      if step:
        seen.add(step)
        yield f'{root}/{step}'
      else:
        time.sleep(FOLLOW_SECONDS)
