"""docs/architecture.md names what there is; every folder says what it is."""

import ast
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 't5x_lite'
PAGE = (ROOT / 'docs' / 'architecture.md').read_text()
FOLDERS = sorted(
  path.parent.relative_to(PACKAGE).as_posix()
  for path in PACKAGE.rglob('__init__.py')
  if path.parent != PACKAGE and path.parent.name != 'corpora'
)
MODULES = sorted(PACKAGE.rglob('*.py'))


def docstring(path):
  return ast.get_docstring(ast.parse(path.read_text())) or ''


def test_what_the_page_names_exists():
  named = re.findall(r'`((?:t5x_lite|launch|docs|tests)/[\w./]*)`', PAGE)
  assert len(named) > 40
  assert [name for name in named if not (ROOT / name).exists()] == []
  for name in set(re.findall(r'`(\w+\.py)`', PAGE)):
    assert list(PACKAGE.rglob(name)), name


def test_every_folder_stands_in_the_page_and_in_the_picture():
  dot = (ROOT / 'docs' / 'architecture.dot').read_text()
  for folder in FOLDERS:
    if '/' not in folder:
      assert f'{folder}/' in PAGE
      assert f'<b>{folder}/</b>' in dot


def test_the_pictures_floors_are_the_contracts():
  """From top to bottom, as import-linter has them."""
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  contract = settings['tool']['importlinter']['contracts'][0]
  floors = [name for row in contract['layers'] for name in row.split(' | ')]
  assert len(contract['layers']) <= 12
  dot = (ROOT / 'docs' / 'architecture.dot').read_text()
  drawn = re.findall(r'<b>(\w+)(?:/|\.py)</b>', dot)
  assert drawn == floors


def test_the_picture_is_made_of_its_source():
  """Every word of the source stands in the SVG."""
  dot = (ROOT / 'docs' / 'architecture.dot').read_text()
  svg = (ROOT / 'docs' / 'architecture.svg').read_text()
  shown = re.findall(r'label="([^"]+)"', dot)
  shown += re.findall(r'(?:<b>|</b>|<br/>)\s*([\w][^<]+)<', dot)
  assert len(shown) > 20
  missing = [
    text for text in shown if text.strip().replace('&', '&amp;') not in svg.replace('&#45;', '-')
  ]
  assert missing == []


@pytest.mark.parametrize('folder', FOLDERS)
def test_every_folder_says_what_is_in_it_and_what_is_not(folder):
  text = docstring(PACKAGE / folder / '__init__.py')
  sentences = re.findall(r'[.:]\s|[.]$', text)
  assert len(text.splitlines()) >= 3 and len(sentences) >= 2, text


@pytest.mark.parametrize('module', MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_module_says_what_it_is_in_its_first_line(module):
  first = docstring(module).partition('\n')[0]
  assert first.endswith(('.', '!')) and len(first.split()) > 3, first
