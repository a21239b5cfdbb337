"""What fine-tuning does where nobody said, lengths, batch, steps, metrics; and how it is told.

It follows from the data and the model, is printed first, and is kept by a run that is continued.
"""

import dataclasses
import importlib.metadata
import importlib.resources
import logging
import math
import shlex
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite.data.pairs import Pairs
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UsageError
from t5x_lite.interop.trained_model import TrainedModel
from t5x_lite.models import model_sharding, t5, transfer
from t5x_lite.models.config import T5Config
from t5x_lite.training.optimizers import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig

log = logging.getLogger(__name__)

# Learning rates: T5's for Adafactor (Raffel et al. 2020, 3.1.2), what is usual for T5 with AdamW.
# PEFT's for LoRA, Houlsby et al.'s for adapters, Lester et al.'s for prompts.
METHODS = {'adafactor': 1e-3, 'adamw': 3e-4, 'lora': 1e-3, 'adapters': 1e-3, 'prompt': 0.3}
# What a method adds to the model, by T5Config's fields.
PARTS: dict[str, dict[str, Any]] = {
  'lora': {'lora_rank': 8, 'lora_alpha': 32.0, 'lora_targets': ('query', 'value')},
  'adapters': {'adapter_dim': 64},
  'prompt': {'prompt_length': 100},
}
# The format of what was trained, by itself.
ALONE = {'lora': 'peft', 'adapters': 'adapter', 'prompt': 'adapter'}

# Tokens of a batch at most, inputs and targets together.
_MAX_BATCH_TOKENS = {'cpu': 4096, 'gpu': 32768, 'tpu': 65536}
# A row that several examples are packed into has at least so many inputs.
_PACKED_LENGTH = 128
# Rows are filled to this share, or nearly.
_FILL = 0.9
_MIN_UPDATES = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Everything about a fine-tuning that has a number; names as in `finetune`."""

  input_length: int
  target_length: int
  pack: bool
  row_lengths: dict[str, int]  # tokens of a training row, which examples share with `pack`
  batch_size: int  # rows
  eval_batch_size: int  # rows that are decoded at a time
  steps_per_epoch: int  # updates that see about every example once
  total_steps: int
  learning_rate: float
  dtype: str
  metrics: list[str]


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens of every text, EOS included."""

  inputs: np.ndarray  # [N]
  targets: np.ndarray  # [N]
  unknown: float  # share of tokens that the vocabulary has no piece for


def measure(pairs: Pairs, vocabulary: Vocabulary) -> Lengths:
  """Tokenizes everything once."""
  unk_id: Any = vocabulary.unk_id  # None is in no text

  def count(texts: Sequence[str]) -> np.ndarray:
    ids = map(vocabulary.encode, texts)
    return np.array([(len(x) + 1, x.count(unk_id)) for x in ids], np.int64).T

  (inputs, unknown), (targets, more) = count(pairs.inputs), count(pairs.targets)
  total = int(inputs.sum() + targets.sum()) - len(inputs) - len(targets)
  return Lengths(inputs, targets, int(unknown.sum() + more.sum()) / max(1, total))


def choose_length(lengths: np.ndarray, limit: int) -> int:
  """Returns a length that cuts hardly any row, and costs little.

  All rows, unless the longest one in a hundred are more than half as long again as the rest.
  """
  usual, longest = float(np.percentile(lengths, 99)), int(lengths.max())
  wanted = longest if longest <= 1.5 * usual else usual
  return min(limit, 8 * math.ceil(wanted / 8))


