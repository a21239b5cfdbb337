"""The finetune program: a checkpoint and a file in, a model for others out.

Chooses what nobody named; every phase continues where it was killed.

  OUTPUT/                 the run, as `train` writes it
  OUTPUT/data/, start/    the pairs and the model to start from, if they were not in files
  OUTPUT/finetune.json    what was chosen; OUTPUT/finetune.gin runs it again
  OUTPUT/evaluation/      metrics.json, and every prediction
  OUTPUT/export/          for transformers' from_pretrained; with a model card
  OUTPUT/adapter/         of LoRA, adapters and prompts: what was trained alone
"""

import dataclasses
import inspect
import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from t5x_lite.data import metrics as metrics_lib
from t5x_lite.data import pairs as pairs_lib
from t5x_lite.data import vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.pairs import Columns, Pairs
from t5x_lite.data.tasks import catalog, from_files
from t5x_lite.errors import UsageError, refusing
from t5x_lite.evaluation import evaluators
from t5x_lite.interop import export, trained_model
from t5x_lite.parallel import distributed
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import convert, evaluate, finetune_plan, quickstart, report, start_checks
from t5x_lite.programs import train as train_lib
from t5x_lite.programs.finetune_plan import Plan
from t5x_lite.runs import checkpoints, files, metric_writers, progress
from t5x_lite.runs.checkpoints import CheckpointConfig
from t5x_lite.training.losses import LossConfig

log = logging.getLogger(__name__)

TASK = 'finetune'
PLAN_FILE = 'finetune.json'
GIN_FILE = 'finetune.gin'
EXPORT = 'export'
EVALUATION = 'evaluation'
ADAPTER = 'adapter'
# Fields of Columns by this program's names.
COLUMNS = {'input_column': 'input', 'target_column': 'target'}
COLUMNS |= {name: name for name in ('template', 'prefix', 'skip_bad_rows')}
_LENGTHS = ('input_length', 'target_length')
_BOUNDS = ('max_input_tokens', 'max_target_tokens')
_COUNTS = (*_LENGTHS, *_BOUNDS, 'steps', 'batch_tokens', 'patience', 'eval_examples')
_FILES = ('train', 'validation', 'train_targets', 'validation_targets')
# What a plan says of a setting's own name, and what it is made from, beside the data.
_CHOSEN = (*_LENGTHS, 'learning_rate', 'pack', 'dtype', 'metrics')
_PLANNED = (*_CHOSEN, *_BOUNDS, 'method', 'batch_tokens', 'epochs', 'steps')
# Of no use to a run that is made again, or replaced by what was chosen.
_DROPPED = (*_BOUNDS, 'epochs', 'num_shown', 'export_hf', 'profile_steps', 'mesh')
BEST_METRIC = f'eval/{TASK}/loss'
Files = str | Sequence[str]


