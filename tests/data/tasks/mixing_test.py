"""Mixtures by name: what they mix and how often."""

import collections

import numpy as np
import pytest
import seqio

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import dataset_iterator
from t5x_lite.data.tasks import catalog, mixing
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

BYTES = VocabularyConfig(kind='byte')


def shares(name):
  catalog.import_modules()
  return mixing.shares(seqio.get_mixture_or_task(catalog.resolve(name, BYTES)), 'train')


def rows(name):
  return seqio.get_mixture_or_task(name).num_input_examples('train')


def test_the_papers_three_ways():
  catalog.import_modules()
  p, q = rows('pronounce_byte'), rows('language_id_byte')
  for name, a, b in (
    ('pronounce+language_id', p, q),
    ('pronounce+language_id_equal', 1, 1),
    ('pronounce+language_id_limit50000', min(p, 50_000), min(q, 50_000)),
    ('pronounce+language_id_temperature2', p**0.5, q**0.5),
    ('pronounce+language_id_limit50000_temperature4', min(p, 5e4) ** 0.25, min(q, 5e4) ** 0.25),
    ('pronounce*0.7+language_id*0.3', 0.7, 0.3),
  ):
    want = {'pronounce_byte': a / (a + b), 'language_id_byte': b / (a + b)}
    assert shares(name) == pytest.approx(want), name


def test_a_mixture_in_a_mixture_is_its_tasks():
  got = shares('translate+pronounce_equal')
  assert got == pytest.approx(
    dict.fromkeys(('translate_en_de_byte', 'translate_en_fr_byte', 'pronounce_byte'), 1 / 3)
  )
  assert shares('embedded_tasks_equal') == pytest.approx(
    dict.fromkeys([f'{name}_byte' for name in catalog.leaves('embedded_tasks')], 1 / 4)
  )
  catalog.register_mixture('mixing_test_all', ['translate', 'pronounce'], temperature=2)
  assert shares('mixing_test_all') == pytest.approx(shares('translate+pronounce_temperature2'))


def test_ul2_is_seven_denoisers_equally_often():
  got = shares('shakespeare_ul2')
  assert len(got) == 7 and list(got.values()) == pytest.approx([1 / 7] * 7)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('pronounce+nothing', "'nothing', which is not registered"),
    ('pronounce*0+language_id*1', "rate '0'"),
    ('pronounce*0.5+language_id', 'every task a rate'),
    ('pronounce+language_id_temperature0', 'temperature of a mixture is 0.0'),
    ('pronounce_limit5', 'no task or mixture'),
  ],
)
def test_bad_names_are_one_line(name, message):
  catalog.import_modules()
  with pytest.raises(UsageError, match=message):
    catalog.resolve(name, BYTES)


def test_a_table_lists_the_largest_first():
  catalog.import_modules()
  name = catalog.resolve('pronounce*3+language_id*1', BYTES)
  lines = mixing.table(seqio.get_mixture_or_task(name), 'train').splitlines()
  assert [line.split() for line in lines] == [
    ['pronounce_byte', '75.000%'],
    ['language_id_byte', '25.000%'],
  ]
  assert mixing.table(seqio.get_mixture_or_task('pronounce_byte'), 'train') == ''


@pytest.mark.parametrize('num_epochs', [None, 1])
def test_task_numbers_travel_with_the_tokens(num_epochs):
  """Of every packed token, and nothing else changes."""
  catalog.import_modules()
  cfg = {
    'mixture_or_task_name': catalog.resolve('syllables*1+language_id*1', BYTES),
    'task_feature_lengths': {'inputs': 96, 'targets': 48},
    'batch_size': 8,
    'window': 64,
    'num_threads': 1,
    'num_epochs': num_epochs,
  }
  found = {}
  for wanted in (False, True):
    iterator = dataset_iterator.DatasetIterator(DatasetConfig(**cfg, per_task_loss=wanted))
    found[wanted] = next(iterator)
    iterator.close()
  numbers = found[True].pop('decoder_task_ids')
  for name, values in found[False].items():
    np.testing.assert_array_equal(values, found[True][name], err_msg=name)
  seen = collections.Counter()
  tokens, segments = found[True]['decoder_target_tokens'], found[True]['decoder_segment_ids']
  for row in range(len(tokens)):
    for segment in range(1, segments[row].max() + 1):
      at = segments[row] == segment
      text = bytes(int(i) - 3 for i in tokens[row][at] if i > 1).decode()
      # Tasks in the order of their names; syllables are digits.
      assert set(numbers[row][at]) == {int(text.isdigit())}
      seen[text.isdigit()] += 1
  assert not numbers[segments == 0].any()
  assert num_epochs or (seen[True] > 5 and seen[False] > 5)
