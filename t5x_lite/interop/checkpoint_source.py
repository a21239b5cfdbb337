"""Opens a checkpoint of any known format as tensors, config and vocabulary."""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import DamagedError, UsageError, check_one_of, refusing
from t5x_lite.interop import adafactor_moments, hf, hf_tokenizer, t5x, tensor_names, zarr
from t5x_lite.interop.tensors import Tensor, of_leaf
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import distributed
from t5x_lite.runs import checkpoints, run_directory

log = logging.getLogger(__name__)

FORMATS = ('t5x_lite', 'hf', 't5x')


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint that is open for reading."""

  path: str  # of the folder that was opened
  format: str  # one of FORMATS
  config: T5Config  # the model
  tensors: Mapping[str, Tensor]  # by canonical name; read lazily
  unknown: Sequence[str] = ()  # names of tensors that are no part of a T5
  vocabulary: VocabularyConfig | None = None  # or None if the folder says nothing of one
  step: int = 0  # updates made, 0 if unknown
  # returns Adafactor's second moments by canonical name; empty if there are none of it
  read_moments: Callable[[], adafactor_moments.Moments] = dict
  lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of task features, if known
  checkpoint: str = ''  # of a run of ours, the folder of the step


def open_source(path: str) -> Source:
  """Opens a checkpoint, whatever its format; UsageError if nothing there can be read.

  The path is a folder that transformers, T5X or `t5x-lite train` wrote, one of its steps, or the
  name of a model on the Hugging Face hub; NAME@REVISION is one branch, tag or commit of it.
  """
  if re.match(r'(https?|ftp)://', path):
    raise UsageError(f'{path} does not exist: models come from disks, buckets and NAMEs of the hub')
  place = epath.Path(path)
  if not place.exists():
    place = epath.Path(_from_hub(path))
  if hf.is_hf(place):
    return _open_hf(place)
  # A run of ours, or a step of one; what T5X wrote may lie below it.
  if not any(
    (folder / t5x.FILE).is_file() for folder in (place, *place.glob(f'{t5x.PREFIX}*'))
  ) and any(
    (folder / run_directory.MODEL_FILE).is_file() for folder in (place, *place.parents[:2])
  ):
    return _open_run(os.fspath(place))
  if found := t5x.find(place):
    return _open_t5x(found)
  if place.is_dir() and any(file.suffix in ('.safetensors', '.bin') for file in place.iterdir()):
    raise UsageError(f'{path} holds weights but no {hf.CONFIG}; copy it from where they are from')
  raise UsageError(
    f'{path} holds no checkpoint: no {hf.CONFIG} of transformers, no {run_directory.MODEL_FILE} of '
    f't5x_lite, and neither {t5x.FILE} nor {t5x.PREFIX}STEP of T5X'
  )


def _from_hub(name: str) -> str:
  """Downloads a model of the hub and returns its folder."""
  name, at, revision = name.partition('@')
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', name) or bool(at) != bool(revision):
    raise UsageError(f'{name}{at}{revision} does not exist')
  missing = f'{name} is no local folder, and as the name of a model on the hub it cannot be fetched'
  hint = "huggingface_hub is not installed (in a checkout: pip install '.[hf]')"
  with refusing(f'{missing}: {hint}', ImportError):
    import huggingface_hub as hub
    from huggingface_hub import constants
  if not constants.ENDPOINT.startswith('https://'):
    raise UsageError(f'{missing}: HF_ENDPOINT is {constants.ENDPOINT}, not https')
  wanted = ['*.json', '*.safetensors', hf_tokenizer.SPIECE]
  with refusing(missing, Exception):
    folder = hub.snapshot_download(name, revision=revision or None, allow_patterns=wanted)
  log.info('%s from the hub: %s@%s gives it again', name, name, os.path.basename(folder))
  return folder


def _open_hf(path: epath.Path) -> Source:
  entry = hf.read_json(path / hf.CONFIG)
  check_one_of("config.json's model_type", str(entry.get('model_type')), hf.MODEL_TYPES)
  found, unknown = hf.canonical(hf.read_tensors(path), per_layer=hf.is_per_layer(entry))
  config = hf.model_config(entry, found)
  vocabulary = hf_tokenizer.read_vocabulary(path)
  # Before a piece is made for each.
  if vocabulary is not None and vocabulary.extra_ids > config.vocab_size:
    sentinels = f'{vocabulary.extra_ids} sentinels, the embedding {config.vocab_size} rows'
    raise UsageError(f'the tokenizer of {path} has {sentinels}')
  return Source(os.fspath(path), 'hf', config, found, unknown, vocabulary)


def _open_t5x(path: epath.Path) -> Source:
  folder = t5x.folder_of(path)
  found = t5x.read_tensors(path)
  params = t5x.canonical(found)
  config = t5x.model_config(params, folder)
  unknown = sorted(params.keys() - tensor_names.shapes(config).keys())
  moments = functools.partial(adafactor_moments.of_t5x, found, config)
  vocabulary = default_vocabulary(config)
  step = int(found['state/step'].read()) if 'state/step' in found else 0
  return Source(os.fspath(folder), 't5x', config, params, unknown, vocabulary, step, moments)


def default_vocabulary(config: T5Config) -> VocabularyConfig | None:
  """Returns the published vocabulary of a size, None if there are several: T5X's name none."""
  if config.vocab_size == 384:
    return VocabularyConfig(kind='byte')
  return VocabularyConfig() if config.vocab_size in (32_100, 32_128) else None


def _open_run(path: str) -> Source:
  directory, step = checkpoints.find_checkpoint(path)
  root, checkpoint = epath.Path(directory).parent, os.path.join(directory, str(step))
  config, lengths = run_directory.read_model(root)
  vocabulary = vocabularies.load_vocabulary(root)

  def check() -> int:
    try:
      zarr.verify(checkpoint, 'params.')
    except DamagedError as error:
      older = [s for s in checkpoints.steps_in(epath.Path(directory)) if s != step]
      hint = f'name an older one, {older}' if older else 'there is no other'
      raise DamagedError(f'{error}: {hint}') from error
    return 0

  distributed.from_primary(check)
  state = epath.Path(checkpoint) / 'state'
  found: dict[str, Tensor] = {}
  stored = zarr.orbax_tensors(state, zarr.Reader())
  for leaf, _, _ in tensor_names.leaves(config):
    name = '.'.join(('params', *leaf))
    if name not in stored:
      raise UsageError(f'{state} has no {name}')
    found |= of_leaf(stored[name], config, leaf)
  moments = functools.partial(adafactor_moments.of_run, stored, config)
  path = os.fspath(root)
  return Source(
    path, 't5x_lite', config, found, (), vocabulary, step, moments, lengths, checkpoint=checkpoint
  )
