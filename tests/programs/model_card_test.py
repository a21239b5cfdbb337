import shlex
import types

from t5x_lite.data.pairs import Pairs
from t5x_lite.gin_front import configuration
from t5x_lite.programs import finetune, model_card
from tests import tiny_run

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
  words = shlex.split(model_card.command(SETTINGS))
  assert words[:4] == ['t5x-lite', 'finetune', '--model', "it's here"]
  assert words[words.index('--train') + 1 :][:2] == ['a b.csv', 'c.csv']
  assert '--no-pack' in words and '--validation' not in words


def test_the_gin_file_gives_the_settings_back(tmp_path, monkeypatch):
  path = tmp_path / 'finetune.gin'
  path.write_text(model_card.gin_text(SETTINGS, 'finetune.gin'))
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
  text = model_card.card(
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
