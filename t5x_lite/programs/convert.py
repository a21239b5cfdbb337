"""The convert program: reads a checkpoint of any format, writes another format."""

import collections
import dataclasses
import logging

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, check_one_of, check_positive
from t5x_lite.interop import assignment, export, hf, hf_export, tensor_names, trained_model
from t5x_lite.interop.adapters import merge_lora
from t5x_lite.interop.checkpoint_source import Source, open_source
from t5x_lite.models import transfer

log = logging.getLogger(__name__)


def convert(
  *,
  source: str,
  destination: str,
  to: str = 't5x_lite',
  dtype: str | None = None,
  vocabulary: str | None = None,
  scan_layers: bool = True,
  assignment_map: assignment.AssignmentMap = (),
  strict: bool = True,
  optimizer_state: bool = True,
  merge: bool = False,
  shard_bytes: int = hf_export.SHARD_BYTES,
  dry_run: bool = False,
) -> str:
  """Converts a checkpoint and returns the directory written.

  Memory holds one tensor at a time; a scanned T5X array counts as one. UsageError if the source
  cannot be read or misses a tensor, or `to` has no such model.

  Args:
    source: a folder of t5x_lite, transformers or T5X, one of its steps, or the NAME@REVISION of a
      model on the Hugging Face hub; the format is detected.
    destination: the directory to write; it must not exist yet.
    to: 't5x_lite' (a run directory), 'hf' (for from_pretrained) or 't5x' (a model_dir with a legacy
      checkpoint), the last two with LoRA merged; or, without the base, 'peft' (LoRA for PEFT) or
      'adapter' (any method's part, for `t5x_lite.load(base, adapter=...)`).
    dtype: of the numbers written: 'float32', 'bfloat16' or 'float16'; the source's by default.
    vocabulary: a SentencePiece model file, 't5' for the official one, 'byte', or 'none' for ids
      without text; by default what the source says.
    scan_layers: of a t5x_lite model: layers stacked in one array.
    assignment_map: see `assignment.assign`.
    strict: likewise.
    optimizer_state: carry Adafactor's second moments over, unless tensors get other names.
    merge: add LoRA to its matrices in a t5x_lite run too.
    shard_bytes: most bytes of one file of format 'hf'.
    dry_run: list how names map and write nothing.
  """
  check_one_of('convert.to', to, export.TARGETS)
  check_positive('convert.shard_bytes', shard_bytes)
  opened = open_source(source)
  target = export.check_destination(destination)
  cfg = opened.config.replace(scan_layers=scan_layers)
  dtype = dtype or _stored_dtype(opened)
  check_one_of('convert.dtype', dtype, hf.SHORT_DTYPES)
  cfg = cfg.replace(param_dtype=dtype)
  tensors, report = assignment.assign(opened, cfg, assignment_map=assignment_map, strict=strict)
  vocabulary_config = _vocabulary(vocabulary, opened)
  found = dataclasses.replace(opened, tensors=tensors, config=cfg, vocabulary=vocabulary_config)
  export.check_target(cfg, to)
  if merge and (cfg.lora_rank is None or to in export.ADAPTERS):
    raise UsageError(f'convert.merge is True, but there is no LoRA to merge on the way to {to!r}')
  if merge or to in ('hf', 't5x'):
    found = merge_lora(found)
  if dry_run:
    _print_mapping(found, to, report)
    return destination
  for line in _remarks(found, to):
    log.warning('%s', line)
  renamed = transfer.fields(opened.config) or assignment_map
  carry = optimizer_state and to in ('t5x_lite', 't5x') and not renamed
  moments = opened.read_moments() if carry else {}
  how = {'to': to, 'origin': source, 'shard_bytes': shard_bytes}
  export.write(target, found, second_moments=moments, **how)
  log.info('%s: %s', destination, report.summary())
  return destination


def _stored_dtype(source: Source) -> str:
  """Returns what most numbers are stored in, of the three there are here."""
  sizes: collections.Counter[str] = collections.Counter()
  for tensor in source.tensors.values():
    sizes[tensor.dtype.name] += tensor.size
  [(name, _)] = sizes.most_common(1)
  return name if name in hf.SHORT_DTYPES else 'float32'


def _vocabulary(name: str | None, source: Source) -> VocabularyConfig | None:
  """Returns the vocabulary that is asked for, checked against the model."""
  if name == 'none':
    return None
  config = source.vocabulary
  if name is not None:
    named = {'t5': VocabularyConfig(), 'byte': VocabularyConfig(kind='byte')}
    config = named.get(name) or VocabularyConfig(path=name)
  if config is not None:
    fix = f'name another with --vocabulary for {source.path}'
    trained_model.check_vocabulary(source.config, config, fix)
  return config


def _remarks(source: Source, to: str) -> list[str]:
  """Returns what a user should know before relying on the result."""
  lines, cfg = [], source.config
  if source.vocabulary is None:
    lines.append('no vocabulary: the result has ids but no text; name one with --vocabulary')
  scaled = cfg.logits_via_embedding if cfg.scale_logits is None else cfg.scale_logits
  if to == 'hf' and cfg.relpos_per_layer and not scaled:
    lines.append(
      "transformers 5 multiplies every umT5's logits by d_model**-0.5, those of the published "
      'models too, which have no such factor: greedy outputs are equal, probabilities are not'
    )
  return lines


def _print_mapping(source: Source, to: str, report: assignment.Report) -> None:
  """Prints one line a tensor: from where, its shape, to where."""
  tensors, cfg = source.tensors, source.config
  places = {name: tensor_names.hf_name(name) for name in tensors if to == 'hf'}
  for place, names in tensor_names.t5x_arrays(cfg).items() if to == 't5x' else ():
    places |= dict.fromkeys(names, f'target/{place}')
  for name, tensor in tensors.items():
    shape = 'x'.join(map(str, tensor.shape))
    print(f'{tensor.origin} -> {places.get(name, name)} [{shape}]')
  for name in report.skipped:
    print(f'{name} -> skipped')
  count = sum(tensor.size for tensor in tensors.values())
  print(f'{source.format} -> {to}: {report.summary()}')
  print(f'{count:,} parameters as {cfg.param_dtype}')
  for line in _remarks(source, to):
    print(line)
