"""The eval program: a trained run on tasks, by their own metrics; see evaluators.py."""

import dataclasses
import logging
from collections.abc import Sequence

from etils import epath

from t5x_lite.data.config import DatasetConfig
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators as evaluators_lib
from t5x_lite.evaluation.evaluators import Metrics
from t5x_lite.interop import trained_model
from t5x_lite.models import model_sharding
from t5x_lite.parallel import distributed
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import start_checks
from t5x_lite.runs import files

log = logging.getLogger(__name__)


def evaluate(
  *,
  model_dir: str | Sequence[str],
  datasets: Sequence[DatasetConfig],
  output: str = '',
  last: int = 1,
  param_dtype: str = '',
  mesh: MeshConfig | None = None,
  decoding: DecodingConfig | None = None,
  num_examples: int | None = None,
  teacher_forced: bool = True,
) -> dict[str, Metrics]:
  """Evaluates a run's newest checkpoint, or the given one, on tasks.

  Args:
    model_dir: a run directory or one STEP directory of its checkpoints, a folder of transformers or
      T5X, or NAME@REVISION of the hub; several decode together, by their mean log-probability.
    datasets: tasks or mixtures, their splits and lengths.
    output: directory for metrics.json and TASK.jsonl (input, prediction and target of each
      example); by default MODEL_DIR/eval/STEP of a run; what is no run, or several, needs it.
    last: evaluate the mean of this many of the newest checkpoints.
    param_dtype: to keep parameters in: 'bfloat16' takes half of float32's memory, 'int8' a fourth;
      the checkpoint's own by default.
    mesh: how devices are arranged; decided by their number by default.
    decoding: how to decode; greedy, as long as the targets, by default.
    num_examples: of each task, the first this many; None for all.
    teacher_forced: also measure loss and token accuracy, of a single model.

  Returns:
    Metrics by task.

  Raises:
    UsageError: if there is no run, or a dataset does not fit it.
  """
  for name, count in (('num_examples', num_examples), ('last', last)):
    start_checks.check_positive(f'evaluate.{name}', count)
  if not datasets:
    raise UsageError('evaluate.datasets is empty: name at least one task')
  models = trained_model.open_together(model_dir, last, param_dtype=param_dtype)
  run = models[0]
  if not output:
    if run.format != 't5x_lite' or len(models) > 1:
      why = f'{model_dir} is no run to write into: name a directory with --output'
      raise UsageError(f'evaluate.output is empty, and {why}')
    output = f'{run.directory}/eval/{run.step}' + (f'-mean-of-{last}' if last > 1 else '')
  start_checks.check_writable(output)
  root = epath.Path(output)
  placement = model_sharding.place_model(run.config, mesh)
  evaluators = []
  for config in datasets:
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
    )
    evaluators.append(one)
  evaluators_lib.check_distinct([n for one in evaluators for n in one.names])
  specs = model_sharding.inference_params(run.config, placement)
  params = trained_model.load_together(models, specs)
  results: dict[str, Metrics] = {}
  for one in evaluators:
    for result in one.results(params):
      metrics = results.setdefault(result.task, {})
      if result.kind == 'eval':
        metrics |= {f'eval/{k}': v for k, v in result.metrics.items()}
        continue
      metrics |= result.metrics
      metrics['examples'] = float(len(result.lines))
      if distributed.is_primary():
        evaluators_lib.write_lines(root / f'{result.task}.jsonl', result.lines)
  if distributed.is_primary():
    checkpoint = ', '.join(one.checkpoint for one in models)
    summary = {'checkpoint': checkpoint, 'step': run.step, 'tasks': results}
    files.write_json(root / 'metrics.json', summary)
    log.info('metrics and predictions are in %s', root)
  return results
