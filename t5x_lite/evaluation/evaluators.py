"""Evaluators: teacher-forced losses, and tasks' own metrics on decoded text.

What the train loop runs at its eval periods and the `eval` program over a finished run. Metric and
postprocess functions are the SeqIO task's; predictions are kept, since a number explains nothing.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from t5x_lite.data import benchmark_metrics, vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows.dataset_iterator import DatasetIterator
from t5x_lite.data.rows.eval_dataset import EvalDataset
from t5x_lite.data.tasks import catalog
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.decoding import prediction
from t5x_lite.decoding import steps as decoding_steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.continuous import WINDOW, RowDecoder
from t5x_lite.errors import UsageError, first_line
from t5x_lite.evaluation import bootstrap
from t5x_lite.models import model_sharding
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import distributed, partitioning
from t5x_lite.parallel.placement import Placement
from t5x_lite.runs.files import retried
from t5x_lite.training import losses, steps

log = logging.getLogger(__name__)

# What has at most this many rows stays in memory between the evaluations of a training run.
CACHED_ROWS = 20_000

Metrics = dict[str, float]
Lines = list[dict[str, Any]]


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
    items: list[Any] = []
    for item in self._make():
      if len(items) <= self._limit:
        items.append(item)
      yield item
    if len(items) <= self._limit:
      self._items = items


def _shard(placement: Placement, batch_size: int) -> dict[str, int]:
  """Returns which rows of a batch this process loads, as the data sets' arguments."""
  sharding = partitioning.batch_sharding(placement.mesh)
  index, count = distributed.data_shard(sharding, batch_size)
  return {'process_index': index, 'process_count': count}


@dataclasses.dataclass(frozen=True)
class Result:
  """What one evaluator measured."""

  # 'eval' for teacher-forced losses, 'infer_eval' for the task's own metrics: T5X's names.
  kind: str
  task: str  # its name, without the vocabulary's
  metrics: Metrics
  # {'input', 'prediction', 'target', 'score'} of each decoded example.
  lines: Lines = dataclasses.field(default_factory=list)
  failed: Sequence[str] = ()  # a line for each metric function that raised


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

    `config` is read once, `num_steps` batches at most, the same ones every time. In a file that is
    sorted, the first ones stand for the rest only with `shuffle`.
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
    shard = _shard(self._placement, self._config.batch_size)
    with contextlib.closing(DatasetIterator(self._config, **shard)) as iterator:
      yield from itertools.islice(iterator, self._num_steps)

  def run(self, params: Any) -> Result:
    """Returns the metrics of these parameters."""
    totals: dict[str, float] = {}
    for batch in self._batches:
      batch = partitioning.global_batch(batch, self._placement.mesh)
      for name, value in jax.device_get(self._step(params, batch)).items():
        totals[name] = totals.get(name, 0.0) + float(value)
    if not totals:
      raise UsageError(f'the task {self.name} has no batch: drop_remainder leaves out the only one')
    loss = totals['loss'] / (totals['weight'] or 1.0)
    metrics = {
      'loss': loss,
      'perplexity': math.exp(min(loss, 700.0)),
      'accuracy': totals['num_correct'] / max(totals['num_tokens'], 1.0),
      'target_tokens': totals['num_tokens'],
    }
    return Result('eval', self.name, metrics)


