"""Evaluators: teacher-forced losses, and tasks' own metrics on decoded text.

What the train loop runs at its eval periods and the `eval` program over a
finished run. Metric and postprocess functions are the SeqIO task's;
predictions are kept beside the references, since a number alone explains
nothing.
"""

import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows.dataset_iterator import DatasetIterator
from t5x_lite.data.rows.eval_dataset import EvalDataset
from t5x_lite.data.tasks import catalog
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.decoding import prediction
from t5x_lite.decoding import steps as decoding_steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import model_sharding
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import distributed, partitioning
from t5x_lite.parallel.placement import Placement
from t5x_lite.runs.files import retried
from t5x_lite.training import losses, steps

log = logging.getLogger(__name__)

# Batches and examples of at most this many rows stay in memory between the
# evaluations of a training run; larger sets are read again each time.
CACHED_ROWS = 20_000

Metrics = dict[str, float]


class _Cached:
  """Iterates a source again and again, keeping it if it is small."""

  def __init__(self, make: Callable[[], Iterator[Any]], rows_per_item: int):
    self._make = make
    self._limit = max(1, CACHED_ROWS // rows_per_item)
    self._items: list[Any] | None = None

  def __iter__(self) -> Iterator[Any]:
    if self._items is not None:
      yield from self._items
      return
    items: list[Any] | None = []
    for item in self._make():
      if items is not None:
        items.append(item)
        if len(items) > self._limit:
          items = None
      yield item
    self._items = items


def _data_shard(placement: Placement, batch_size: int) -> tuple[int, int]:
  sharding = partitioning.batch_sharding(placement.mesh)
  return distributed.data_shard(sharding, batch_size)


@dataclasses.dataclass(frozen=True)
class Result:
  """What one evaluator measured.

  Attributes:
    kind: 'eval' for teacher-forced losses, 'infer_eval' for the task's own
      metrics on decoded text: T5X's names.
    task: its name, without the vocabulary's.
    metrics: by name.
    lines: {'input', 'prediction', 'target'} of each decoded example.
    seconds: that it took.
  """

  kind: str
  task: str
  metrics: Metrics
  lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  seconds: float = 0.0


class TeacherForced:
  """Loss, perplexity and accuracy of the next token, over one pass."""

  def __init__(
    self,
    name: str,
    config: DatasetConfig,
    model: T5Config,
    *,
    placement: Placement,
    num_steps: int | None = None,
  ):
    """Compiles and reads nothing yet.

    Args:
      name: to report under.
      config: of a task; read once, the same batches every time. In a file
        that is sorted, the first ones stand for the rest only with `shuffle`.
      model: the architecture.
      placement: where it runs.
      num_steps: batches at most; None for all.
    """
    self.name = name
    self._config = dataclasses.replace(config, num_epochs=1)
    partitioning.check_batch_size(config.batch_size, placement.mesh)
    self._placement = placement
    self._num_steps = num_steps
    self._step = model_sharding.jit_step(
      steps.make_eval_step, model, placement, losses.LossConfig()
    )
    self._batches = _Cached(self._read, config.batch_size)

  def _read(self) -> Iterator[dict[str, np.ndarray]]:
    index, count = _data_shard(self._placement, self._config.batch_size)
    iterator = DatasetIterator(self._config, process_index=index, process_count=count)
    try:
      yield from itertools.islice(iterator, self._num_steps)
    finally:
      iterator.close()

  def run(self, params: Any) -> Result:
    """Returns the metrics of these parameters."""
    start = time.monotonic()
    totals: dict[str, float] = {}
    for batch in self._batches:
      batch = partitioning.global_batch(batch, self._placement.mesh)
      sums = jax.device_get(self._step(params, batch))
      for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + float(value)
    loss = totals['loss'] / max(totals['weight'], 1.0)
    metrics = {
      'loss': loss,
      'perplexity': math.exp(min(loss, 700.0)),
      'accuracy': totals['num_correct'] / max(totals['num_tokens'], 1.0),
      'target_tokens': totals['num_tokens'],
    }
    seconds = time.monotonic() - start
    return Result('eval', self.name, metrics, seconds=seconds)


class Decoded:
  """A task's metrics on what the model writes."""

  def __init__(
    self,
    name: str,
    task: Any,
    config: DatasetConfig,
    predictor: prediction.Predictor,
    *,
    num_examples: int | None = None,
  ):
    """Reads nothing yet.

    Args:
      name: to report under.
      task: the SeqIO task.
      config: for it; `pack`, `shuffle` and `num_epochs` are ignored.
      predictor: decodes; shared between tasks.
      num_examples: the first this many; None for all.
    """
    self.name = name
    self._task = task
    self.predictor = predictor
    self._num_examples = num_examples
    self._length = config.lengths['inputs']
    self.config = dataclasses.replace(config, batch_size=predictor.batch_size)
    index, count = _data_shard(predictor.placement, predictor.batch_size)
    self._dataset = EvalDataset(self.config, process_index=index, process_count=count)
    self._batches = _Cached(lambda: iter(self._dataset), predictor.batch_size)
    self._score = model_sharding.jit_step(
      decoding_steps.make_score_step, predictor.model, predictor.placement
    )

  def run(self, params: Any) -> Result:
    """Returns the metrics of these parameters, and the predictions."""
    start = time.monotonic()
    task = self._task
    vocabulary = task.output_features['targets'].vocabulary
    targets, predictions, scores, lines = [], [], [], []
    left = self._num_examples
    for i, (batch, examples) in enumerate(self._batches):
      if left is not None:
        examples, left = examples[:left], left - len(examples)
      rows = [example['inputs'][: self._length].tolist() for example in examples]
      outputs, _ = self.predictor.predict(params, rows, index=i)
      if task.score_metric_fns:
        scores.extend(self._target_scores(params, batch)[: len(examples)])
      for example, output in zip(examples, outputs, strict=True):
        text = self.predictor.decoding.cut(vocabulary.decode(output))
        target = _text(example, 'targets', vocabulary)
        predictions.append(task.postprocess_fn(text, example=example, is_target=False))
        targets.append(task.postprocess_fn(target, example=example, is_target=True))
        line = {'input': _text(example, 'inputs', vocabulary)}
        lines.append({**line, 'prediction': text, 'target': target})
      if left is not None and left <= 0:
        break
    if not lines:
      raise UsageError(f'the task {self.name} has no examples to evaluate')
    metrics: Metrics = {}
    for metric_fn in task.predict_metric_fns:
      metrics |= _scalars(metric_fn(targets, predictions))
    for metric_fn in task.score_metric_fns:
      metrics |= _scalars(metric_fn(targets, scores))
    seconds = time.monotonic() - start
    return Result('infer_eval', self.name, metrics, lines, seconds)

  def _target_scores(self, params: Any, batch: Any) -> list[float]:
    mesh = self.predictor.placement.mesh
    scores = self._score(params, partitioning.global_batch(batch, mesh))
    return prediction.to_host(scores).tolist()


def _text(example: dict[str, Any], feature: str, vocabulary: Any) -> str:
  """Returns a feature as text: as it was before tokenising, if that is kept."""
  original = example.get(f'{feature}_pretokenized')
  if isinstance(original, bytes):
    return original.decode('utf-8', 'replace')
  if isinstance(original, str):
    return original
  return vocabulary.decode([int(token) for token in example[feature]])


def _scalars(metrics: dict[str, Any]) -> Metrics:
  """Keeps what is a number: SeqIO metrics may also be text or histograms."""
  result = {}
  for name, value in metrics.items():
    value = getattr(value, 'value', value)
    if np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.number):
      result[name] = float(value)
  return result


