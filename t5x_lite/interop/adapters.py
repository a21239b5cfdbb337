"""What a transfer method trained, without its base: merged, written, read.

An adapter folder loads onto any base of the same shape. Ours has canonical names; LoRA is also
written and read in PEFT's format (peft/tuners/lora config.py and model.py, PEFT 0.21).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from t5x_lite.errors import UsageError, refusing
from t5x_lite.interop import hf, hf_export, tensor_names
from t5x_lite.interop.checkpoint_source import Source
from t5x_lite.interop.tensors import Index, Progress, Tensor
from t5x_lite.models import transfer
from t5x_lite.models.config import T5Config
from t5x_lite.runs.files import write_json

FORMATS = ('adapter', 'peft')
CONFIG, WEIGHTS = 'adapter.json', 'adapter.safetensors'
PEFT_CONFIG, PEFT_WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_FILES = {'adapter': (CONFIG, WEIGHTS), 'peft': (PEFT_CONFIG, PEFT_WEIGHTS)}
_HF_MATRICES = {**tensor_names.ATTENTION, **{name: name for name in ('wi', 'wi_0', 'wi_1', 'wo')}}
# What PEFT's LoRA can do and this one not.
_PEFT_OTHER = 'bias fan_in_fan_out lora_bias use_dora rank_pattern alpha_pattern'.split()
_PEFT_OTHER += ['layers_to_transform', 'modules_to_save', 'trainable_token_indices']


def _is_lora(name: str) -> bool:
  return name.endswith(('/lora_a', '/lora_b'))


def merge_lora(source: Source) -> Source:
  """Returns a model with LoRA added to its matrices in float32, unread."""
  tensors, cfg = source.tensors, source.config
  if cfg.lora_rank is None:
    return source
  assert cfg.lora_alpha is not None
  scale = np.float32(cfg.lora_alpha / cfg.lora_rank)
  result = {}
  for name, tensor in tensors.items():
    if _is_lora(name):
      continue
    a, b = (tensors.get(f'{name.removesuffix("kernel")}{part}') for part in ('lora_a', 'lora_b'))
    result[name] = _merged(tensor, a, b, scale) if a and b else tensor
  cfg = cfg.replace(lora_rank=None, lora_alpha=None, lora_targets=())
  return dataclasses.replace(source, tensors=result, config=cfg)


def _merged(kernel: Tensor, a: Tensor, b: Tensor, scale: np.float32) -> Tensor:
  def fetch(index: Index) -> np.ndarray:
    rows, columns = index
    a_DR, b_RF = a.read((rows, slice(None))), b.read((slice(None), columns))
    added = a_DR.astype(np.float32) @ b_RF.astype(np.float32)
    return kernel.read(index).astype(np.float32) + scale * added

  return dataclasses.replace(kernel, dtype=scale.dtype, fetch=fetch)


def check_methods(cfg: T5Config, to: str) -> None:
  """Raises UsageError if a format has no place for what a method added."""
  fields = transfer.fields(cfg)
  if to in FORMATS and not fields:
    raise UsageError('this model has no LoRA, no adapters and no prompt to write by themselves')
  if to == 'peft' and (cfg.lora_rank is None or cfg.architecture == 'decoder'):
    raise UsageError(f"PEFT's format is for LoRA on a T5 with an encoder; this one has {fields}")
  for name in ('adapter_dim', 'prompt_length'):
    if name in fields and to not in ('t5x_lite', 'adapter'):
      raise UsageError(
        f'a model with {name}={fields[name]} cannot be written as {to!r}, which has '
        "nothing of the kind: write it as 't5x_lite', or as 'adapter' without its base"
      )


def write_alone(directory: epath.Path, source: Source, *, to: str, progress: Progress) -> None:
  """Writes what a method trains into an empty directory; of adapters that is the norms too.

  The format `to` is one of FORMATS; the rest is as in `export.write`.
  """
  tensors, cfg = source.tensors, source.config
  pattern = transfer.trained_pattern(tensors)
  assert pattern is not None
  if to == 'adapter':
    found = {name: tensor for name, tensor in tensors.items() if re.search(pattern, name)}
    entry = {'format': 1, 'model': transfer.fields(cfg)}
  else:
    found = {_peft_name(n): tensors[ours].transposed() for n, ours in _lora_names(cfg).items()}
    entry = {
      'peft_type': 'LORA',
      'task_type': 'SEQ_2_SEQ_LM' if cfg.has_decoder else 'FEATURE_EXTRACTION',
      'base_model_name_or_path': None,  # any of the same shape
      'inference_mode': True,
      'r': cfg.lora_rank,
      'lora_alpha': cfg.lora_alpha,
      'lora_dropout': 0.0,
      'target_modules': [_HF_MATRICES[name] for name in cfg.lora_targets],
      'bias': 'none',
      'fan_in_fan_out': False,
    }
  config, file = _FILES[to]
  hf_export.write_shard(directory / file, found, np.dtype(cfg.param_dtype), progress)
  write_json(directory / config, entry)


def _lora_names(cfg: T5Config) -> dict[str, str]:
  """Returns {a name of an unshared model: the model's own} of all of LoRA."""
  own = tensor_names.shapes(cfg)
  names = tensor_names.shapes(cfg.replace(share_encoder_decoder=False))
  return {n: n if n in own else tensor_names.lender(n) or '' for n in names if _is_lora(n)}


def _peft_name(name: str) -> str:
  stem, _, letter = name.rpartition('/lora_')
  module = tensor_names.hf_name(f'{stem}/kernel').removesuffix('.weight')
  return f'base_model.model.{module}.lora_{letter.upper()}.weight'


def put_on(source: Source, path: str) -> Source:
  """Returns an open base of any format, without LoRA, adapters or prompt, with a folder's adapter.

  The folder is of `write_alone` or PEFT. UsageError if there is none, or for another model.
  """
  folder = epath.Path(path)
  if transfer.fields(source.config):
    raise UsageError(f'{source.path} has {transfer.fields(source.config)} already: name its base')
  peft = (folder / PEFT_CONFIG).exists()
  files = config, _ = _FILES['peft' if peft else 'adapter']
  for file in files:
    if not (folder / file).exists():
      raise UsageError(f'{path} holds no adapter: no {file}')
  entry = hf.read_json(folder / config)
  stored: dict[str, Tensor] = hf.read_tensors(folder)
  with refusing(f'{folder / config} describes no adapter', KeyError, TypeError, ValueError):
    changes = _peft_fields(entry) if peft else dict(entry['model'])
    cfg = source.config.replace(**changes)
  if peft:
    names = {ours: _peft_name(name) for name, ours in _lora_names(cfg).items()}
    if extra := sorted(stored.keys() - set(names.values())):
      fix = 'merge it into its base with PEFT'
      raise UsageError(f'{folder} has {extra[0]}, which is no LoRA: {fix}')
    stored = {ours: stored[n].transposed() for ours, n in names.items() if n in stored}
  shapes = tensor_names.shapes(cfg)
  for name in (*stored, *(n for n in shapes if transfer.is_added(n))):
    have, need = stored[name].shape if name in stored else 'none', shapes.get(name, 'none')
    if have != need:
      another = f'the adapter {path} is for another model than {source.path}'
      raise UsageError(f'{another}: of {name} it has {have}, the model {need}')
  return dataclasses.replace(source, config=cfg, tensors={**source.tensors, **stored})


def _peft_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of T5Config that PEFT's configuration means."""
  if entry['peft_type'] != 'LORA':
    raise UsageError(f'peft_type is {entry["peft_type"]!r}; of PEFT only LORA is read')
  for name in _PEFT_OTHER:
    if entry.get(name) not in (None, False, 'none', {}, []):
      raise UsageError(f'{name} is {entry[name]!r} in {PEFT_CONFIG}, which LoRA here has not')
  targets = entry['target_modules']
  ours = {theirs: name for name, theirs in _HF_MATRICES.items()}
  if isinstance(targets, str) or not set(targets) <= set(ours):
    raise UsageError(f'target_modules is {targets!r}; what is read are {", ".join(ours)}')
  rank, alpha = int(entry['r']), float(entry['lora_alpha'])
  if entry.get('use_rslora'):
    alpha *= rank**0.5  # scaled by alpha / sqrt(r)
  names = [ours[name] for name in sorted(targets, key=list(ours).index)]
  return {'lora_rank': rank, 'lora_alpha': alpha, 'lora_targets': names}
