"""What a run directory holds beside checkpoints, and how to open one.

  MODEL_DIR/model.json                   the architecture, and the lengths that it was trained with
  MODEL_DIR/vocabulary.json, .model      the vocabulary, self-contained
  MODEL_DIR/config.gin, config.json      the resolved configuration
  MODEL_DIR/metrics.jsonl, tensorboard/  see metric_writers.py
  MODEL_DIR/checkpoints/STEP/            see checkpoints.py

Inference reads a run through this module, so nothing here may import TensorFlow.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, refusing
from t5x_lite.models.config import T5Config
from t5x_lite.runs import files

MODEL_FILE = 'model.json'
CONFIG_FILE = 'config.json'

# A run may be continued with these changed: no parameter depends on them.
_FREE_FIELDS = ('attention', 'bidirectional_prefix', 'dropout_rate', 'dtype', 'remat_policy')


def read_model(root: epath.Path) -> tuple[T5Config, dict[str, int]]:
  """Returns a run's architecture, and its task feature lengths of training; UsageError if none."""
  file = root / MODEL_FILE
  if not file.exists():
    fix = 'name a run directory that `t5x-lite train` wrote'
    raise UsageError(f'{root} holds no {MODEL_FILE}; {fix}')
  with refusing(f'{file} is not a saved model', ValueError, KeyError, TypeError, RecursionError):
    entry = json.loads(files.retried(file, file.read_text))
    if unknown := set(entry) - {'model', 'lengths'}:
      raise ValueError(f'what is {min(unknown)!r}? It holds model and lengths')
    return T5Config(**entry['model']), dict(entry.get('lengths', {}))


def write_run(
  model_dir: str,
  *,
  model: T5Config,
  vocabulary: VocabularyConfig,
  lengths: Mapping[str, int] | None = None,
  config: Mapping[str, Any] | None = None,
  texts: Mapping[str, str] | None = None,
) -> None:
  """Writes everything but checkpoints that makes a directory a run; on one process alone.

  The vocabulary's model file is copied. Lengths are task feature lengths, inference's defaults; the
  config is the program's arguments, dataclasses allowed, for the record; texts are other small
  files, by name.
  """
  root = epath.Path(model_dir)
  files.retried(root, lambda: root.mkdir(parents=True, exist_ok=True))
  has_one = (root / vocabularies.VOCABULARY_FILE).exists()
  kept = vocabularies.load_vocabulary(root) if has_one else vocabulary
  if kept == vocabulary or not same_vocabulary(kept, vocabulary):
    files.retried(root, lambda: vocabularies.save_vocabulary(vocabulary, root))
  entry = {'model': dataclasses.asdict(model), 'lengths': dict(lengths or {})}
  files.write_json(root / MODEL_FILE, entry)
  if config is not None:
    files.write_json(root / CONFIG_FILE, to_json(config))
  for name, text in (texts or {}).items():
    files.write_text(root / name, text)


def check_resumable(model_dir: str, *, model: T5Config, vocabulary: VocabularyConfig) -> None:
  """Raises UsageError if the run in this directory is another model's."""
  root = epath.Path(model_dir)
  if not (root / MODEL_FILE).exists():
    return
  saved, _ = read_model(root)
  fix = 'continue with the value it was trained with, or use another model_dir'
  for field in dataclasses.fields(T5Config):
    old, new = getattr(saved, field.name), getattr(model, field.name)
    if old != new and field.name not in _FREE_FIELDS:
      differ = f'{field.name}={old!r}, the configuration {new!r}'
      raise UsageError(f'the run in {model_dir} has {differ}: {fix}')
  has_one = (root / vocabularies.VOCABULARY_FILE).exists()
  if has_one and not same_vocabulary(vocabularies.load_vocabulary(root), vocabulary):
    what = 'another vocabulary than the configuration names'
    raise UsageError(f'the run in {model_dir} was trained with {what}: {fix}')


def same_vocabulary(a: VocabularyConfig, b: VocabularyConfig) -> bool:
  """True if two configs give the same ids, wherever their files lie."""
  if dataclasses.replace(a, path='') != dataclasses.replace(b, path=''):
    return False
  one, other = (epath.Path(vocabularies.model_path(config)) for config in (a, b))
  return a.kind != 'sentencepiece' or one.read_bytes() == other.read_bytes()


def to_json(value: Any) -> Any:
  """Returns configuration as what JSON can hold; the rest as its repr."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    names = [field.name for field in dataclasses.fields(value)]
    return {'class': type(value).__name__, **{x: to_json(getattr(value, x)) for x in names}}
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_json(item) for item in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return getattr(value, '__qualname__', None) or repr(value)
