"""The eval program: a trained run on tasks, by their own metrics.

See evaluators.py for what is measured and how.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence

import jax
from etils import epath

from t5x_lite.data.config import DatasetConfig
from t5x_lite.decoding import prediction
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators as evaluators_lib
from t5x_lite.evaluation.evaluators import Metrics
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import start_checks
from t5x_lite.runs import checkpoints, run_directory
from t5x_lite.training import losses

log = logging.getLogger(__name__)


def evaluate(
  *,
  model_dir: str,
  datasets: Sequence[DatasetConfig],
  output: str = '',
  mesh: MeshConfig | None = None,
  decoding: DecodingConfig | None = None,
  num_examples: int | None = None,
  teacher_forced: bool = True,
) -> dict[str, Metrics]:
  """Evaluates a run's newest checkpoint, or the given one, on tasks.

  Args:
    model_dir: a run directory, or one STEP directory of its checkpoints.
    datasets: tasks or mixtures, their splits and lengths.
    output: directory for metrics.json and TASK.jsonl (input, prediction and
      target of each example); by default MODEL_DIR/eval/STEP.
    mesh: how devices are arranged; decided by their number by default.
    decoding: how to decode; greedy, as long as the targets, by default.
    num_examples: of each task, the first this many; None for all.
    teacher_forced: also measure loss and token accuracy.

  Returns:
    Metrics by task.

  Raises:
    UsageError: if there is no run, or a dataset does not fit it.
  """
  if not datasets:
    raise UsageError('evaluate.datasets is empty: name at least one task')
  run = run_directory.load_run(model_dir)
  device_mesh, rules = prediction.mesh_and_rules(run.model, mesh)
  evaluators: list[
    tuple[evaluators_lib.Decoded, evaluators_lib.TeacherForced | None]
  ] = []
  for config in datasets:
    config = start_checks.resolve_dataset(config, run.model, run.vocabulary)
    predictor = evaluators_lib.make_predictor(
      run.model, config, mesh=device_mesh, rules=rules, decoding=decoding
    )
    num_steps = None
    if num_examples is not None:
      num_steps = -(-num_examples // predictor.batch_size)
    for decoded in evaluators_lib.decoded_evaluators(
      config, run.vocabulary, predictor, num_examples=num_examples
    ):
      forced = None
      if teacher_forced:
        forced = evaluators_lib.TeacherForced(
          decoded.name,
          dataclasses.replace(decoded.config, shuffle=False),
          run.model,
          mesh=device_mesh,
          rules=rules,
          loss=losses.LossConfig(),
          num_steps=num_steps,
        )
      evaluators.append((decoded, forced))
  evaluators_lib.check_distinct([decoded.name for decoded, _ in evaluators])
  predictor = evaluators[0][0].predictor
  params = checkpoints.load_params(run.checkpoint, predictor.abstract_params)

  root = epath.Path(
    output or epath.Path(run.directory) / 'eval' / str(run.step)
  )
  results: dict[str, Metrics] = {}
  for decoded, forced in evaluators:
    start = time.monotonic()
    result = decoded.run(params)
    metrics = dict(result.metrics)
    if forced is not None:
      metrics |= {
        f'teacher_forced/{k}': v for k, v in forced.run(params).items()
      }
    metrics['examples'] = float(len(result.lines))
    results[decoded.name] = metrics
    log.info(
      '%s: %s (%.1f s)',
      decoded.name,
      evaluators_lib.format_metrics(metrics),
      time.monotonic() - start,
    )
    if jax.process_index() == 0:
      evaluators_lib.write_lines(root / f'{decoded.name}.jsonl', result.lines)
  if jax.process_index() == 0:
    summary = {'checkpoint': run.checkpoint, 'step': run.step, 'tasks': results}
    (root / 'metrics.json').write_text(json.dumps(summary, indent=2) + '\n')
    log.info('metrics and predictions are in %s', root)
  return results