def finetune(
  *,
  model: str,
  train: str | Sequence[str],
  output: str,
  validation: str | Sequence[str] = (),
  train_targets: str | Sequence[str] = (),
  validation_targets: str | Sequence[str] = (),
  input_column: str = '',
  target_column: str = '',
  template: str = '',
  prefix: str = '',
  skip_bad_rows: bool = False,
  method: str = 'adafactor',
  learning_rate: float | None = None,
  lora_rank: int | None = None,
  lora_alpha: float | None = None,
  lora_targets: Sequence[str] = (),
  adapter_dim: int | None = None,
  prompt_length: int | None = None,
  epochs: float | None = None,
  steps: int | None = None,
  batch_tokens: int | None = None,
  pack: bool | None = None,
  input_length: int | None = None,
  target_length: int | None = None,
  max_input_tokens: int = 1024,
  max_target_tokens: int = 512,
  dtype: str = '',
  dropout_rate: float = 0.1,
  holdout: float = 0.1,
  patience: int = 3,
  eval_examples: int = 1000,
  metrics: Sequence[str] = (),
  num_shown: int = 10,
  export_hf: bool = True,
  report_to: str | Sequence[str] = 'tensorboard',
  histogram_period: int | None = None,
  profile_steps: int | None = None,
  seed: int = 0,
  mesh: MeshConfig | None = None,
) -> dict[str, Any] | None:
  """Fine-tunes a checkpoint on pairs of text and exports the result.

  Started again with the same output it continues what was interrupted. Returns metrics, and where
  things are; None if a signal ended it early. UsageError, nothing written, for bad data or model.

  Args:
    model: where to start: a folder of transformers or T5X, a run of ours, NAME@REVISION of the hub.
    train: JSONL, JSON, CSV, TSV or Parquet files, plain or gzip, or a folder that
      `datasets.save_to_disk` wrote; several, and patterns with '*'.
    output: the run's directory.
    validation: likewise, to evaluate on; by default a part of train is held out.
    train_targets: text files beside those of train, line by line, which then hold inputs alone.
    validation_targets: likewise.
    input_column: its name, or number from 0 without a header; one with a usual name by default.
    target_column: likewise.
    template: makes the input of several columns, 'summarize: {article}'.
    prefix: put before every input, with its space.
    skip_bad_rows: leave out rows without input or target, instead of refusing the file.
    method: 'adafactor', 'adamw' train all parameters, 'lora', 'adapters', 'prompt' a few new ones.
    learning_rate: the highest; 0.001 by default, for AdamW 0.0003, for a prompt 0.3.
    lora_rank: 8 by default.
    lora_alpha: 32 by default.
    lora_targets: matrices by name; query and value by default.
    adapter_dim: inner dimension of adapters; 64 by default.
    prompt_length: trained vectors; 100 by default.
    epochs: passes over the data; 3 by default, more if the file is small.
    steps: updates, instead of epochs.
    batch_tokens: of a batch, inputs and targets; by the data and device by default.
    pack: several examples a row; by default where rows would be half empty.
    input_length: tokens, what is longer is cut; as long as the data by default, rare rows aside.
    target_length: likewise.
    max_input_tokens: bound of what input_length becomes by itself.
    max_target_tokens: likewise of target_length.
    dtype: to compute in; bfloat16 on GPU and TPU, float32 on CPU by default.
    dropout_rate: T5 fine-tunes with 0.1.
    holdout: share of train to evaluate on, if there is no validation.
    patience: epochs without a better validation loss, after which training ends.
    eval_examples: of validation, at most, that are decoded at the end.
    metrics: names, such as accuracy f1 squad bleu chrf rouge; chosen by the data by default.
    num_shown: predictions that are printed at the end.
    export_hf: write OUTPUT/export for transformers.
    report_to: tensorboard, wandb or both, beside metrics.jsonl; or none.
    histogram_period: steps between histograms of the gradient; see `train`.
    profile_steps: steps to trace into OUTPUT/profile; see `train`.
    seed: of dropout and the order of the data.
    mesh: how devices are arranged; decided by their number by default.
  """
  # ---- What must fit together; nothing is written here ----
  given = dict(locals())
  for name in _COUNTS:
    start_checks.check_positive(f'finetune.{name}', given[name])
  if not 0.0 < holdout < 1.0:
    raise UsageError(f'finetune.holdout is {holdout}; it is a share, below 1')
  if learning_rate is not None and not 0.0 < learning_rate < math.inf:
    raise UsageError(f'finetune.learning_rate is {learning_rate}')
  metrics_lib.get_metrics(metrics)
  metric_writers.reporters(report_to)
  start_checks.check_writable(output)
  columns = Columns(**{field: given[name] for name, field in COLUMNS.items()})
  parts = read_parts(train, validation, columns, holdout, train_targets, validation_targets)
  start = trained_model.open_model(model)
  if start.config.architecture != 'encoder_decoder':
    kind = f'architecture={start.config.architecture!r}'
    raise UsageError(f"{model} is of {kind}; fine-tuning on pairs needs 'encoder_decoder'")
  changes = finetune_plan.model_parts(method, start.config, given)
  vocabulary = vocabularies.make_vocabulary(start.vocabulary)
  lengths = finetune_plan.measure(parts['train'], vocabulary)
  planned = {name: given[name] for name in _PLANNED}
  plan = finetune_plan.make_plan(lengths, parts['train'].targets, **planned)
  prints = {name: part.fingerprint() for name, part in parts.items()}
  plan = _same_plan(output, plan, prints, total_steps=steps)
  if export_hf:
    try:
      export.check_target(start.config.replace(**changes), 'hf', start.vocabulary)
    except UsageError as error:
      log.warning('there will be no export for transformers: %s', error)
      export_hf = False

  # ---- Say what will happen ----
  if distributed.is_primary():
    finetune_plan.show_plan(plan, lengths, parts, start, method=method, output=output)
    finetune_plan.show_examples(parts['train'], plan, vocabulary)
  settings = {name: value for name, value in given.items() if name not in _DROPPED}
  settings |= {name: _listed(settings[name]) for name in _FILES}
  settings |= {**changes, **{name: getattr(plan, name) for name in _CHOSEN}}
  settings['steps'] = plan.total_steps
  settings['batch_tokens'] = plan.batch_size * sum(plan.row_lengths.values())
  settings = {name: list(x) if isinstance(x, tuple) else x for name, x in settings.items()}

  def write_plan(model_dir: str) -> None:
    """Writes what was chosen, beside config.json."""
    root = epath.Path(model_dir)
    record = {'plan': dataclasses.asdict(plan), 'data': prints}
    files.write_json(root / PLAN_FILE, {**record, 'settings': settings})
    files.write_text(root / GIN_FILE, finetune_plan.gin_text(settings, GIN_FILE))

  # ---- Train ----
  _register(parts, plan.metrics)
  kept = {'scan_layers': start.config.scan_layers}
  best_alone: dict[str, Any] = {'keep': 1, 'keep_best': 1, 'best_metric': BEST_METRIC}
  same = ('patience', 'report_to', 'histogram_period', 'profile_steps', 'mesh', 'seed')
  with distributed.stop_signal() as stop:
    state = train_lib.train(
      dataset=_dataset(plan.row_lengths, plan.batch_size, pack=plan.pack, seed=seed),
      optimizer=finetune_plan.make_optimizer(method, plan),
      model_dir=output,
      total_steps=plan.total_steps,
      model_changes={'dtype': plan.dtype, 'dropout_rate': dropout_rate, **kept, **changes},
      checkpoint=CheckpointConfig(restore_path=model, period=plan.steps_per_epoch, **best_alone),
      loss=LossConfig(z_loss=1e-4),  # as T5X fine-tunes
      train_eval=[_eval_dataset(plan)],
      eval_period=plan.steps_per_epoch,
      eval_steps=None,
      stats_period=max(1, min(100, plan.total_steps // 50)),
      summarize_config_fn=write_plan,
      **{name: given[name] for name in same},
    )
    if state is None or stop.received:
      return None
  del state

  # ---- Evaluate the best checkpoint ----
  step = distributed.from_primary(lambda: best_step(output))
  best = os.path.join(output, checkpoints.CHECKPOINTS, str(step))
  place = os.path.join(output, EVALUATION)
  how: dict[str, Any] = {'datasets': [_eval_dataset(plan)], 'num_examples': eval_examples}
  how['report_to'] = 'none'
  found = evaluate.evaluate(model_dir=best, output=place, mesh=mesh, **how)
  results: dict[str, Any] = {'step': step, 'metrics': found[TASK]}

  # ---- Export, and tell ----
  def tell() -> None:
    if export_hf:
      lora = f'LoRA of rank {settings["lora_rank"]}, merged into the weights'
      told = lora if method == 'lora' else method
      table = finetune_plan.describe(plan, lengths, method=told)
      how = {'settings': settings, 'max_new_tokens': plan.target_length}
      card = finetune_plan.model_card(start, parts, table, results=results, **how)
      results['export'] = _export(best, output, EXPORT, to='hf', card=card)
    if changes:
      results['adapter'] = _export(best, output, ADAPTER, to=finetune_plan.ALONE[method])
    files.write_json(epath.Path(output) / 'results.json', results)
    quickstart.show_predictions(place, [TASK], num_shown)
    asked = {'prefix': prefix, 'template': template}
    how_asked = ''.join(f' --{name} {shlex.quote(text)}' for name, text in asked.items() if text)
    print(summary(results, output, best, how_asked))

  distributed.primary_alone(output, tell)
  return results


def finetune_rows(
  data: Any, validation: Any, *, output: str, save: Callable[[str], None], **arguments: Any
) -> str:
  """Runs `finetune` on what a program has in memory; returns the best checkpoint's directory.

  Data and validation, which may be empty, are files or rows; see `pairs.read`. `save` writes the
  model to start from into a directory. UsageError names an argument that the program has not.
  """
  known = inspect.signature(finetune).parameters
  for name in arguments:
    if name not in known or name == 'model':
      settings = ', '.join(sorted(known.keys() - {'model', 'train', 'output'}))
      raise UsageError(f'finetune has no setting {name!r}; there are {settings}')
  start_checks.check_writable(output)
  sources: dict[str, Any] = {'train': data, 'validation': validation}
  given = {name: part for name, part in sources.items() if not _empty(part)}
  if not all(map(pairs_lib.is_paths, given.values())):
    # All of it: the columns that are named hold for both.
    names = COLUMNS.items()
    columns = Columns(**{field: arguments.pop(name) for name, field in names if name in arguments})
    for name, part in given.items():
      sources[name] = _write(pairs_lib.read(part, columns, what=name), output, name)
  start = os.path.join(output, 'start')
  new = distributed.is_primary() and not os.path.isdir(start)
  distributed.alike(start, lambda: new and save(start))
  finetune(model=start, output=output, **sources, **arguments)
  if progress.in_notebook():
    progress.show_page(epath.Path(report.report(runs=[output])).read_text())
  step = distributed.from_primary(lambda: best_step(output))
  return os.path.join(output, checkpoints.CHECKPOINTS, str(step))


def _empty(source: Any) -> bool:
  return source is None or (isinstance(source, str | list | tuple | dict) and not source)


def _write(pairs: Pairs, output: str, name: str) -> str:
  """Writes pairs as JSON lines and returns the file."""
  path = epath.Path(output) / 'data' / f'{name}.jsonl'
  rows = zip(pairs.inputs, pairs.targets, strict=True)
  lines = [{'input': x, 'target': y} for x, y in rows]
  distributed.alike(path, lambda: distributed.is_primary() and evaluators.write_lines(path, lines))
  return os.fspath(path)


def read_parts(
  train: Files,
  validation: Files,
  columns: Columns,
  holdout: float,
  train_targets: Files = (),
  validation_targets: Files = (),
) -> dict[str, Pairs]:
  """Returns the pairs to train on and to evaluate on."""
  whole = pairs_lib.read(train, columns, targets=train_targets)
  validation = validation or pairs_lib.split_of(train, 'validation')
  if validation:
    held = pairs_lib.read(validation, columns, targets=validation_targets, what='validation')
    return {'train': whole, 'validation': held}
  count = min(1000, max(1, round(holdout * len(whole))))
  if len(whole) < 2:
    raise UsageError('there is one example: too few to hold one out; give a validation file')
  rest, held = whole.hold_out(count)
  if len(set(rest.targets)) == 1 < len(set(whole.targets)):
    raise UsageError(
      f'without {len(held)} rows to evaluate on, every target is {rest.targets[0]!r:.60}: equal '
      'inputs are held out together, and few differ; give more rows or a validation file'
    )
  return {'train': rest, 'validation': held}


def _listed(source: Any) -> list[str]:
  listed = [source] if isinstance(source, str | os.PathLike) else source
  return [os.fspath(one) for one in listed if os.fspath(one)]


def _register(parts: dict[str, Pairs], metrics: Sequence[str]) -> None:
  """Makes the pairs the task that train and evaluate know by name."""
  chosen, columns = metrics_lib.get_metrics(metrics), {}
  for name, part in parts.items():
    columns[name] = lambda part=part: {'inputs': part.inputs, 'targets': part.targets}
  catalog.replace(TASK, from_files.supervised(columns, prefix='', metric_fns=chosen))


def _dataset(lengths: dict[str, int], batch_size: int, **more: Any) -> DatasetConfig:
  more |= {'task_feature_lengths': lengths, 'batch_size': batch_size}
  return DatasetConfig(mixture_or_task_name=TASK, **more)


def _eval_dataset(plan: Plan) -> DatasetConfig:
  lengths = {'inputs': plan.input_length, 'targets': plan.target_length}
  once = {'split': 'validation', 'shuffle': False, 'pack': False, 'num_epochs': 1}
  return _dataset(lengths, plan.eval_batch_size, **once)


def _same_plan(output: str, plan: Plan, prints: dict[str, str], *, total_steps: int | None) -> Plan:
  """Returns the plan of the run that is continued, if the data is the same, or the new one."""
  path = epath.Path(output) / PLAN_FILE
  if not path.exists() or not checkpoints.has_checkpoint(output):
    return plan
  with refusing(f'{path} is damaged, use another output', ValueError, KeyError, TypeError):
    entry = json.loads(files.retried(path, path.read_text))
    kept = Plan(**entry['plan'])
    before = dict(entry['data'])
  if before != prints:
    why = 'use another output, or the same rows in the same order'
    raise UsageError(f'the run in {output} was begun with other data: {why}')
  fields = (field.name for field in dataclasses.fields(Plan))
  names = [name for name in fields if name != 'total_steps' or total_steps is None]
  if changed := [name for name in names if getattr(plan, name) != getattr(kept, name)]:
    log.warning('%s continues with its own %s', output, ', '.join(changed))
  return kept if total_steps is None else dataclasses.replace(kept, total_steps=total_steps)


def best_step(output: str) -> int:
  """Returns the kept step with the least validation loss, else the newest."""
  kept = checkpoints.steps_in(epath.Path(output) / checkpoints.CHECKPOINTS)
  losses = {
    entry['step']: entry[BEST_METRIC]
    for entry in metric_writers.read_metrics(output)
    if entry.get(BEST_METRIC) is not None and entry['step'] in kept
  }
  return min(losses, key=lambda step: losses[step]) if losses else max(kept)


def _export(best: str, output: str, name: str, *, to: str, card: str = '') -> str:
  """Writes OUTPUT/NAME anew, the old one being there until it is whole."""
  target, new, old = (epath.Path(output) / x for x in (name, f'.{name}.new', f'.{name}.old'))
  new.rmtree(missing_ok=True)
  old.rmtree(missing_ok=True)
  convert.convert(source=best, destination=os.fspath(new), to=to)
  if card:
    files.write_text(new / 'README.md', card)
  if target.exists():
    target.rename(old)
  new.rename(target)
  old.rmtree(missing_ok=True)
  return os.fspath(target)


def summary(results: dict[str, Any], output: str, best: str, asked: str = '') -> str:
  """Returns the numbers and the commands to go on with; `asked` are infer's flags for the input."""
  shown = {name: value for name, value in results['metrics'].items() if '/' not in name}
  numbers = evaluators.format_metrics(shown)
  run = quickstart.typed()
  text = f'best checkpoint: step {results["step"]}: {numbers}\n\n'
  if 'export' in results:
    text += f'transformers: AutoModelForSeq2SeqLM.from_pretrained({f"{output}/{EXPORT}"!r})\n'
  if 'adapter' in results:
    text += f'on any base:  t5x_lite.load(BASE, adapter={f"{output}/{ADAPTER}"!r})\n'
  return (
    f'{text}predict:      {run} infer --model {shlex.quote(best)}{asked} '
    '--input FILE --output OUT.jsonl\n'
    f'look at it:   {run} report {shlex.quote(output)}'
  )
