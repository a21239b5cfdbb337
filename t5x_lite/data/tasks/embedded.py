"""The embedded tasks and mixtures.

Importing this module adds them to the catalog and registers them for the
official T5 vocabulary and for bytes: `pronounce_t5`, `pronounce_byte` and so
on. `catalog.resolve(name, vocabulary)` does it for any other vocabulary.

Names, prefixes and rates are part of every model trained with them, so they
do not change.
"""

import functools
import importlib.resources
import re

import seqio

from t5x_lite.data import metrics
from t5x_lite.data.tasks import sources
from t5x_lite.data.tasks.catalog import (
  VOCABULARIES,
  MixtureRecipe,
  add,
  catalog,
  find_recipe,
  resolve,
)
from t5x_lite.data.tasks.from_files import register_text_task, supervised

# Paragraphs of Shakespeare that stay together when documents are shuffled.
_LINES_PER_DOCUMENT = 32


def _path(corpus: str, split: str, ending: str) -> str:
  folder = importlib.resources.files('t5x_lite.data.corpora')
  return str(folder / f'{corpus}_{split}.{ending}.gz')


def _add_pairs(
  name: str,
  corpus: str,
  *,
  prefix: str,
  metric_fns: tuple[metrics.MetricFn, ...],
  separator: str = '',
) -> None:
  """Adds a task of an embedded TSV corpus to the catalog."""
  split_to_rows = {
    split: functools.partial(sources.read_pairs, _path(corpus, split, 'tsv'))
    for split in ('train', 'validation', 'test')
  }
  add(name, supervised(split_to_rows, prefix=prefix, metric_fns=metric_fns, separator=separator))


_add_pairs(
  'pronounce',
  'cmudict',
  prefix='pronounce: ',
  metric_fns=(metrics.pronunciation_error_rates,),
  separator=' | ',
)
_add_pairs('language_id', 'language_id', prefix='language: ', metric_fns=(metrics.accuracy,))
_add_pairs(
  'translate_en_de',
  'translate_en_de',
  prefix='translate English to German: ',
  metric_fns=(metrics.bleu, metrics.chrf),
)
_add_pairs(
  'translate_en_fr',
  'translate_en_fr',
  prefix='translate English to French: ',
  metric_fns=(metrics.bleu, metrics.chrf),
)


def _read_syllables(path: str) -> sources.Columns:
  """Returns words and their number of syllables: vowels carry a stress."""
  columns = sources.read_pairs(path)
  first = [text.split(' | ')[0] for text in columns['targets']]
  counts = [str(len(re.findall(r'[012]', text))) for text in first]
  return {'inputs': columns['inputs'], 'targets': counts}


add(
  'syllables',
  supervised(
    {
      split: functools.partial(_read_syllables, _path('cmudict', split, 'tsv'))
      for split in ('train', 'validation', 'test')
    },
    prefix='syllables: ',
    metric_fns=(metrics.accuracy,),
  ),
)

register_text_task(
  'shakespeare',
  train_file=_path('shakespeare', 'train', 'txt'),
  validation_file=_path('shakespeare', 'validation', 'txt'),
  lines_per_document=_LINES_PER_DOCUMENT,
  objective='all',
)

add(
  'translate',
  MixtureRecipe(
    rates={
      'translate_en_de': seqio.mixing_rate_num_examples,
      'translate_en_fr': seqio.mixing_rate_num_examples,
    }
  ),
)
# Every row as often as any other.
add(
  'embedded_tasks',
  MixtureRecipe(
    rates={
      'pronounce': seqio.mixing_rate_num_examples,
      'language_id': seqio.mixing_rate_num_examples,
      'translate_en_de': seqio.mixing_rate_num_examples,
      'translate_en_fr': seqio.mixing_rate_num_examples,
    }
  ),
)
# What ten minutes can learn; translation is not among it (docs/lab_notes.md).
add(
  'quickstart_mixture',
  MixtureRecipe(rates={'pronounce': 0.57, 'language_id': 0.37, 'syllables': 0.06}),
)

for _vocabulary in VOCABULARIES.values():
  for _name in catalog():
    _recipe = find_recipe(_name)
    if _recipe is not None and not _recipe.is_t5s:
      resolve(_name, _vocabulary)
