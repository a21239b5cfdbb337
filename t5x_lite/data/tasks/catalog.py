"""The catalog: recipes of tasks and mixtures, registered for any vocabulary.

SeqIO binds a vocabulary to a task when the task is registered. A recipe here
has none; `resolve(name, vocabulary)` registers it as NAME_SUFFIX when it is
first asked for, and returns that name.
"""

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio

from t5x_lite.data import metrics, vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.objectives.named import Preprocessor
from t5x_lite.data.tasks import text_preprocessors
from t5x_lite.data.tasks.seqio_vocabulary import to_seqio
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

# Suffixes that can be read. Any other vocabulary gets its fingerprint.
VOCABULARIES = {'t5': VocabularyConfig(), 'byte': VocabularyConfig(kind='byte')}

Rate = float | Callable[[seqio.Task], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRecipe:
  """A task but for its vocabulary.

  Attributes:
    make_source: makes the source; called once, its rows serve all vocabularies.
    preprocessors: SeqIO's, from rows to examples.
    features: names of the output features.
    metric_fns: for the evaluation; empty means only the loss.
    postprocess_fn: SeqIO's.
    shuffle_buffer_size: examples; None where the source shuffles whole.
  """

  # Any: seqio.DataSource does not meet the registry's own annotation.
  make_source: Callable[[], Any]
  preprocessors: tuple[Preprocessor, ...] = ()
  features: tuple[str, ...] = ('inputs', 'targets')
  metric_fns: tuple[metrics.MetricFn, ...] = ()
  postprocess_fn: Callable | None = None
  shuffle_buffer_size: int | None = None

  def register(self, name: str, vocabulary: VocabularyConfig) -> None:
    """Adds the task to SeqIO's registry."""
    feature = seqio.Feature(vocabulary=to_seqio(vocabulary), add_eos=True)
    seqio.TaskRegistry.add(
      name,
      source=self.make_source(),
      preprocessors=list(self.preprocessors),
      output_features={key: feature for key in self.features},
      metric_fns=list(self.metric_fns),
      postprocess_fn=self.postprocess_fn,
      shuffle_buffer_size=self.shuffle_buffer_size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureRecipe:
  """A mixture but for its vocabulary: rates by name of recipe."""

  rates: Mapping[str, Rate]

  def register(self, name: str, vocabulary: VocabularyConfig) -> None:
    """Adds the mixture, and the tasks that it needs, to SeqIO's registry."""
    rates = [(resolve(task, vocabulary), rate) for task, rate in self.rates.items()]
    seqio.MixtureRegistry.add(name, rates)


_CATALOG: dict[str, TaskRecipe | MixtureRecipe] = {}
# Full names of a recipe that are registered.
_RESOLVED: dict[str, set[str]] = {}


# ---- Finding and registering -------------------------------------------------


def catalog() -> tuple[str, ...]:
  """Returns the names that `resolve` can register for any vocabulary."""
  return tuple(sorted(_CATALOG))


@functools.lru_cache
def suffix(vocabulary: VocabularyConfig) -> str:
  """Returns the suffix of the registered names: 't5', 'byte' or a fingerprint.

  It follows from what the vocabulary is, not where its file lies.
  """
  fingerprint = vocabularies.fingerprint(vocabulary)
  for name, known in VOCABULARIES.items():
    if vocabularies.fingerprint(known) == fingerprint:
      return name
  return fingerprint


def resolve(name: str, vocabulary: VocabularyConfig) -> str:
  """Returns the SeqIO name of a task or mixture with this vocabulary.

  Args:
    name: of the catalog (`pronounce`), registered now if need be; or any name
      that SeqIO knows already (`pronounce_byte`, a user's own).
    vocabulary: the model's.

  Raises:
    UsageError: if there is no such name, or its task has another vocabulary.
  """
  if name in _CATALOG:
    full_name = f'{name}_{suffix(vocabulary)}'
    if not is_registered(full_name):
      _CATALOG[name].register(full_name, vocabulary)
      _RESOLVED.setdefault(name, set()).add(full_name)
    return full_name
  provider = find_provider(name)
  wanted = to_seqio(vocabulary)
  for key, feature in provider.output_features.items():
    if not _same(feature.vocabulary, wanted):
      raise UsageError(
        f'{name!r} has the vocabulary {feature.vocabulary} for {key!r}, the '
        f'model {wanted}; name a task without its vocabulary '
        f'({", ".join(sorted(_CATALOG)[:3])}, ...) or change '
        'VocabularyConfig'
      )
  return name


def register_catalog(vocabulary: VocabularyConfig) -> tuple[str, ...]:
  """Registers the whole catalog for a vocabulary; returns the full names."""
  return tuple(resolve(name, vocabulary) for name in catalog())


def register_mixture(
  name: str, rates: Mapping[str, Rate], *, vocabulary: VocabularyConfig | None = None
) -> None:
  """Adds a mixture of tasks of the catalog.

  Args:
    name: of the mixture.
    rates: tasks or mixtures of the catalog, with how often each is drawn
      relative to the others.
    vocabulary: if given, the mixture is registered as `name` with it; else
      `name` joins the catalog.
  """
  import_modules()
  for task, rate in rates.items():
    if task not in _CATALOG and not is_registered(task):
      raise UsageError(
        f'The mixture {name!r} names {task!r}, which is not registered; there '
        f'are {", ".join(sorted(_CATALOG))}'
      )
    if not callable(rate) and rate <= 0:
      raise UsageError(
        f'The mixture {name!r} gives {task!r} the rate {rate}; rates must be more than 0'
      )
  add(name, MixtureRecipe(rates=dict(rates)), vocabulary)


def texts(name: str, split: str = 'train') -> Iterator[str]:
  """Yields the text of a task or mixture as it is before the tokenization.

  Raises:
    UsageError: if there is no such name or split.
  """
  import_modules()
  full_name = resolve(name, VOCABULARIES['byte']) if name in _CATALOG else name
  provider = find_provider(full_name)
  if split not in provider.splits:
    raise UsageError(f'{name!r} has no split {split!r}, only {", ".join(provider.splits)}')
  for task in seqio.get_subtasks(provider):
    if split not in task.splits:
      continue
    dataset = task.source.get_dataset(split=split, shuffle=False)
    for preprocessor in task.preprocessors:
      if preprocessor in _TOKENIZERS:
        break
      dataset = seqio.utils.add_kwargs_to_transform(
        preprocessor, output_features=task.output_features
      )(dataset)
    for example in dataset.as_numpy_iterator():
      for key in task.output_features:
        # One text, or those of many rows.
        for text in np.ravel(example.get(key, [])):
          if isinstance(text, bytes):
            yield text.decode('utf-8')


_TOKENIZERS = (
  seqio.preprocessors.tokenize,
  seqio.preprocessors.tokenize_and_append_eos,
  text_preprocessors.tokenize_rows,
  text_preprocessors.tokenize_documents,
)


def is_registered(name: str) -> bool:
  """Returns whether SeqIO knows a task or mixture of this full name."""
  return name in _registered()


def find_provider(name: str) -> seqio.Task | seqio.Mixture:
  """Returns the task or mixture that SeqIO knows under this full name.

  Raises:
    UsageError: if there is none; the message lists close matches.
  """
  if not is_registered(name):
    known = [*_CATALOG, *_registered()]
    close = difflib.get_close_matches(name, known, n=3) or sorted(_CATALOG)
    raise UsageError(
      f'There is no task or mixture {name!r}; did you mean {", ".join(close)}? '
      'Tasks of your own: name the module that registers them in '
      'DatasetConfig.module'
    )
  return seqio.get_mixture_or_task(name)


def _registered() -> set[str]:
  return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def add(
  name: str, recipe: TaskRecipe | MixtureRecipe, vocabulary: VocabularyConfig | None = None
) -> None:
  """Adds a recipe to the catalog, or registers it for one vocabulary alone.

  Raises:
    UsageError: if the name is taken.
  """
  if name in _CATALOG or is_registered(name):
    raise UsageError(f'There is a task or mixture {name!r} already; choose another name')
  if vocabulary is None:
    _CATALOG[name] = recipe
  else:
    recipe.register(name, vocabulary)


def replace(name: str, recipe: TaskRecipe | MixtureRecipe) -> None:
  """Adds a recipe in the place of one of this name.

  For tasks that live as long as a call: a notebook fine-tunes many times.
  """
  for full_name in _RESOLVED.pop(name, set()):
    seqio.TaskRegistry.remove(full_name)
  _CATALOG[name] = recipe


def _same(a: seqio.Vocabulary, b: seqio.Vocabulary) -> bool:
  """Returns whether two vocabularies give the same ids, wherever they lie."""
  if a == b:
    return True
  if isinstance(a, seqio.SentencePieceVocabulary):
    return isinstance(b, seqio.SentencePieceVocabulary) and a.sp_model == b.sp_model
  return False


def import_modules(modules: str = '') -> None:
  """Imports what registers tasks: the embedded ones, and the user's own.

  Args:
    modules: names of Python modules, comma-separated.

  Raises:
    UsageError: a module that cannot be imported.
  """
  for module in ('t5x_lite.data.tasks.embedded', *modules.split(',')):
    if not module.strip():
      continue
    try:
      importlib.import_module(module.strip())
    except ModuleNotFoundError as error:
      raise UsageError(
        f'module {module.strip()!r} cannot be imported: {error}; it must be '
        'installed or on PYTHONPATH'
      ) from error


def task_provider(cfg: DatasetConfig) -> seqio.Task | seqio.Mixture:
  """Returns the registered task or mixture, checked against the config.

  Raises:
    UsageError: no such name, split, feature or module.
  """
  import_modules(cfg.module)
  name = cfg.mixture_or_task_name
  provider = find_provider(name)
  if cfg.split not in provider.splits:
    raise UsageError(f'{name} has no split {cfg.split!r}, only {sorted(provider.splits)}')
  for feature in cfg.lengths:
    spec = provider.output_features.get(feature)
    if spec is None:
      raise UsageError(
        f'task_feature_lengths names {feature!r}, but the output features of '
        f'{name} are {sorted(provider.output_features)}'
      )
    if spec.rank != 1 or not spec.dtype.is_integer:
      raise UsageError(
        f'feature {feature!r} of {name} is {spec.dtype.name} of rank '
        f'{spec.rank}; the converters take sequences of ids'
      )
  return provider


def short_name(task: str, vocabulary: VocabularyConfig) -> str:
  """Returns a task's name without the suffix that names its vocabulary."""
  base = task.removesuffix('_' + suffix(vocabulary))
  return base if base in _CATALOG else task
