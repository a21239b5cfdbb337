"""Writes a model in any format; what is half written never gets its name."""

import logging
import os
import time

from etils import epath

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, check_one_of
from t5x_lite.interop import adafactor_moments, hf_export, hf_tokenizer, run_export, t5x_export
from t5x_lite.interop.adapters import FORMATS as ADAPTERS
from t5x_lite.interop.adapters import check_methods, merge_lora, write_alone
from t5x_lite.interop.checkpoint_source import FORMATS, Source
from t5x_lite.interop.tensors import Progress
from t5x_lite.models.config import T5Config

log = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
TARGETS = (*FORMATS, *ADAPTERS)


def check_destination(destination: str | os.PathLike) -> epath.Path:
  """Returns where a new directory will be; UsageError if something is there already."""
  target = epath.Path(destination)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UsageError(f'{target} is already there; name a new directory')
  return target


def check_target(cfg: T5Config, to: str, vocabulary: VocabularyConfig | None = None) -> None:
  """Raises UsageError if there is no such format, or it has no such model or vocabulary."""
  check_one_of('the format to write', to, TARGETS)
  cfg.check_writable()
  check_methods(cfg, to)
  if to == 'hf':
    hf_export.model_config(cfg, cfg.param_dtype)
    if vocabulary is not None:
      hf_tokenizer.check_vocabulary(vocabulary)
  elif to == 't5x':
    t5x_export.check(cfg, cfg.param_dtype)


def write(
  target: epath.Path,
  source: Source,
  *,
  to: str,
  second_moments: adafactor_moments.Moments | None = None,
  origin: str = '',
  shard_bytes: int = hf_export.SHARD_BYTES,
) -> None:
  """Writes a directory, which does not exist or is empty, of one of TARGETS.

  Half-written ones never get the name. The source may be open or in memory; its param_dtype is what
  is written; LoRA is added to its matrices in 'hf' and 't5x'. No vocabulary means ids without text.
  The second_moments are Adafactor's or none; origin is kept for the record, and shard_bytes are the
  most bytes of one file of 'hf'.
  """
  temporary = target.parent / f'.{target.name}.tmp-{os.getpid()}'
  temporary.mkdir(parents=True)
  if to in ('hf', 't5x'):
    source = merge_lora(source)
  cfg, step, progress = source.config, source.step, _progress()
  try:
    if to in ADAPTERS:
      write_alone(temporary, source, to=to, progress=progress)
    elif to == 'hf':
      hf_export.write(temporary, source, shard_bytes=shard_bytes, progress=progress)
    elif to == 't5x':
      # T5X restores only with an optimizer's state; a new one, if need be.
      states = adafactor_moments.to_t5x(second_moments or adafactor_moments.new(cfg), cfg)
      t5x_export.write(temporary, source, param_states=states, progress=progress)
    else:
      moments = adafactor_moments.to_run(second_moments, cfg, step) if second_moments else {}
      run_export.write(temporary, source, moments=moments, origin=origin, progress=progress)
    if target.is_dir():
      target.rmdir()
    temporary.rename(target)
  except BaseException:
    temporary.rmtree()
    raise


def _progress() -> Progress:
  """Returns what counts an array as written, and says every few seconds how far it is."""
  count, said = 0, time.monotonic()

  def progress(name: str) -> None:
    nonlocal count, said
    count += 1
    if time.monotonic() - said > REPORT_SECONDS:
      said = time.monotonic()
      log.info('%d arrays written, last %s', count, name)

  return progress