class Decoded:
  """A task's metrics on what the model writes."""

  def __init__(
    self,
    name: str,
    task: Any,
    config: DatasetConfig,
    decode: RowDecoder,
    *,
    num_examples: int | None = None,
    metric_fns: Sequence[Callable[..., Any]] = (),
    num_bootstrap: int = 0,
  ):
    """Reads nothing yet.

    Of `config`, the task's, `pack`, `shuffle` and `num_epochs` are ignored. Tasks may share a
    decoder. `num_examples` are the first ones; None is all. The rest is of `Evaluators`.
    """
    self.name = name
    self._task = task
    # SeqIO puts an object for each of metric_fns behind the task's own.
    self._objects = task.metric_objs[: len(task.metric_objs) - len(task.metric_fns)]
    self._is_scored = _takes(task, 'SCORE')
    self._metric_fns, self._num_bootstrap = metric_fns, num_bootstrap
    self._decode = decode
    predictor = self.predictor = decode.predictor
    self._num_examples = num_examples
    self._length = config.lengths['inputs']
    self.config = dataclasses.replace(config, batch_size=predictor.batch_size)
    shard = _shard(predictor.placement, predictor.batch_size)
    self._batches = _Cached(EvalDataset(self.config, **shard).__iter__, predictor.batch_size)
    self._score = model_sharding.jit_step(
      decoding_steps.make_score_step, predictor.model, predictor.placement
    )

  def run(self, params: Any) -> Result:
    """Returns the metrics of these parameters, and the predictions."""
    task = self._task
    vocabulary = task.output_features['targets'].vocabulary
    targets, predictions, scores, lines = [], [], [], []
    kept, ids, own_scores = [], [], []  # examples, and outputs as ids with their scores
    length, pad_id = self.predictor.decoding.length, self.predictor.model.pad_id
    left = sys.maxsize if self._num_examples is None else self._num_examples
    batches, size = iter(self._batches), self.config.batch_size
    while window := [*itertools.islice(batches, min(WINDOW, -(-left // size)))]:
      found = []
      for batch, examples in window:
        examples = examples[: max(left - len(found), 0)]
        found += examples
        if self._is_scored and examples:
          on_mesh = partitioning.global_batch(batch, self.predictor.placement.mesh)
          scores += prediction.to_host(self._score(params, on_mesh)).tolist()[: len(examples)]
      left -= len(found)
      rows = [example['inputs'][: self._length].tolist() for example in found]
      seeds = range(len(lines), len(lines) + len(rows))
      outputs = dict(self._decode(params, rows, seeds=seeds))
      for i, example in enumerate(found):
        best = outputs[i][0]
        text = self.predictor.decoding.cut(vocabulary.decode(best.tokens))
        own_scores.append(best.score)
        if self._objects:
          kept.append(example)
          row = [*best.tokens, self.predictor.model.eos_id]
          ids.append((row + [pad_id] * length)[:length])
        target = text_of(example, 'targets', vocabulary)
        predictions.append(task.postprocess_fn(text, example=example, is_target=False))
        targets.append(task.postprocess_fn(target, example=example, is_target=True))
        source = text_of(example, 'inputs', vocabulary)
        lines.append({'input': source, 'prediction': text, 'target': target, 'score': best.score})
        if len(outputs[i]) > 1:
          texts = [self.predictor.decoding.cut(vocabulary.decode(x.tokens)) for x in outputs[i]]
          pairs = zip(texts, outputs[i], strict=True)
          lines[-1]['n_best'] = [{'prediction': x, 'score': one.score} for x, one in pairs]
    if not lines:
      raise UsageError(f'the task {self.name} has no examples to evaluate')
    inputs = [line['input'] for line in lines]
    measured: list[Any] = [(fn, (targets, predictions)) for fn in task.predict_metric_fns]
    measured += [(fn, (targets, scores)) for fn in task.score_metric_fns]
    aux = targets, predictions, own_scores
    measured += [(_with_aux(fn), aux) for fn in task.predict_with_aux_metric_fns]
    measured += [(fn, (targets, predictions, inputs)) for fn in self._metric_fns]
    given = {'PREDICTION': [ids], 'SCORE': [scores], 'PREDICTION_WITH_AUX': [ids, own_scores]}
    for metric in self._objects:
      columns = kept, *given.get(metric.model_output_type.name, ())
      measured.append((_with_object(metric, task.output_features), columns))
    metrics: Metrics = {}
    failed = []
    # Groups would have to be drawn whole.
    num_bootstrap = 0 if benchmark_metrics.in_groups(targets[0]) else self._num_bootstrap
    for fn, columns in measured:
      try:
        metrics |= bootstrap.measured(
          lambda *drawn, fn=fn: _scalars(fn(*drawn)), columns, num_bootstrap
        )
      except Exception as error:  # a user's code; predictions and other metrics are worth keeping
        name, kind = getattr(fn, '__name__', fn), type(error).__name__
        failed.append(f'{self.name}: the metric {name} raised {kind}: {first_line(error)}')
        log.error('%s', failed[-1], exc_info=True)
    return Result('infer_eval', self.name, metrics, lines, failed)


def text_of(example: dict[str, Any], feature: str, vocabulary: Any) -> str:
  """Returns a feature as text: as it was before tokenising, if that is kept."""
  original = example.get(f'{feature}_pretokenized')
  if isinstance(original, str | bytes):
    return original if isinstance(original, str) else original.decode('utf-8', 'replace')
  return vocabulary.decode([int(token) for token in example[feature]])


def _takes(task: Any, kind: str) -> bool:
  """True if a metric needs outputs of this seqio.metrics.ModelOutputType."""
  return any(metric.model_output_type.name == kind for metric in task.metric_objs)


def _with_aux(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns fn(targets, predictions, scores of the outputs), of a metric of T5X's aux_values."""

  @functools.wraps(fn)
  def call(targets, predictions, scores):
    return fn(targets, predictions, {'scores': scores})

  return call


def _with_object(metric: Any, features: Any) -> Callable[..., Any]:
  """Returns fn(examples, outputs[, scores]) that does with a metric what seqio.Evaluator does."""

  def call(examples, *outputs):
    if not outputs:
      raise UsageError(f'outputs of {metric.model_output_type.name} are not computed')
    first, *aux = map(np.asarray, outputs)
    output = (first, {'scores': aux[0]}) if aux else first
    # A LegacyMetric keeps the first targets that it sees.
    one = copy.deepcopy(metric).from_model_output(examples, output, features)
    if hasattr(one, 'actual_compute'):  # of seqio.metrics.CollectingMetric
      return one.actual_compute(examples, features)[0]
    return one.compute()

  call.__name__ = type(metric).__name__
  return call


def _scalars(metrics: dict[str, Any]) -> Metrics:
  """Keeps what is a number: SeqIO metrics may also be text or histograms."""
  values = {name: getattr(value, 'value', value) for name, value in metrics.items()}
  return {
    name: float(value)
    for name, value in values.items()
    if np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.number)
  }


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
    continuous: bool = False,
    **more: Any,
  ):
    """Checks the datasets; compiles and reads nothing yet.

    train_eval is data of teacher-forced losses, eval_steps batches of each task; infer_eval is
    decoded (greedily, as long as the targets, by default) and measured by the tasks' metrics, on
    infer_eval_examples of each; None is all; `continuous` is of `RowDecoder`. More are metric_fns,
    of (targets, predictions, inputs), beside the tasks' own, and num_bootstrap, sets of examples
    that intervals of a decoded task's metrics are measured on.
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
      if 'inputs' not in config.lengths:
        what = f'infer_eval has {config.mixture_or_task_name} without the length of inputs'
        raise UsageError(f'{what}: there is nothing to decode from')
      tasks = [*_by_task(config, vocabulary)]
      own = vocabularies.make_vocabulary(vocabulary)
      chosen = (decoding or DecodingConfig()).resolved(own, config.lengths['targets'])
      predictor = prediction.Predictor(
        model.replace(bidirectional_prefix=config.feature_converter == 'prefix_lm'),
        placement=placement,
        decoding=chosen,
        batch_size=config.batch_size,
        max_input_length=config.lengths['inputs'],
      )
      decode = RowDecoder(predictor, continuous=continuous)
      self._decoded += [
        Decoded(name, task, one, decode, num_examples=infer_eval_examples, **more)
        for name, task, one in tasks
      ]
    check_distinct([one.name for one in self._forced])
    check_distinct([one.name for one in self._decoded])

  @property
  def names(self) -> list[str]:
    """Names of the tasks, those that are decoded if any are."""
    return [one.name for one in self._decoded or self._forced]

  def results(self, params: Any) -> Iterator[Result]:
    """Runs one evaluation after the other."""
    for evaluator in (*self._forced, *self._decoded):
      start = time.monotonic()
      result = evaluator.run(params)
      text = format_metrics(result.metrics)
      seconds = time.monotonic() - start
      log.info('%s/%s: %s (%.1f s)', result.kind, result.task, text, seconds)
      yield result

  def run(
    self, params: Any, step: int, model_dir: str, show: Callable[[str, Lines], None] | None = None
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
        write_lines(epath.Path(model_dir) / prefix / f'{step}.jsonl', result.lines)
        if show is not None:
          show(prefix, result.lines)
    return metrics


def check_distinct(names: Sequence[str]) -> None:
  """Raises UsageError if two datasets would report under one name."""
  for name in names:
    if names.count(name) > 1:
      raise UsageError(f'the task {name} is to be evaluated twice: name each task once')


def shown(metrics: Metrics) -> dict[str, str]:
  """Returns metrics as texts, 'value [low, high]'."""
  texts = {name: f'{value:.5g}' for name, value in metrics.items()}
  for name in metrics:
    if f'{name}_low' in texts and f'{name}_high' in texts:
      texts[name] += f' [{texts.pop(f"{name}_low")}, {texts.pop(f"{name}_high")}]'
  return texts


def format_metrics(metrics: Metrics) -> str:
  """Returns metrics as 'name value [low, high]' on one line."""
  return ', '.join(f'{name} {text}' for name, text in shown(metrics).items())


def write_lines(path: epath.Path, lines: Sequence[dict[str, Any]]) -> None:
  """Writes JSON lines, and the directory if it is missing."""
  retried(path, lambda: path.parent.mkdir(parents=True, exist_ok=True))
  text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
  retried(path, path.write_text, text)
