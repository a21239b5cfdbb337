import shlex
import types

import numpy as np
import pytest

from t5x_lite.data import pairs, vocabularies
from t5x_lite.data.pairs import Pairs
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.gin_front import configuration
from t5x_lite.programs import finetune, finetune_plan
from tests import tiny_run

BYTES = vocabularies.make_vocabulary(VocabularyConfig(kind='byte'))


def plan_of(rows, **given):
  found = pairs.read(rows)
  lengths = finetune_plan.measure(found, BYTES)
  fields = dict(method='adafactor', max_input_tokens=64, max_target_tokens=32)
  plan = finetune_plan.make_plan(lengths, found.targets, **{**fields, **given})
  return plan, lengths


def rows(count, words=1):
  return [(f'{i:05}' * words, f'label {i % 3}') for i in range(count)]


def test_lengths_cover_the_data_up_to_the_limit():
  assert finetune_plan.choose_length(np.full(50, 13), 100) == 16
  assert finetune_plan.choose_length(np.arange(1, 101), 100) == 100
  assert finetune_plan.choose_length(np.full(50, 500), 100) == 100
  # One row in a thousand that is far longer does not set the length.
  rare = np.array([10] * 999 + [5000])
  assert finetune_plan.choose_length(rare, 10_000) == 16


def test_what_is_cut_is_counted():
  plan, lengths = plan_of([('x' * 99, 'yes'), ('x' * 9, 'no')] * 9)
  assert plan.input_length == 64
  table = dict(finetune_plan.describe(plan, lengths))
  share = (100 - 64) / (100 + 4 + 10 + 3)
  assert table['cut'] == f'9 of 18 examples, {share:.1%} of the tokens'


def test_packing_and_batches_follow_the_data():
  uniform, _ = plan_of(rows(640, 8))
  assert not uniform.pack
  assert uniform.row_lengths == {'inputs': 48, 'targets': 8}
  mixed, _ = plan_of(rows(320, 1) + rows(320, 8))
  assert mixed.pack and mixed.row_lengths['inputs'] >= 96
  capacity = mixed.batch_size * mixed.steps_per_epoch
  used = 320 * (6 + 41) / mixed.row_lengths['inputs']
  assert 0.8 * used < capacity < 1.5 * used
  explicit, _ = plan_of(rows(640, 8), batch_tokens=2 * 8 * 56)
  assert explicit.batch_size * 56 <= max(2 * 8 * 56, 8 * 56)


def test_small_files_get_more_epochs_and_given_ones_count():
  small, _ = plan_of(rows(100))
  assert small.total_steps == 20 * small.steps_per_epoch
  two, _ = plan_of(rows(100), epochs=2)
  assert two.total_steps == 2 * two.steps_per_epoch
  exact, _ = plan_of(rows(100), steps=7)
  assert exact.total_steps == 7
  assert plan_of(rows(10), method='adamw')[0].learning_rate == 3e-4
  assert plan_of(rows(10), learning_rate=0.5)[0].learning_rate == 0.5


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (dict(method='sgd'), 'allowed are adafactor, adamw'),
    (dict(epochs=1, steps=1), 'not both'),
    (dict(epochs=0.0), 'must be positive'),
    (dict(epochs=float('nan')), 'must be positive'),
  ],
)
def test_nonsense_is_refused(given, message):
  with pytest.raises(UsageError, match=message):
    plan_of(rows(10), **given)


@pytest.mark.parametrize(
  ('targets', 'wanted'),
  [
    (['yes', 'no'] * 20, ('accuracy', 'f1')),
    ([f'{i}' for i in range(40)], ('accuracy', 'squad', 'chrf')),
    (
      [f'a sentence of several words {i}' for i in range(40)],
      ('accuracy', 'bleu', 'chrf', 'rouge'),
    ),
  ],
)
def test_metrics_suit_the_targets(targets, wanted):
  assert finetune_plan.choose_metrics(targets) == list(wanted)


def test_one_class_is_nothing_to_learn():
  with pytest.raises(UsageError, match="every target is 'x'"):
    finetune_plan.choose_metrics(['x', 'x'])


def test_a_plan_comes_back_from_json():
  import dataclasses
  import json

  plan, _ = plan_of(rows(30))
  entry = json.loads(json.dumps(dataclasses.asdict(plan)))
  assert finetune_plan.Plan(**entry) == plan


def test_unknown_pieces_are_counted():
  t5 = vocabularies.make_vocabulary(VocabularyConfig())
  lengths = finetune_plan.measure(pairs.read([('日本', 'a'), ('b', 'c')]), t5)
  assert 0.1 < lengths.unknown < 0.9


SETTINGS = {
  'model': "it's here",
  'train': ['a b.csv', 'c.csv'],
  'output': 'out',
  'validation': [],
  'prefix': 'say "x": ',
  'pack': False,
  'learning_rate': 1e-3,
  'metrics': ['accuracy'],
}


def test_the_command_is_what_was_set():
  words = shlex.split(finetune_plan.command(SETTINGS))
  assert words[:4] == ['t5x-lite', 'finetune', '--model', "it's here"]
  assert words[words.index('--train') + 1 :][:2] == ['a b.csv', 'c.csv']
  assert '--no-pack' in words and '--validation' not in words


def test_the_gin_file_gives_the_settings_back(tmp_path, monkeypatch):
  path = tmp_path / 'finetune.gin'
  path.write_text(finetune_plan.gin_text(SETTINGS, 'finetune.gin'))
  found = {}
  monkeypatch.setattr(finetune, 'read_parts', lambda *args: found.update(args=args) or 1 / 0)
  configured = configuration.configure(
    finetune.finetune, gin_files=[str(path)], given={'output': str(tmp_path)}
  )
  try:
    configured.call()
  except ZeroDivisionError:
    pass
  train, _, columns, *_ = found['args']
  assert list(train) == SETTINGS['train']
  assert columns.prefix == SETTINGS['prefix']


def test_the_card_has_data_numbers_and_command():
  pairs = {'inputs': ['an input'], 'targets': ['a target'], 'places': ['a b.csv:1']}
  held = Pairs(**pairs, fields=('text', 'label'))
  text = finetune_plan.model_card(
    types.SimpleNamespace(path='flan', config=tiny_run.model()),
    {'train': held.take([0] * 90), 'validation': held.take([0] * 10)},
    [('method', 'adafactor')],
    results={'step': 4, 'metrics': {'accuracy': 87.5}},
    settings=SETTINGS,
    max_new_tokens=8,
  )
  assert text.startswith('---\nlibrary_name: transformers\n')
  for part in ('| accuracy | 87.5 |', '90 training examples', '`a b.csv`',
               't5x-lite finetune', "tokenizer('an input'"):  # fmt: skip
    assert part in text