def make_plan(
  lengths: Lengths,
  targets: Sequence[str],
  *,
  method: str,
  input_length: int | None = None,
  target_length: int | None = None,
  max_input_tokens: int,
  max_target_tokens: int,
  pack: bool | None = None,
  batch_tokens: int | None = None,
  epochs: float | None = None,
  steps: int | None = None,
  learning_rate: float | None = None,
  dtype: str = '',
  metrics: Sequence[str] = (),
) -> Plan:
  """Returns the plan; what is None follows from the data. UsageError if that makes no sense."""
  if method not in METHODS:
    raise UsageError(f'finetune.method is {method!r}; allowed are {", ".join(METHODS)}')
  if method == 'prompt':
    if pack:
      raise UsageError('finetune.pack is True; a prompt needs one example a row')
    pack = False
  if epochs is not None and steps is not None:
    raise UsageError('give epochs or steps, not both')
  if epochs is not None and not 0 < epochs < math.inf:
    raise UsageError(f'finetune.epochs is {epochs}; it must be positive')
  input_length = input_length or choose_length(lengths.inputs, max_input_tokens)
  target_length = target_length or choose_length(lengths.targets, max_target_tokens)
  count = len(lengths.inputs)
  rows = {'inputs': input_length, 'targets': target_length}
  means = {name: float(np.minimum(getattr(lengths, name), n).mean()) for name, n in rows.items()}
  if pack is None:
    # Segment ids cost a little; half empty rows cost half of everything.
    pack = sum(means.values()) < 0.7 * sum(rows.values())
  if pack:
    examples = max(1, round(_PACKED_LENGTH / means['inputs']))
    for name in rows:
      rows[name] = max(rows[name], 8 * math.ceil(examples * means[name] / 8))
  devices, backend = jax.device_count(), jax.default_backend()
  most = batch_tokens or _MAX_BATCH_TOKENS.get(backend, 32768)
  # Rows that one example needs: packed ones are not quite full.
  share = max(means[name] / rows[name] for name in rows) / _FILL if pack else 1.0
  batch_rows = most // sum(rows.values())
  if batch_tokens is None:
    # Of a small file many small batches, so that there are updates enough.
    batch_rows = min(batch_rows, math.ceil(share * min(128, max(8, count // 32))))
  batch_size = _whole(batch_rows, devices)
  steps_per_epoch = max(1, round(share * count / batch_size))
  if steps is None:
    if epochs is None:
      epochs = min(20.0, max(3.0, math.ceil(_MIN_UPDATES / steps_per_epoch)))
    steps = max(1, round(epochs * steps_per_epoch))
  eval_rows = max(1, 2 * most // (input_length + target_length))
  return Plan(
    input_length=input_length,
    target_length=target_length,
    pack=bool(pack),
    row_lengths=rows,
    batch_size=batch_size,
    eval_batch_size=_whole(min(64, eval_rows), devices),
    steps_per_epoch=steps_per_epoch,
    total_steps=steps,
    learning_rate=learning_rate or METHODS[method],
    dtype=dtype or ('float32' if backend == 'cpu' else 'bfloat16'),
    metrics=list(metrics) or choose_metrics(targets),
  )


def model_parts(method: str, base: T5Config, given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of T5Config that a method sets; refuses another's, or a base with parts."""
  parts = dict(PARTS.get(method, {}))
  owners = {name: owner for owner, fields in PARTS.items() for name in fields}
  for name, owner in owners.items():
    if given[name] not in (None, (), []):
      if owner != method:
        raise UsageError(f'finetune.{name} is set, which is for --method {owner}: add that')
      parts[name] = given[name]
  tuned = base.replace(**parts)
  if transfer.fields(base) and (not parts or tuned != base):
    how = 'the same, or its base, or make it a plain one with `t5x-lite convert --merge`'
    raise UsageError(f'the model has {transfer.fields(base)}: fine-tune it with {how}')
  return parts


def _whole(rows: int, devices: int) -> int:
  """Returns a multiple of the devices, at least one row each."""
  return devices * max(1, rows // devices)


def make_optimizer(method: str, plan: Plan) -> OptimizerConfig:
  """Returns the optimizer of a method, with its schedule."""
  rate = plan.learning_rate
  if method in ('adafactor', 'prompt'):
    schedule = ScheduleConfig(shape='constant', base_learning_rate=rate, warmup_steps=0)
    lester = {'multiply_by_parameter_scale': False, 'weight_decay_rate': 1e-5}
    kwargs = lester if method == 'prompt' else {}
    return OptimizerConfig(name='adafactor', schedule=schedule, kwargs=kwargs)
  warmup = min(100, plan.total_steps // 10)
  schedule = ScheduleConfig(shape='linear', base_learning_rate=rate, warmup_steps=warmup)
  return OptimizerConfig(name='adamw', schedule=schedule, global_norm_clip=1.0)


def choose_metrics(targets: Sequence[str]) -> list[str]:
  """Returns metrics that suit the targets: labels, short answers, or text; refuses equal ones."""
  different = len(set(targets))
  if different == 1 and len(targets) > 1:
    raise UsageError(f'every target is {targets[0]!r:.60}: there is nothing to learn')
  if 1 < different <= 100 and different * 5 <= len(targets):  # few labels, and each of them often
    return ['accuracy', 'f1']
  if np.mean([len(text.split()) for text in targets]) < 5:
    return ['accuracy', 'squad', 'chrf']
  return ['accuracy', 'bleu', 'chrf', 'rouge']


def describe(plan: Plan, lengths: Lengths, **more: Any) -> list[tuple[str, str]]:
  """Returns (what, how much) for the table that is printed at the start."""

  def percentiles(values: np.ndarray) -> str:
    found = np.percentile(values, (50, 90, 99, 100))
    return f'{"/".join(f"{x:.0f}" for x in found)} (50/90/99/100%)'

  inputs, targets, rows = lengths.inputs, lengths.targets, plan.row_lengths
  over = np.maximum(inputs - plan.input_length, 0) + np.maximum(targets - plan.target_length, 0)
  share = f'{over.sum() / (inputs.sum() + targets.sum()):.1%} of the tokens'
  cut = f'{np.count_nonzero(over)} of {len(over)} examples, {share}'
  batch = f'{plan.batch_size} rows of {rows["inputs"]} + {rows["targets"]} tokens'
  epochs = f'{plan.total_steps / plan.steps_per_epoch:.1f} epochs of {plan.steps_per_epoch}'
  return [
    *((name.replace('_', ' '), str(value)) for name, value in more.items()),
    ('input tokens', percentiles(inputs)),
    ('target tokens', percentiles(targets)),
    ('longest kept', f'{plan.input_length} + {plan.target_length} tokens'),
    ('cut', cut if over.any() else 'none'),
    ('batch', batch + (', packed' if plan.pack else '')),
    ('updates', f'{plan.total_steps}, about {epochs}'),
    ('learning rate', f'{plan.learning_rate:g}'),
    ('computed in', plan.dtype),
    ('metrics', ', '.join(plan.metrics)),
  ]


def show_plan(
  plan: Plan, lengths: Lengths, parts: dict[str, Pairs], start: TrainedModel, **more: str
) -> None:
  """Prints what was chosen, and what more there is to say: the method and the output."""
  train = parts['train']
  examples = f'{len(train)}, and {len(parts["validation"])} to evaluate'
  if train.skipped:
    examples += f'; {train.skipped} bad rows left out'
  first = {'model': f'{start.path} ({start.format})', 'examples': examples}
  first['columns'] = ' -> '.join(train.fields)
  print()
  for name, value in describe(plan, lengths, **first, **more):
    print(f'  {name:15} {value}')
  if lengths.unknown > 0.01:
    share = f'{lengths.unknown:.1%} of the tokens of this data'
    log.warning('the vocabulary has no piece for %s: the model cannot read or write them', share)


def show_examples(pairs: Pairs, plan: Plan, vocabulary: Any, num: int = 3) -> None:
  """Prints a few examples as the model will see them."""
  for i in range(0, len(pairs), max(1, len(pairs) // num))[:num]:
    print(f'\n  {pairs.places[i]}, as the model sees it')
    target = ('target', pairs.targets[i], plan.target_length)
    for name, text, length in (('input', pairs.inputs[i], plan.input_length), target):
      ids = vocabulary.encode(text)
      shown = vocabulary.decode(ids[: length - 1])
      cut = f', {len(ids) + 1} before' if len(ids) >= length else ''
      shown = shown if len(shown) <= 300 else shown[:300] + '...'
      print(f'    {name:7} {shown!r} ({min(len(ids) + 1, length)} tokens{cut})')
  print(flush=True)


def model_card(
  base: TrainedModel,
  parts: Mapping[str, Pairs],
  table: Sequence[tuple[str, str]],
  *,
  results: Mapping[str, Any],
  settings: Mapping[str, Any],
  max_new_tokens: int,
) -> str:
  """Returns the card, README.md on the Hugging Face hub, of what was fine-tuned from a base.

  Parts are the data by split, and the table is (what, how much) of the training; settings are what
  the command was given and chose. Results have 'step' and 'metrics'.

  Source: https://huggingface.co/docs/hub/model-cards.
  """
  _, shapes, _ = t5.abstract_params(base.config)
  files = ', '.join(f'`{name}`' for name in settings['train'])
  template = importlib.resources.files('t5x_lite.programs').joinpath('model_card.md').read_text()
  return string.Template(template).substitute(
    base=base.path,
    count=f'{model_sharding.count_params(shapes):,}',
    version=importlib.metadata.version('t5x_lite'),
    example=repr(parts['train'].inputs[0][:200]),
    max_new_tokens=max_new_tokens,
    validation=len(parts['validation']),
    step=results['step'],
    metrics='\n'.join(f'| {name} | {x:.4g} |' for name, x in results['metrics'].items()),
    source=f'{len(parts["train"])} training examples from {files or "memory"}',
    **dict(zip(('input', 'target'), parts['train'].fields, strict=True)),
    prefix=f' Prefix: `{settings["prefix"]}`.' if settings['prefix'] else '',
    training='\n'.join(f'| {name} | {value} |' for name, value in table),
    command=command(settings),
  )


def command(settings: Mapping[str, Any]) -> str:
  """Returns the command line of a fine-tuning."""
  words = ['t5x-lite', 'finetune']
  for name, value in _given(settings).items():
    if isinstance(value, bool):
      words.append(f'--{name}' if value else f'--no-{name}')
    else:
      words += [f'--{name}', *map(str, value if isinstance(value, list) else [value])]
  return shlex.join(words)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in settings.items() if value not in ('', [], None)}


def gin_text(settings: Mapping[str, Any], file: str) -> str:
  """Returns the gin file that runs a fine-tuning again."""
  bindings = ''.join(f'  {name} = {value!r}\n' for name, value in _given(settings).items())
  return f"""# Written by `t5x-lite finetune`; every choice it made is here. Again:
#   t5x-lite finetune --gin_file={file} --output ANOTHER_DIRECTORY
from __gin__ import dynamic_registration

from t5x_lite.programs import finetune

finetune.finetune:
{bindings}"""