def _by_task(
  config: DatasetConfig, vocabulary: VocabularyConfig
) -> Iterator[tuple[str, Any, DatasetConfig]]:
  """Yields name, task and config of each task that has the split."""
  provider = catalog.task_provider(config)
  for task in getattr(provider, 'tasks', None) or [provider]:
    if config.split not in task.splits:
      log.warning('%s has no split %r: left out', task.name, config.split)
      continue
    one = dataclasses.replace(config, mixture_or_task_name=task.name)
    yield catalog.short_name(task.name, vocabulary), task, one


class Evaluators:
  """All evaluations of a run: made once, and run on any parameters."""

  def __init__(
    self,
    model: T5Config,
    vocabulary: VocabularyConfig,
    *,
    placement: Placement,
    train_eval: Sequence[DatasetConfig] = (),
    infer_eval: Sequence[DatasetConfig] = (),
    eval_steps: int | None = None,
    infer_eval_examples: int | None = None,
    decoding: DecodingConfig | None = None,
  ):
    """Checks the datasets; compiles and reads nothing yet.

    Args:
      model: the architecture.
      vocabulary: of the tasks.
      placement: where it runs.
      train_eval: data of teacher-forced losses, a mixture's task by task.
      infer_eval: data that is decoded and measured by the tasks' metrics.
      eval_steps: batches of each teacher-forced task; None for all.
      infer_eval_examples: examples of each decoded task; None for all.
      decoding: greedy, as long as the targets, by default.
    """
    # A mixture task by task, as T5X does: one number for all of them would be
    # that of whichever comes first within eval_steps.
    self._forced = [
      TeacherForced(name, one, model, placement=placement, num_steps=eval_steps)
      for config in train_eval
      for name, _, one in _by_task(config, vocabulary)
    ]
    self._decoded = []
    for config in infer_eval:
      encode = vocabularies.make_vocabulary(vocabulary).encode
      chosen = (decoding or DecodingConfig()).resolved(encode, config.lengths['targets'])
      predictor = prediction.Predictor(
        model,
        placement=placement,
        decoding=chosen,
        batch_size=config.batch_size,
        max_input_length=config.lengths['inputs'],
        scored=False,
      )
      self._decoded += [
        Decoded(name, task, one, predictor, num_examples=infer_eval_examples)
        for name, task, one in _by_task(config, vocabulary)
      ]
    check_distinct([one.name for one in self._forced])
    check_distinct([one.name for one in self._decoded])

  @property
  def names(self) -> list[str]:
    """Names of the tasks that are decoded."""
    return [one.name for one in self._decoded]

  def results(self, params: Any) -> Iterator[Result]:
    """Runs one evaluation after the other."""
    evaluators: list[TeacherForced | Decoded] = [*self._forced, *self._decoded]
    for evaluator in evaluators:
      result = evaluator.run(params)
      log.info(
        '%s/%s: %s (%.1f s)',
        result.kind,
        result.task,
        format_metrics(result.metrics),
        result.seconds,
      )
      yield result

  def run(
    self,
    params: Any,
    step: int,
    model_dir: str,
    show: Callable[[str, list[dict[str, Any]]], None] | None = None,
  ) -> Metrics:
    """Returns 'eval/TASK/...' and 'infer_eval/TASK/...' of a training step.

    Predictions go to MODEL_DIR/infer_eval/TASK/STEP.jsonl, and to `show`.
    """
    log.info('step %d: evaluation', step)
    metrics: Metrics = {}
    for result in self.results(params):
      prefix = f'{result.kind}/{result.task}'
      metrics |= {f'{prefix}/{k}': v for k, v in result.metrics.items()}
      if result.lines and distributed.is_primary():
        path = epath.Path(model_dir) / prefix / f'{step}.jsonl'
        write_lines(path, result.lines)
        if show is not None:
          show(prefix, result.lines)
    return metrics


def check_distinct(names: Sequence[str]) -> None:
  """Raises UsageError if two datasets would report under one name."""
  for name in names:
    if names.count(name) > 1:
      raise UsageError(f'the task {name} is to be evaluated twice: name each task once')


def format_metrics(metrics: Metrics) -> str:
  """Returns metrics as 'name value' pairs on one line."""
  return ', '.join(f'{name} {value:.5g}' for name, value in metrics.items())


def write_lines(path: epath.Path, lines: Sequence[dict[str, Any]]) -> None:
  """Writes JSON lines, and the directory if it is missing."""
  retried(path, lambda: path.parent.mkdir(parents=True, exist_ok=True))
  text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
  retried(path, path.write_text, text)
