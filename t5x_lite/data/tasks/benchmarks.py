"""The public datasets of the T5 papers as tasks, under the names t5 gives them.

benchmarks.toml lists GLUE, SuperGLUE, SQuAD, TriviaQA, CNN/DailyMail, WMT, XNLI and their mixtures.
Texts (C4, mC4, Wikipedia, Wiki40B) are there under every objective (`c4_v220_span_corruption`). A
recipe is made when its name is asked for, and a dataset touched when it is read.
"""

import functools
import importlib.resources
import re
import tomllib
from collections.abc import Callable
from typing import Any

import seqio

from t5x_lite.data import benchmark_metrics
from t5x_lite.data import metrics as text_metrics
from t5x_lite.data.objectives.named import OBJECTIVES, find_objective
from t5x_lite.data.tasks import catalog, from_files, text_formats
from t5x_lite.data.tasks.catalog import MixtureRecipe, Recipe, TaskRecipe
from t5x_lite.data.tasks.tfds_source import PreparedSource

_XNLI_LANGUAGES = 'ar bg de el en es fr hi ru sw th tr ur vi zh'.split()

_RATES = {'examples': seqio.mixing_rate_num_examples, 'unsupervised': lambda task: 1e6}
# mT5's exponent of 0.3.
_MT5_RATE = catalog.proportional(temperature=1 / 0.3)

# ---- Supervised tasks --------------------------------------------------------


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
  folder = importlib.resources.files('t5x_lite.data.tasks')
  tables = tomllib.loads((folder / 'benchmarks.toml').read_text())
  xnli = tables['tasks'].pop('xnli_dev_test')
  tables['tasks'] |= {f'xnli_dev_test.{x}': {**xnli, 'language': x} for x in _XNLI_LANGUAGES}
  tables['mixtures'] |= _large_mixtures(tables['mixtures'])
  return tables


def _task(
  *,
  tfds: str,
  format: str,
  columns: str,
  metrics: str,
  splits: str = '',
  labels: str = '',
  postprocess: str = '',
  group: str = '',
  **settings: Any,
) -> TaskRecipe:
  """Returns the recipe of a line of the table."""
  parts = [word.partition('=') for word in (splits or 'train validation test').split()]
  pairs = [word.partition('=') for word in columns.split()]
  keys = {key: column or key for key, _, column in pairs}
  postprocess_fn: Any = getattr(benchmark_metrics, postprocess) if postprocess else None
  if labels:
    settings |= {'columns': keys, 'labels': labels.split()}
    postprocess_fn = functools.partial(benchmark_metrics.class_number, labels=labels.split())
  if group:
    postprocess_fn = functools.partial(
      benchmark_metrics.grouped, group=group.split(), value_fn=postprocess_fn
    )
  used = (*keys.values(), *(['label'] if labels else []))
  splits_by_name = {split: theirs or split for split, _, theirs in parts}
  source = functools.partial(PreparedSource, tfds, splits_by_name, used)
  return TaskRecipe(
    make_source=functools.cache(source),
    preprocessors=(
      functools.partial(getattr(text_formats, format), **settings),
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim,
    ),
    metric_fns=tuple(
      getattr(benchmark_metrics, name, None) or text_metrics.METRICS[name]
      for name in metrics.split()
    ),
    postprocess_fn=postprocess_fn,
    shuffle_buffer_size=1000,
    is_t5s=True,
  )


# ---- Mixtures ----------------------------------------------------------------


