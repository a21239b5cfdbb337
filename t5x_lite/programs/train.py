"""The train loop, from configuration to the last checkpoint, in one function.

At the top of the loop `step` updates have been made; what is evaluated and saved is that state.
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from t5x_lite.compiler import compilation_cache, flops, profiling, step_programs
from t5x_lite.data.config import DatasetConfig, batch_spec
from t5x_lite.data.rows.dataset_iterator import DatasetIterator
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators
from t5x_lite.interop import trained_model, zarr
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import distributed, hardware, partitioning
from t5x_lite.programs import start_checks
from t5x_lite.runs import checkpoints, lease, memory_report, metric_writers, run_directory
from t5x_lite.runs.progress import Progress, Window
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optimizers import OptimizerConfig
from t5x_lite.training.steps import GROUP_HISTOGRAM, GROUP_NORM
from t5x_lite.training.train_state import TrainState

log = logging.getLogger(__name__)

_COUNTS = ('total_steps', 'eval_period', 'stats_period', 'eval_steps', 'infer_eval_examples')
_COUNTS += ('patience', 'histogram_period', 'profile_steps')
_OF_THE_STEP = ('optimizer', 'loss', 'mesh', 'total_steps', 'num_microbatches')
_NOT_RECORDED = ('model_changes', 'dry_run', 'dry_run_file', 'summarize_config_fn')


class NonFiniteError(RuntimeError):
  """The loss, the gradient or the parameters became NaN or infinite."""

  exit_code = 4


def train(
  *,
  dataset: DatasetConfig,
  optimizer: OptimizerConfig,
  model_dir: str,
  total_steps: int,
  model: T5Config | None = None,
  model_changes: Mapping[str, Any] | None = None,
  vocabulary: VocabularyConfig | None = None,
  loss: LossConfig | None = None,
  mesh: partitioning.MeshConfig | None = None,
  checkpoint: checkpoints.CheckpointConfig | None = None,
  train_eval: Sequence[DatasetConfig] = (),
  infer_eval: Sequence[DatasetConfig] = (),
  eval_period: int = 1000,
  eval_steps: int | None = 20,
  infer_eval_examples: int | None = None,
  decoding: DecodingConfig | None = None,
  stats_period: int = 100,
  num_microbatches: int = 1,
  patience: int | None = None,
  max_skipped_updates: int = 0,
  report_to: str | Sequence[str] = 'tensorboard',
  histogram_period: int | None = None,
  profile_steps: int | None = None,
  seed: int = 0,
  dry_run: bool = False,
  dry_run_file: str = '',
  summarize_config_fn: Callable[[str], None] | None = None,
) -> TrainState | None:
  """Trains a model and returns its last state.

  Continues the run in `model_dir`, if there is one. SIGTERM ends it at the next step, saved.
  UsageError if the configuration cannot work, and nothing is written then; NonFiniteError if it
  diverges: the last good checkpoint stays; LostProcessError if another process of the run died.

  Args:
    dataset: the training data; its batch size is global.
    optimizer: and its learning-rate schedule.
    model_dir: the run directory.
    total_steps: updates in all, those of earlier starts of the run included.
    model: the architecture; that of the checkpoint it starts from by default.
    model_changes: fields of T5Config that differ from it.
    vocabulary: must be the tasks' own; the checkpoint's by default.
    loss: what is minimised.
    mesh: how devices are arranged; decided by their number by default.
    checkpoint: when to save, what to keep, where a new run starts from.
    train_eval: teacher-forced evaluations, a mixture's task by task: 'eval/TASK/loss' and others.
    infer_eval: evaluations of decoded text by the tasks' own metrics: 'infer_eval/TASK/METRIC'.
    eval_period: steps between evaluations; the last step is evaluated too.
    eval_steps: batches of each teacher-forced task; None for all.
    infer_eval_examples: examples of each decoded task; None for all.
    decoding: of infer_eval; greedy, as long as the targets, by default.
    stats_period: steps that a line of training metrics averages over.
    num_microbatches: parts that a batch is cut into to save memory.
    patience: evaluations without a better checkpoint.best_metric that end training; None for none.
    max_skipped_updates: updates in a row left out for a gradient that is not finite; 0 for none.
    report_to: tensorboard, wandb or both, beside metrics.jsonl; or none.
    histogram_period: steps between histograms of the gradient, by group; None for none.
    profile_steps: steps to trace into model_dir/profile, with a table of times; None for none.
    seed: of parameters and dropout; the data has its own.
    dry_run: print parameters, mesh and memory, begin nothing and return None.
    dry_run_file: where a dry run writes the configuration, and how every array is cut.
    summarize_config_fn: writes the resolved configuration into model_dir.
  """
  loss, mesh = loss or LossConfig(), mesh or partitioning.MeshConfig()
  checkpoint = checkpoint or checkpoints.CheckpointConfig()
  given = dict(locals())

  # ---- What must fit together ----
  for name in _COUNTS:
    start_checks.check_positive(f'train.{name}', given[name])
  if patience is not None and not checkpoint.best_metric:
    raise UsageError(f'train.patience is {patience}; it needs CheckpointConfig.best_metric')
  reporters = metric_writers.reporters(report_to) if distributed.is_primary() else ()
  if distributed.is_primary() and histogram_period and not reporters:
    raise UsageError(f'train.histogram_period is {histogram_period}; it needs report_to')
  path = checkpoint.restore_path
  model, vocabulary = start_checks.resolve_model(
    model, vocabulary, model_changes or {}, model_dir=model_dir, restore_path=path
  )
  trained_model.check_vocabulary(model, vocabulary)
  wanted = (dataset, *train_eval, *infer_eval)
  dataset, *evals = [start_checks.resolve_dataset(one, model, vocabulary) for one in wanted]
  model = model.replace(bidirectional_prefix=dataset.feature_converter == 'prefix_lm')
  record = {name: value for name, value in given.items() if name not in _NOT_RECORDED}
  record |= {'model': model, 'vocabulary': vocabulary}
  train_eval, infer_eval = evals[: len(train_eval)], evals[len(train_eval) :]
  start_checks.check_model_dir(model_dir, model, vocabulary)
  if not dry_run:
    start_checks.check_writable(model_dir)
  new = None
  if not checkpoints.has_checkpoint(model_dir):
    new = trained_model.open_start(checkpoint, model, vocabulary, seed=seed)

  # ---- The step, its mesh and abstract state: nothing is allocated yet ----
  make_program = functools.partial(
    step_programs.train_program,
    model=model,
    batch=batch_spec(dataset),
    skip_nonfinite=max_skipped_updates > 0,
    task_names=start_checks.task_names(dataset, vocabulary),
    **{name: given[name] for name in _OF_THE_STEP},
  )
  program = make_program()
  device_mesh, spec, tx = program.mesh, program.spec, program.tx
  assert spec is not None and tx is not None

  # ---- Compile the step ahead of time; report memory ----
  everywhere = partitioning.replicated(device_mesh)
  key = jax.jit(lambda: jax.random.key(seed), out_shardings=everywhere)()
  sharding = partitioning.batch_sharding(device_mesh)
  _, batch_shapes, _ = program.arguments

  def compile_step(program: step_programs.StepProgram) -> jax.stages.Compiled:
    began = time.monotonic()
    compiled = program.lower().compile()
    log.info('compiled in %.1f s', time.monotonic() - began)
    return compiled

  log.info('%s', memory_report.parameter_summary(spec.shapes.params))
  shapes = {name: x.shape for name, x in batch_shapes.items()}
  platform = device_mesh.devices.flat[0].platform
  attention = memory_report.attention_summary(model, shapes, platform)
  facts = {'cost': flops.summary(model, batch_shapes), 'attention': attention}
  for name, fact in facts.items():
    log.info('%s: %s', name, fact)
  start_checks.log_rates(dataset)
  if dry_run:
    compiled = compile_step(program)
    memory_report.print_dry_run(record, spec, device_mesh, compiled, facts, file=dry_run_file)
    return None

  # ---- Input pipeline and evaluators: they check their tasks ----
  shard, num_shards = distributed.data_shard(sharding, dataset.batch_size)
  iterator = DatasetIterator(dataset, process_index=shard, process_count=num_shards)
  evaluation = evaluators.Evaluators(
    model,
    vocabulary,
    placement=program.placement,
    train_eval=train_eval,
    infer_eval=infer_eval,
    **{name: given[name] for name in ('eval_steps', 'infer_eval_examples', 'decoding')},
  )
  cuts = start_checks.warn_of_cuts(dataset, vocabulary)

  with contextlib.ExitStack() as stack:
    stack.callback(iterator.close)
    # ---- Run directory: nothing is written before this line ----
    primary, held = distributed.is_primary(), None
    if primary:
      held = stack.enter_context(lease.lock(model_dir))
    distributed.barrier('run directory')
    compilation_cache.keep_compiled_programs()
    checkpointer = stack.enter_context(checkpoints.Checkpointer(model_dir, checkpoint))

    # ---- Start: 1. own checkpoint  2. checkpoint.restore_path  3. scratch ----
    meta: dict[str, Any] = {}
    if checkpointer.latest_step is not None:
      state, meta = checkpointer.restore(spec.shapes, iterator, verify=zarr.verify)
      if meta.get('seed', seed) != seed:
        log.warning('the seed is %d, it was %d before', seed, meta['seed'])
      log.info('continues %s from step %d', model_dir, int(state.step))
    else:
      assert new is not None
      state = new(tx, spec, key)
    if primary:  # now that nothing refuses to be continued, whose record this replaces
      texts = {memory_report.SHARDING_FILE: memory_report.sharding_table(spec)}
      kept = {'model': model, 'vocabulary': vocabulary, 'lengths': dataset.lengths}
      run_directory.write_run(model_dir, config=record, texts=texts, **kept)
      if summarize_config_fn is not None:
        summarize_config_fn(model_dir)
    distributed.barrier('record')
    evaluated, found = meta.get('evaluated', -1), {}
    best: dict[str, Any] = {'best': None, 'evaluations_since_best': 0}
    best |= {name: meta[name] for name in best if name in meta}
    bound = math.inf if patience is None else patience
    step = first_step = int(state.step)
    # A stop at the last step may have left its evaluation to this start.
    done = first_step >= total_steps and evaluated >= first_step
    if done or best['evaluations_since_best'] >= bound:
      log.info('already at step %d of %d: done', first_step, total_steps)
      return state
    iterator.start()
    train_step = histogram_step = compile_step(program)
    if histogram_period:
      histogram_step = compile_step(make_program(histograms=True))
    log.info('%s', memory_report.compiled_memory(train_step))

    # ---- Writers ----
    start: dict[str, Any] = {'first_step': first_step, 'active': primary}
    config = run_directory.to_json(record)
    writer = metric_writers.MetricWriter(model_dir, report_to=reporters, config=config, **start)
    stack.enter_context(writer)
    steps = {'first_step': first_step, 'last_step': total_steps}
    traced = profile_steps if primary else None
    profiler = profiling.StepProfiler(model_dir, num_steps=traced, **steps)
    stack.callback(profiler.stop)
    if checkpointer.damaged:
      writer.write(first_step, {'damaged_checkpoints': float(len(checkpointer.damaged))})
    progress = stack.enter_context(Progress(total_steps=total_steps, **start))
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    peak = peak and peak * jax.device_count()
    cost = flops.batch_train_flops(model, batch_shapes)
    window = Window(batch_shapes=shapes, step_flops=cost, peak_flops=peak)
    skipped_in_a_row = 0

    def collect(pending: tuple[int, Any] | None) -> None:
      """Fetches a step's metrics, one step late; stops if it diverged."""
      nonlocal skipped_in_a_row
      if pending is None:
        return
      at, metrics = pending
      metrics = jax.device_get(metrics)
      counts = {name: metrics.pop(name) for name in [*metrics] if name.startswith(GROUP_HISTOGRAM)}
      writer.write_histograms(at, counts)
      metrics = {k: float(v) for k, v in metrics.items()}
      bad = [name for name, x in metrics.items() if not math.isfinite(x)]
      if bad:
        groups = [name.removeprefix(GROUP_NORM) for name in bad if name.startswith(GROUP_NORM)]
        culprit = f', first in {groups[0]}' if groups else ''
        what = f'{bad[0]} is {metrics[bad[0]]} at step {at}{culprit}'
        skipped_in_a_row += 1
        if skipped_in_a_row > max_skipped_updates:
          writer.write(at, metrics)
          checkpointer.wait()
          kept, latest = 'There is no checkpoint yet.', checkpointer.latest_step
          if latest is not None:
            kept = f'The last checkpoint is of step {latest}.'
          raise NonFiniteError(
            f'{what}: stopped. {kept} Try a lower learning rate, OptimizerConfig.global_norm_clip '
            'or another data seed.'
          )
        log.warning('%s: the update is left out', what)
        window.skip()
      else:
        skipped_in_a_row = 0
        metrics.pop('skipped', None)
        window.add(metrics)
      if at % stats_period == 0:
        report(at)

    def report(at: int) -> None:
      """Writes the means of the window that ends at this step."""
      if window.num_steps:
        metrics = {**window.summary(), **cuts}
        cuts.clear()  # once is enough
        writer.write(at, metrics)
        progress.update(at, metrics)

    def evaluate_and_save(*, last: bool = False, hurry: bool = False) -> None:
      """Does what is due at this step, before its update."""
      nonlocal evaluated, found
      began = time.monotonic()
      metrics = found if step == evaluated else {}
      if held is not None:
        held.check()
      due = not hurry and (last or step % eval_period == 0)
      if due and step > max(evaluated, 0):
        show = functools.partial(writer.write_samples, step)
        metrics = found = evaluation.run(state.params, step, model_dir, show=show)
        writer.write(step, metrics)
        count_evaluation(best, metrics.get(checkpoint.best_metric), checkpoint.best_mode)
        evaluated = step
      if last or checkpointer.should_save(step) or step == checkpointer.latest_step:
        meta = {'seed': seed, 'evaluated': evaluated, **best}
        checkpointer.save(step, state, iterator, metrics=metrics, meta=meta)
      window.pause(time.monotonic() - began)
      progress.pause(time.monotonic() - began)

    # ---- Loop ----
    stack.enter_context(distributed.lost_process_is_an_error())
    stop = stack.enter_context(distributed.stop_signal())
    pending = None
    while step < total_steps and not stop.requested(step):
      if step % eval_period == 0 or checkpointer.should_save(step):
        collect(pending)  # a state that diverged must not be saved
        pending = None
        with profiling.part('evaluate and save'):
          evaluate_and_save()
        if best['evaluations_since_best'] >= bound:
          why = f'{checkpoint.best_metric} has not improved for {patience} evaluations'
          log.info('%s: training ends at step %d', why, step)
          break
      profiler.before(step, state)
      with profiling.part('wait for data'):
        batch = next(iterator, None)
      if batch is None:
        log.warning('the data ended at step %d of %d', step, total_steps)
        break
      with profiling.part('data to the devices'):
        batch = partitioning.global_batch(batch, device_mesh)
      step += 1
      wanted = histogram_period and step % histogram_period == 0
      with profiling.part('dispatch'), jax.transfer_guard('disallow'):
        state, metrics = (histogram_step if wanted else train_step)(state, batch, key)
      with profiling.part('wait for the device'):  # which is a step ahead
        collect(pending)
      pending = (step, metrics)
      if profile := profiler.after(step, state, train_step):
        progress.clear()
        print(profile, flush=True)

    # ---- End: the last checkpoint, evaluated unless there is a hurry ----
    collect(pending)
    report(step)  # of a window that the last step, or a stop, cut short
    evaluate_and_save(last=True, hurry=bool(stop.received))
    checkpointer.wait()
    progress.clear()
    if stop.received:
      where = f'saved at step {step} of {total_steps} and stopped'
      log.warning('%s: %s; the same command continues', stop.received, where)
    else:
      log.info('finished %d steps in %s', step, model_dir)
    return state


def count_evaluation(best: dict[str, Any], value: float | None, mode: str) -> None:
  """Keeps the best value of an evaluation, and how many came since that were no better."""
  sign = 1.0 if mode == 'max' else -1.0
  if value is None or math.isnan(value):
    return
  if best['best'] is None or sign * (value - best['best']) > 0:
    best |= {'best': value, 'evaluations_since_best': 0}
  else:
    best['evaluations_since_best'] += 1
