"""No setting may do nothing in silence: each mistake, and its one line."""

import pytest

from t5x_lite import errors
from t5x_lite.errors import UsageError
from tests.gin_front.configuration_test import configure, toy  # noqa: F401


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], r'settings are missing: add --gin\.STEPS=\.\.\.'),
    (['STEPS=1', 'STPES=2'], r'nothing uses the gin macro STPES.*STEPS\?'),
    (['STEPS=1', 'Model.emb_dm=2'], r"no parameter 'emb_dm'.*mean emb_dim"),
    (['STEPS=1', 'Modle.emb_dim=2'], r"no 'Modle'.*toy\.Model"),
    (
      ['STEPS=1', 'trian/Data.batch_size=2'],
      r"do nothing: no scope 'trian' ever calls toy\.Data.*mean train\?",
    ),
    (['STEPS=1', 'train/Model.emb_dim=2'], r'train/toy\.Model\.emb_dim would do nothing'),
    (
      ['STEPS=1', 'toy.run.data=None', 'toy.Model.name=%MODEEL'],
      r'%MODEEL is used and never set.*mean MODEL',
    ),
    (['STEPS=many'], r"toy\.run\.steps is 'many'; it must be of type int"),
    (['STEPS=1.5'], r'steps is 1\.5; it must be of type int'),
    (['STEPS=True'], r'steps is True; it must be of type int'),
    (['STEPS=None'], r'steps is None; it must be of type int'),
    (['STEPS=1', 'Model.dropout_rate=a'], r'must be of type float'),
    (['STEPS=1', 'Model.name=3'], r'must be of type str'),
    (['STEPS=1', 'toy.run.dry_run=yes'], r'must be of type bool'),
    (['STEPS=1', 'toy.run.data=3'], r'must be of type Data \| None|toy\.Data'),
    (['STEPS=1', 'toy.run.data=@Model()'], r'toy\.run\.data is @.*Model'),
    (['STEPS=1', 'Data.lengths=3'], r'lengths is 3'),
    (['STEPS=1', 'toy.run.model=@Mode()'], r"no 'Mode'.*toy\.Model"),
    (['STEPS=1', 'STEPS.x.=2'], r'line|Malformatted'),
  ],
)
def test_each_mistake_is_one_line(toy, flags, message):  # noqa: F811
  with pytest.raises(UsageError, match=message) as caught:
    configure(toy, *flags)
  assert '\n' not in str(caught.value)


def test_missing_arguments_are_named_all_at_once(toy):  # noqa: F811
  with pytest.raises(UsageError, match=r'toy\.run\.model=.*toy\.run\.steps='):
    configure(toy, files=[])
  with pytest.raises(UsageError, match=r'--steps='):
    configure(toy, files=[], flags=['steps'], given={'model': 1})


def test_a_class_without_a_needed_field(toy, tmp_path):  # noqa: F811
  text = (tmp_path / 'toy.gin').read_text()
  text = text.replace('toy.Model.emb_dim = 4', '')
  (tmp_path / 'toy.gin').write_text(text)
  with pytest.raises(UsageError, match=r'MODEL/toy\.Model\.emb_dim'):
    configure(toy, 'STEPS=1')


def test_a_dataclass_that_refuses_its_values_keeps_its_words(toy):  # noqa: F811
  with pytest.raises(UsageError, match='emb_dim is -1; at least 1'):
    configure(toy, 'STEPS=1', 'Model.emb_dim=-1').call()


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('import no_such_module', r'bad\.gin, line 3.*no_such_module.*installed'),
    ('toy.Nothing.x = 1', r'bad\.gin, line 3: .*Nothing'),
    ('nothing.Model.x = 1', r"bad\.gin, line 3: 'nothing'"),
    ('toy.Model.emb_dim = ', r'bad\.gin, line 3'),
    ('toy.Model.emb_dim = 4 5', r'bad\.gin, line 3'),
    ("toy.Model.name = 'open", r'bad\.gin'),
    ('toy.Model.emb_dim = (1,', r'bad\.gin|binding'),
    ('just words', r'bad\.gin, line 3'),
  ],
)
def test_mistakes_in_files_name_the_place(toy, tmp_path, line, message):  # noqa: F811
  (tmp_path / 'bad.gin').write_text(
    f'from __gin__ import dynamic_registration\nimport toy\n{line}\n'
  )
  with pytest.raises(UsageError, match=message) as caught:
    configure(toy, files=['bad.gin'])
  assert '\n' not in str(caught.value)


def test_suggest():
  assert errors.suggest('trian', ['train', 'eval']) == ('; did you mean train?')
  assert errors.suggest('zzz', ['train']) == ''