def _large_mixtures(small: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Returns t5's mixtures of all tasks, and of all but one."""
  benchmarks = ('glue_v002_proportional', 'super_glue_v102_proportional')
  others = (
    'cnn_dailymail_v002 squad_v010_allanswers wmt_t2t_ende_v003 wmt15_enfr_v003 wmt16_enro_v003'
  ).split()
  every: dict[str, Any] = (
    small[benchmarks[0]] | small[benchmarks[1]] | dict.fromkeys(others, 'examples')
  )
  # RTE is in both benchmarks.
  once = {name: rate / 2 if 'rte' in name else rate for name, rate in every.items()}
  text = 'c4_v020_unsupervised'
  xnli = ('xnli_train', *(f'xnli_dev_test.{language}' for language in _XNLI_LANGUAGES))
  found = {
    'all_equal': dict.fromkeys((*every, text), 1),
    'all_proportional': {**once, text: 'examples'},
    'all_mix': {text: 'unsupervised', **once},
    'xnli_zeroshot': dict.fromkeys(xnli, 1),
  }
  for left_out in (*benchmarks, *others):
    rates = every if left_out in benchmarks else once
    gone = small.get(left_out, [left_out])
    kept = {name: rate for name, rate in rates.items() if name not in gone}
    found[f'leave_one_out_{left_out}'] = {**kept, text: 'examples'}
  return found


def _mc4(objective: str) -> MixtureRecipe:
  from tensorflow_datasets.text import c4

  names = [f'mc4.{language.replace("-", "_")}_{objective}' for language in c4.MC4_LANGUAGES]
  return MixtureRecipe(rates=dict.fromkeys(names, _MT5_RATE), is_t5s=True)


# ---- Texts -------------------------------------------------------------------

_TEXT = re.compile(
  r'(c4(?P<c4>|_noclean|_realnewslike|_webtextlike)_v(020|220)'
  r'|wikipedia_(?P<wikipedia>\d{8}\.[a-z-]+)_v003'
  r'|wiki40b\.(?P<wiki40b>[a-z-]+)'
  r'|mc4\.(?P<mc4>[a-z]+(_Latn)?))'
  r'(_first(?P<first>\d+))?'  # documents, to be repeated
)


@functools.cache
def _text_source(text: str) -> tuple[PreparedSource, Callable] | None:
  match = _TEXT.fullmatch(text)
  if match is None:
    return None
  splits = {'train': 'train', 'validation': 'validation'}
  step = text_formats.plain_text
  if match['wikipedia']:
    name, splits = f'wikipedia/{match["wikipedia"]}:1.0.0', {'train': 'train'}
  elif match['wiki40b']:
    name, step = f'wiki40b/{match["wiki40b"]}:1.3.0', text_formats.wiki40b
  elif match['mc4']:
    language = match['mc4'].replace('_', '-')
    name = 'c4/multilingual:3.0.1'
    splits = {'train': language, 'validation': f'{language}-validation'}
  else:
    name = f'c4/en{match["c4"].replace("_", ".")}:2.2.0'
  if match['first']:
    splits['train'] += f'[:{match["first"]}]'
  return PreparedSource(name, splits, ('text',)), step


def _text_recipe(text: str, objective: str) -> Recipe | None:
  # t5's `unsupervised` is what gin makes of it; the published checkpoints' here.
  fn = find_objective('span_corruption' if objective == 'unsupervised' else objective)
  if text == 'mc4':
    return _mc4(objective) if fn is not None else None
  if (found := _text_source(text)) is None:
    return None
  if fn is None:
    return from_files.ul2(text) if objective == 'ul2' else None
  source, step = found
  return from_files.unsupervised(lambda: source, fn, steps=(step,), is_t5s=True)


# ---- By name -----------------------------------------------------------------


def names() -> tuple[str, ...]:
  """Returns the names of tasks and mixtures; of texts C4's and mC4's own."""
  texts = (f'c4_v220_{objective}' for objective in OBJECTIVES)
  return (*_tables()['tasks'], *_tables()['mixtures'], *texts, 'mc4', 'mc4_span_corruption')


@functools.cache
def find(name: str) -> Recipe | None:
  """Returns the recipe of a task or mixture, or None; UsageError for an objective's bad rate."""
  if name in _tables()['tasks']:
    return _task(**_tables()['tasks'][name])
  if name in _tables()['mixtures']:
    rates = _tables()['mixtures'][name]
    return MixtureRecipe(rates={t: _RATES.get(r, r) for t, r in rates.items()}, is_t5s=True)
  # mT5's names say no objective.
  splits = [(name, 'span_corruption')] if name.startswith('mc4') else []
  splits += [(name[: at.start()], name[at.end() :]) for at in re.finditer('_', name)]
  recipes = (_text_recipe(text, objective) for text, objective in splits)
  return next((recipe for recipe in recipes if recipe is not None), None)


catalog.add_finder(find, names)
