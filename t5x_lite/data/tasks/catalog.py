"""The catalog: recipes of tasks and mixtures, registered for any vocabulary.

SeqIO binds a vocabulary to a task when the task is registered. A recipe here has none;
`resolve(name, vocabulary)` registers it as NAME_SUFFIX when first asked for, and returns that name.
"""

import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from t5x_lite.data import metrics, vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.objectives.named import Preprocessor
from t5x_lite.data.tasks import text_preprocessors, tfds_source
from t5x_lite.data.tasks.seqio_vocabulary import to_seqio
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, refusing, suggest

# Suffixes that can be read. Any other vocabulary gets its fingerprint.
VOCABULARIES = {'t5': VocabularyConfig(), 'byte': VocabularyConfig(kind='byte')}

Rate = float | Callable[[seqio.Task], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRecipe:
  """A task but for its vocabulary."""

  # Makes the source; called once, its rows serve all vocabularies. Any: seqio.DataSource does not
  # meet the registry's own annotation.
  make_source: Callable[[], Any]
  preprocessors: tuple[Preprocessor, ...] = ()
  features: tuple[str, ...] = ('inputs', 'targets')  # names of the output features
  metric_fns: tuple[metrics.MetricFn, ...] = ()  # for the evaluation; empty means only the loss
  postprocess_fn: Callable | None = None
  shuffle_buffer_size: int | None = None  # examples; None where the source shuffles whole
  # t5 has a task of this name: with T5's vocabulary it has that alone, as T5X users cached it.
  is_t5s: bool = False

  def register(self, name: str, vocabulary: VocabularyConfig) -> None:
    """Adds the task to SeqIO's registry."""
    feature = seqio.Feature(vocabulary=to_seqio(vocabulary), add_eos=True)
    seqio.TaskRegistry.add(
      name,
      source=self.make_source(),
      preprocessors=list(self.preprocessors),
      output_features=dict.fromkeys(self.features, feature),
      metric_fns=list(self.metric_fns),
      postprocess_fn=self.postprocess_fn,
      shuffle_buffer_size=self.shuffle_buffer_size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureRecipe:
  """A mixture but for its vocabulary: rates by name of recipe."""

  rates: Mapping[str, Rate]
  is_t5s: bool = False

  def register(self, name: str, vocabulary: VocabularyConfig) -> None:
    """Adds the mixture, and the tasks that it needs, to SeqIO's registry."""
    rates = [(resolve(task, vocabulary), rate) for task, rate in self.rates.items()]
    seqio.MixtureRegistry.add(name, rates)


Recipe = TaskRecipe | MixtureRecipe

_CATALOG: dict[str, Recipe] = {}
# Makers of recipes whose names follow a rule.
_FINDERS: list[tuple[Callable[[str], Recipe | None], Callable[[], tuple[str, ...]]]] = []
# Full names of a recipe that are registered.
_RESOLVED: dict[str, set[str]] = {}


# ---- Finding and registering -------------------------------------------------


def catalog() -> tuple[str, ...]:
  """Returns the names that `resolve` can register for any vocabulary, of finders the usual ones."""
  return tuple(sorted({*_CATALOG, *(name for _, names in _FINDERS for name in names())}))


def add_finder(find: Callable[[str], Recipe | None], names: Callable[[], tuple[str, ...]]) -> None:
  """Adds what makes a recipe of a name that the catalog lacks, or None; `names` lists examples."""
  _FINDERS.append((find, names))


def find_recipe(name: str) -> Recipe | None:
  """Returns the recipe of a name, if there is one."""
  if name in _CATALOG:
    return _CATALOG[name]
  return next((recipe for find, _ in _FINDERS if (recipe := find(name)) is not None), None)


@functools.lru_cache
def suffix(vocabulary: VocabularyConfig) -> str:
  """Returns 't5', 'byte' or a fingerprint of the ids, wherever the vocabulary's file lies."""
  known = {vocabularies.fingerprint(one): name for name, one in VOCABULARIES.items()}
  fingerprint = vocabularies.fingerprint(vocabulary)
  return known.get(fingerprint, fingerprint)


def resolve(name: str, vocabulary: VocabularyConfig) -> str:
  """Returns the SeqIO name of a task or mixture with the model's vocabulary.

  A name of the catalog (`pronounce`) is registered now if need be; SeqIO may know a name already
  (`pronounce_byte`, a user's own). UsageError if there is none, or of another vocabulary.
  """
  # A user's own task goes before one of ours.
  is_users = is_registered(name) and name not in _RESOLVED.get(name, ())
  recipe = None if is_users else find_recipe(name)
  if recipe is not None:
    full_name = re.sub(r'[^\w.:#]', ':', name)  # SeqIO's letters
    if not (recipe.is_t5s and suffix(vocabulary) == 't5'):
      full_name = f'{full_name}_{suffix(vocabulary)}'
    if not is_registered(full_name):
      recipe.register(full_name, vocabulary)
      _RESOLVED.setdefault(name, set()).add(full_name)
    return full_name
  wanted = to_seqio(vocabulary)
  for key, feature in find_provider(name).output_features.items():
    if feature.dtype.is_integer and not _same(feature.vocabulary, wanted):  # not loss weights
      raise UsageError(
        f'{name!r} has the vocabulary {feature.vocabulary} for {key!r}, the model {wanted}; name a '
        f'task without its vocabulary ({", ".join(sorted(_CATALOG)[:3])}, ...) or change '
        'VocabularyConfig'
      )
  return name


def register_mixture(
  name: str,
  rates: Mapping[str, Rate] | Sequence[str],
  *,
  limit: int | None = None,
  temperature: float = 1.0,
  vocabulary: VocabularyConfig | None = None,
) -> None:
  """Adds a mixture of tasks or mixtures of the catalog.

  `register_mixture('mine', ['a', 'b'], limit=2**16)` draws each task as often as it has examples,
  or 2**16 of them at most. Rates say how often each is drawn relative to the others; names alone
  mean examples-proportional rates over all their tasks, with the paper's K as limit and its T as
  temperature: rates to the power of 1 / T. With a vocabulary, `name` is registered for it alone;
  else it joins the catalog. UsageError if a task is not there or a rate has no meaning.
  """
  import_modules()
  if isinstance(rates, Mapping):
    if limit is not None or temperature != 1.0:
      raise UsageError(f'The mixture {name!r} has rates: limit and temperature are for names alone')
  else:
    rate = proportional(limit=limit, temperature=temperature)
    rates = dict.fromkeys((task for part in rates for task in leaves(part)), rate)
  for task, rate in rates.items():
    check_known(name, task)
    if not callable(rate) and rate <= 0:
      what = f'The mixture {name!r} gives {task!r} the rate {rate}'
      raise UsageError(f'{what}; rates must be more than 0')
  add(name, MixtureRecipe(rates=dict(rates)), vocabulary)


def check_known(mixture: str, task: str) -> None:
  """Raises UsageError if a mixture's task is neither in the catalog nor registered."""
  if find_recipe(task) is None and not is_registered(task):
    hint = suggest(task, catalog()) or f'; there are {", ".join(sorted(_CATALOG))}'
    raise UsageError(f'The mixture {mixture!r} names {task!r}, which is not registered{hint}')


def proportional(*, limit: int | None = None, temperature: float = 1.0) -> Rate:
  """Returns the paper's rate, min(examples, K) ** (1 / T); UsageError if one is not more than 0."""
  for key, value in (('limit', limit), ('temperature', temperature)):
    if value is not None and not value > 0:
      raise UsageError(f'{key} of a mixture is {value}; it must be more than 0')
  return functools.partial(seqio.mixing_rate_num_examples, maximum=limit, temperature=temperature)


def leaves(name: str) -> list[str]:
  """Returns the tasks of a mixture with rates above 0, nested ones too, or a task itself."""
  recipe = find_recipe(name)
  if isinstance(recipe, MixtureRecipe):
    found = [leaf for task, rate in recipe.rates.items() if rate != 0 for leaf in leaves(task)]
    return list(dict.fromkeys(found))
  if recipe is None and name in seqio.MixtureRegistry.names():
    return [task.name for task in seqio.MixtureRegistry.get(name).tasks]
  return [name]


# Tokenizers of supervised tasks, whose examples the lengths cut.
TRIMMED_TOKENIZERS = (
  seqio.preprocessors.tokenize,
  seqio.preprocessors.tokenize_and_append_eos,
  text_preprocessors.tokenize_rows,
)


def texts(name: str, split: str = 'train') -> Iterator[str]:
  """Yields a task's or mixture's untokenized text; UsageError if there is no such name or split."""
  import_modules()
  full_name = name if is_registered(name) else resolve(name, VOCABULARIES['byte'])
  provider = find_provider(full_name, split)
  for task in (one for one in seqio.get_subtasks(provider) if split in one.splits):
    dataset = task.source.get_dataset(split=split, shuffle=False)
    for step in task.preprocessors:
      if step in (*TRIMMED_TOKENIZERS, text_preprocessors.tokenize_documents):
        break
      transform = seqio.utils.add_kwargs_to_transform(step, output_features=task.output_features)
      dataset = transform(dataset)
    for example in dataset.as_numpy_iterator():
      for key in task.output_features:
        # One text, or those of many rows.
        found = [text for text in np.ravel(example.get(key, [])) if isinstance(text, bytes)]
        yield from (text.decode('utf-8') for text in found)


def is_registered(name: str) -> bool:
  """Returns whether SeqIO knows a task or mixture of this full name."""
  return name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def find_provider(name: str, split: str = '') -> seqio.Task | seqio.Mixture:
  """Returns SeqIO's task or mixture of this full name; UsageError if it, or the split, is none."""
  if not is_registered(name):
    if name in catalog():
      raise UsageError(f'{name!r} is a recipe: catalog.resolve(name, vocabulary) makes it a task')
    known = {*catalog(), *seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    hint = suggest(name, known) or f'; there are {", ".join(catalog())}.'
    fix = 'name the module that registers them in DatasetConfig.module'
    raise UsageError(f'There is no task or mixture {name!r}{hint} Tasks of your own: {fix}')
  provider = seqio.get_mixture_or_task(name)
  for task in seqio.get_subtasks(provider):
    tfds_source.read_prepared(task.source)
  if split and split not in provider.splits:
    raise UsageError(f'{name} has no split {split!r}, only {", ".join(sorted(provider.splits))}')
  return provider


def add(name: str, recipe: Recipe, vocabulary: VocabularyConfig | None = None) -> None:
  """Adds a recipe to the catalog, or registers it for one vocabulary; UsageError if it is there."""
  if name in _CATALOG or is_registered(name):
    raise UsageError(f'There is a task or mixture {name!r} already; choose another name')
  if vocabulary is None:
    _CATALOG[name] = recipe
  else:
    recipe.register(name, vocabulary)


def replace(name: str, recipe: Recipe) -> None:
  """Adds a recipe in the place of one of this name: a notebook fine-tunes many times."""
  for full_name in _RESOLVED.pop(name, set()):
    seqio.TaskRegistry.remove(full_name)
  _CATALOG[name] = recipe


def _same(a: seqio.Vocabulary, b: seqio.Vocabulary) -> bool:
  """Returns whether two vocabularies give the same ids, wherever they lie."""
  kind = seqio.SentencePieceVocabulary
  return a == b or (isinstance(a, kind) and isinstance(b, kind) and a.sp_model == b.sp_model)


def import_modules(modules: str = '') -> None:
  """Imports what registers tasks: the embedded ones, and the user's own, separated by commas.

  UsageError for a module that cannot be imported.
  """
  cached = os.environ.get('SEQIO_CACHE_DIRS', '')  # --seqio_additional_cache_dirs
  seqio.add_global_cache_dirs([path for path in cached.split(',') if path])
  ours = (f't5x_lite.data.tasks.{name}' for name in ('embedded', 'benchmarks', 'mixing'))
  for module in filter(None, map(str.strip, (*ours, *modules.split(',')))):
    fix = 'it must be installed or on PYTHONPATH'
    with refusing(f'module {module!r} cannot be imported; {fix}', ModuleNotFoundError):
      importlib.import_module(module)


def task_provider(cfg: DatasetConfig) -> seqio.Task | seqio.Mixture:
  """Returns the config's task or mixture; UsageError for no such name, split, feature or module."""
  import_modules(cfg.module)
  name = cfg.mixture_or_task_name
  provider = find_provider(name, cfg.split)
  for feature in cfg.lengths:
    spec = provider.output_features.get(feature)
    if spec is None:
      there = f'but the output features of {name} are {sorted(provider.output_features)}'
      raise UsageError(f'task_feature_lengths names {feature!r}, {there}')
    if spec.rank != 1 or not spec.dtype.is_integer:
      what = f'{spec.dtype.name} of rank {spec.rank}'
      raise UsageError(f'feature {feature!r} of {name} is {what}, and no sequence of ids')
  return provider


def short_name(task: str, vocabulary: VocabularyConfig) -> str:
  """Returns a task's name without the suffix that names its vocabulary."""
  base = task.removesuffix('_' + suffix(vocabulary))
  return base if find_recipe(base) is not None else task
