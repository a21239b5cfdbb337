"""The embedded tasks and mixtures.

Importing this module adds them to the catalog and registers them for the official T5 vocabulary
(`pronounce_t5`) and for bytes (`pronounce_byte`); `catalog.resolve(name, vocabulary)` for others.

Names, prefixes and rates are part of every model trained with them, so they do not change.
"""

import functools
import importlib.resources
import re
from collections.abc import Callable

import seqio

from t5x_lite.data import metrics
from t5x_lite.data.tasks import catalog, sources
from t5x_lite.data.tasks.catalog import MixtureRecipe
from t5x_lite.data.tasks.from_files import register_text_task, supervised


def _path(corpus: str, split: str, ending: str = 'tsv') -> str:
  folder = importlib.resources.files('t5x_lite.data.corpora')
  return str(folder / f'{corpus}_{split}.{ending}.gz')


def _add_pairs(
  name: str,
  corpus: str,
  *metric_fns: metrics.MetricFn,
  prefix: str,
  separator: str = '',
  read: Callable[[str], sources.Columns] = sources.read_pairs,
) -> None:
  """Adds a task of an embedded TSV corpus to the catalog."""
  splits = ('train', 'validation', 'test')
  split_to_rows = {split: functools.partial(read, _path(corpus, split)) for split in splits}
  recipe = supervised(split_to_rows, prefix=prefix, metric_fns=metric_fns, separator=separator)
  catalog.add(name, recipe)


def _read_syllables(path: str) -> sources.Columns:
  """Returns words and their number of syllables: vowels carry a stress."""
  columns = sources.read_pairs(path)
  first = [text.split(' | ')[0] for text in columns['targets']]
  return {**columns, 'targets': [str(len(re.findall(r'[012]', text))) for text in first]}


_add_pairs(
  'pronounce', 'cmudict', metrics.pronunciation_error_rates, prefix='pronounce: ', separator=' | '
)
_add_pairs('syllables', 'cmudict', metrics.accuracy, prefix='syllables: ', read=_read_syllables)
_add_pairs('language_id', 'language_id', metrics.accuracy, prefix='language: ')
for _ending, _language in (('de', 'German'), ('fr', 'French')):
  _add_pairs(
    f'translate_en_{_ending}',
    f'translate_en_{_ending}',
    metrics.bleu,
    metrics.chrf,
    prefix=f'translate English to {_language}: ',
  )
register_text_task(
  'shakespeare',
  train_file=_path('shakespeare', 'train', 'txt'),
  validation_file=_path('shakespeare', 'validation', 'txt'),
  lines_per_document=32,  # paragraphs that stay together when documents are shuffled
  objective='all',
)

# Every row as often as any other.
for _name, _tasks in (
  ('translate', ('translate_en_de', 'translate_en_fr')),
  ('embedded_tasks', ('pronounce', 'language_id', 'translate_en_de', 'translate_en_fr')),
):
  catalog.add(_name, MixtureRecipe(rates=dict.fromkeys(_tasks, seqio.mixing_rate_num_examples)))
# What ten minutes can learn; translation is not among it (docs/lab_notes.md).
catalog.add(
  'quickstart_mixture',
  MixtureRecipe(rates={'pronounce': 0.57, 'language_id': 0.37, 'syllables': 0.06}),
)

for _vocabulary in catalog.VOCABULARIES.values():
  for _name in catalog.catalog():
    _recipe = catalog.find_recipe(_name)
    if _recipe is not None and not _recipe.is_t5s:
      catalog.resolve(_name, _vocabulary)
