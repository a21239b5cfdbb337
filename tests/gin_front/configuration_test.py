import dataclasses
import textwrap

import gin
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.gin_front import configuration

TOY = """
import dataclasses
from collections.abc import Callable, Sequence
from t5x_lite.errors import UsageError

@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  emb_dim: int
  dropout_rate: float = 0.0
  name: str = 'toy'
  def __post_init__(self):
    if self.emb_dim < 1:
      raise UsageError(f'Model.emb_dim is {self.emb_dim}; at least 1')

@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  batch_size: int = 8
  lengths: Sequence[int] = (1,)

def run(*, model: Model, steps: int, data: Data | None = None,
        model_dir: str = '', dry_run: bool = False, summarize_config_fn=None):
  if summarize_config_fn and model_dir in ('a', 'b'):  # of `two`
    summarize_config_fn(model_dir)
  return dict(model=model, steps=steps, data=data, model_dir=model_dir)

def two(*, first: Callable, second: Callable):
  return first(model_dir='a'), second(model_dir='b')

def other(*, data: Data):
  return data
"""

CONFIG = """
from __gin__ import dynamic_registration
import toy

STEPS = %gin.REQUIRED
MODEL = @toy.Model()
toy.run:
  model = %MODEL
  steps = %STEPS  # a comment with %NO_MACRO and @no.reference
  data = @train/toy.Data()
toy.Model.emb_dim = 4
train/toy.Data.batch_size = 16
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """A module of programs and dataclasses, and a gin file beside it."""
  import importlib
  import sys

  (tmp_path / 'toy.py').write_text(TOY)
  (tmp_path / 'toy.gin').write_text(CONFIG)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.chdir(tmp_path)
  monkeypatch.delitem(sys.modules, 'toy', raising=False)
  with gin.config.interactive_mode():
    yield importlib.import_module('toy')
  gin.clear_config()
  sys.modules.pop('toy', None)


def configure(toy, *flags, files=('toy.gin',), program=None, **kwargs):
  bindings = [configuration.binding(*flag.split('=', 1)) for flag in flags]
  return configuration.configure(program or toy.run, gin_files=files, bindings=bindings, **kwargs)


def test_files_macros_and_flags_reach_the_program(toy):
  result = configure(toy, 'STEPS=3', 'Model.dropout_rate=0.1').call()
  assert result['steps'] == 3
  assert result['model'] == toy.Model(emb_dim=4, dropout_rate=0.1)
  assert result['data'] == toy.Data(batch_size=16)


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('/tmp/run', '/tmp/run'),
    ('gs://bucket/run-1', 'gs://bucket/run-1'),
    ('t5_1_1_small', 't5_1_1_small'),
    ('two words', 'two words'),
    ("it's", "it's"),
    ('"quoted"', 'quoted'),
    ("'/quoted'", '/quoted'),
    ('', ''),
    ('a=b', 'a=b'),
    ('1e-3x', '1e-3x'),
    ('x # y', 'x # y'),
  ],
)
def test_what_is_no_value_is_a_string(toy, text, value):
  result = configure(toy, 'STEPS=1', f'toy.run.model_dir={text}').call()
  assert result['model_dir'] == value


def test_python_values_stay_values():
  for text in ('3', '-1', '1e-3', 'True', 'None', "{'inputs': 512}", '[1, 2]'):
    assert configuration.binding('X', text) == f'X = {text}'
  for text in ('@a/b.C()', '%MACRO', '(@x.Y(), 2)'):
    assert configuration.binding('X', text) == f'X = {text}'


def test_later_wins_and_flags_win_over_files(toy, tmp_path):
  (tmp_path / 'late.gin').write_text('include "toy.gin"\nSTEPS = 5\n')
  assert configure(toy, files=['late.gin']).call()['steps'] == 5
  assert configure(toy, 'STEPS=6', files=['late.gin']).call()['steps'] == 6
  assert configure(toy, 'STEPS=6', 'STEPS=7').call()['steps'] == 7


def test_given_arguments_win_and_need_no_binding(toy):
  result = configure(toy, given={'steps': 9}).call()
  assert result['steps'] == 9


def test_the_resolved_text_gives_the_same_run(toy, tmp_path):
  configured = configure(toy, 'STEPS=3', 'Data.lengths=(2, 3)')
  assert "Model.name = 'toy'" in configured.text  # defaults too
  assert 'summarize_config_fn' not in configured.text
  first = configured.call()
  (tmp_path / 'config.gin').write_text(configured.text)
  again = configure(toy, files=['config.gin'])
  assert again.call() == first
  assert again.text == configured.text


def test_scoped_programs_get_their_own_settings_and_the_config(toy, tmp_path):
  (tmp_path / 'two.gin').write_text(
    textwrap.dedent("""
      include 'toy.gin'
      from __gin__ import dynamic_registration
      import toy
      toy.two.first = @a/toy.run
      toy.two.second = @b/toy.run
      STEPS = 1
      b/toy.run.steps = 2
      b/toy.run.data = @toy.Data()
      b/toy.Data.batch_size = 32
    """)
  )
  first, second = configure(toy, files=['two.gin'], program=toy.two).call()
  assert (first['steps'], second['steps']) == (1, 2)
  assert first['data'].batch_size == 16
  assert second['data'].batch_size == 32
  assert 'b/toy.Data.batch_size = 32' in (tmp_path / 'a' / 'config.gin').read_text()
  assert (tmp_path / 'b' / 'config.gin').exists()


def test_a_file_may_configure_other_programs_too(toy, tmp_path):
  (tmp_path / 'both.gin').write_text(
    CONFIG + '\ntoy.other.data = @eval/toy.Data()\neval/toy.Data.batch_size=1\n'
  )
  flags = dict(files=['both.gin'], programs=['toy.other'])
  assert configure(toy, 'STEPS=1', **flags).call()['steps'] == 1


def test_an_override_may_leave_a_file_of_the_package_without_use(toy, tmp_path, monkeypatch):
  (tmp_path / 'configs' / 'runs').mkdir(parents=True)
  (tmp_path / 'configs' / 'runs' / 'toy.gin').write_text(CONFIG)
  monkeypatch.setattr(configuration, 'shipped_root', lambda: tmp_path)
  files = ['configs/runs/toy.gin']
  result = configure(toy, 'toy.run.steps=2', files=files).call()
  assert result['steps'] == 2


def test_search_paths(toy, tmp_path):
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'deep' / 'mine.gin').write_text("include 'toy.gin'\nSTEPS = 8\n")
  configured = configure(toy, files=['mine.gin'], search_paths=['deep'])
  assert configured.call()['steps'] == 8


def test_shipped_files_are_found_from_anywhere(toy):
  assert (configuration.shipped_root() / 'configs/runs/pretrain.gin').is_file()
  with pytest.raises(UsageError, match=r'did you mean .*runs/pretrain\.gin'):
    configure(toy, files=['configs/runs/pretrian.gin'])


def test_files_that_cannot_be_read(toy, tmp_path):
  with pytest.raises(UsageError, match=r"no gin file 'no\.gin'"):
    configure(toy, files=['no.gin'])
  (tmp_path / 'a.gin').write_text("include 'b.gin'\n")
  with pytest.raises(UsageError, match=r"no gin file 'b\.gin' \(included by a"):
    configure(toy, files=['a.gin'])
  (tmp_path / 'b.gin').write_text("include 'a.gin'\n")
  with pytest.raises(UsageError, match='includes itself'):
    configure(toy, files=['a.gin'])
  (tmp_path / 'c.gin').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(UsageError, match='cannot read'):
    configure(toy, files=['c.gin'])


def test_configs_are_made_anew_for_every_call(toy):
  """Nothing of an earlier configuration is left in gin's global state."""
  configure(toy, 'STEPS=3', 'Model.name=first')
  result = configure(toy, 'STEPS=3').call()
  assert result['model'].name == 'toy'
  assert dataclasses.is_dataclass(result['model'])


@pytest.mark.parametrize('url', ['https://x.org/a.gin', 'http://x/a.gin', 'gs://b/a.gin'])
def test_gin_files_are_not_fetched(toy, tmp_path, url):
  with pytest.raises(UsageError, match=f'{url}.* none is fetched'):
    configure(toy, files=[url])
  (tmp_path / 'a.gin').write_text(f"include '{url}'\n")
  with pytest.raises(UsageError, match='none is fetched'):
    configure(toy, files=['a.gin'])
