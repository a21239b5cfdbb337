"""Writes a model in any format; what is half written never gets its name."""

import logging
import os
import time
from collections.abc import Mapping

from etils import epath

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, check_one_of
from t5x_lite.interop import adafactor_moments, hf_export, hf_tokenizer, run_export, t5x_export
from t5x_lite.interop.adapters import FORMATS as ADAPTERS
from t5x_lite.interop.adapters import check_methods, merge_lora, write_alone
from t5x_lite.interop.checkpoint_source import FORMATS
from t5x_lite.interop.tensors import Progress, Tensors
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
  *,
  tensors: Tensors,
  cfg: T5Config,
  to: str,
  vocabulary: VocabularyConfig | None,
  step: int = 0,
  second_moments: adafactor_moments.Moments | None = None,
  lengths: Mapping[str, int] | None = None,
  origin: str = '',
  shard_bytes: int = hf_export.SHARD_BYTES,
) -> None:
  """Writes a directory, which does not exist or is empty, of one of TARGETS.

  Half-written ones never get the name. The model's param_dtype is what is written; LoRA is added to
  its matrices in 'hf' and 't5x'. No vocabulary means ids without text. The step is of updates made,
  second_moments are Adafactor's or none, lengths those of task features, if known; origin is kept
  for the record, and shard_bytes are the most bytes of one file of 'hf'.
  """
  temporary = target.parent / f'.{target.name}.tmp-{os.getpid()}'
  temporary.mkdir(parents=True)
  if to in ('hf', 't5x'):
    tensors, cfg = merge_lora(tensors, cfg)
  try:
    common = {'tensors': tensors, 'cfg': cfg, 'progress': _progress()}
    if to in ADAPTERS:
      write_alone(temporary, to=to, **common)
    elif to == 'hf':
      hf_export.write(temporary, vocabulary=vocabulary, shard_bytes=shard_bytes, **common)
    elif to == 't5x':
      # T5X restores only with an optimizer's state; a new one, if need be.
      states = adafactor_moments.to_t5x(second_moments or adafactor_moments.new(cfg), cfg)
      t5x_export.write(temporary, step=step, param_states=states, **common)
    else:
      run_export.write(
        temporary,
        vocabulary=vocabulary or VocabularyConfig(kind='passthrough', size=cfg.vocab_size),
        step=step,
        moments=adafactor_moments.to_run(second_moments, cfg, step) if second_moments else None,
        lengths=lengths,
        origin=origin,
        **common,
      )
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
