"""What the pages of docs/ name exists: links, commands, flags, names, files."""

import ast
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import t5x_lite
from t5x_lite.main import COMMANDS, COMPLETION

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(DOCS.rglob('*.md'))
READ = [*PAGES, ROOT / 'README.md']

COMMON_FLAGS = {
  'coordinator_address',
  'gin_bindings',
  'gin_file',
  'gin_search_paths',
  'help',
  'process_count',
  'process_index',
}
# Said by argparse and by XLA.
NOT_OURS = ('unrecognized arguments', 'RESOURCE_EXHAUSTED')


def _name(path):
  return path.relative_to(ROOT).as_posix()


def _blocks(text, *languages):
  """Returns the code of fenced blocks, also of those inside a list."""
  found = re.findall(r'^( *)```(\w*)\n(.*?)^\1```', text, flags=re.MULTILINE | re.DOTALL)
  return [
    re.sub(rf'^{indent}', '', code, flags=re.MULTILINE)
    for indent, language, code in found
    if language in languages
  ]


def _without_code(text):
  text = re.sub(r'^( *)```.*?^\1```', '', text, flags=re.MULTILINE | re.DOTALL)
  return re.sub(r'`[^`\n]*`', '', text)


def _anchors(path):
  """Returns the anchors that GitHub, and myst_heading_anchors, give a page."""
  text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.MULTILINE | re.DOTALL)
  headings = re.findall(r'^#+ (.+)$', text, flags=re.MULTILINE)
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in headings
  }


def _commands(text):
  """Yields the words of every t5x-lite command in shell blocks."""
  for code in _blocks(text, 'sh', 'bash', ''):
    for line in code.replace('\\\n', ' ').splitlines():
      try:
        words = shlex.split(line, comments=True)
      except ValueError:  # a quote that spans lines: no command of ours
        continue
      for i, word in enumerate(words[:-1]):
        if word.rpartition('/')[2] == 't5x-lite':
          yield words[i + 1 :]


def _flags(command):
  names = set(COMMON_FLAGS)
  for parameter in command.parameters():
    names.add(parameter.name)
    if parameter.type is bool:
      names.add(f'no-{parameter.name}')
  return names - set(command.positional)


@pytest.mark.parametrize('page', READ, ids=_name)
def test_links_lead_somewhere(page):
  dead = []
  for target in re.findall(r'\]\(([^)\s]+)\)', _without_code(page.read_text())):
    if target.startswith(('http://', 'https://', 'mailto:')):
      continue
    path, _, anchor = target.partition('#')
    place = (page.parent / path).resolve() if path else page
    if not place.exists() or (anchor and anchor not in _anchors(place)):
      dead.append(target)
  assert dead == []


def test_every_page_is_in_a_table_of_contents():
  listed = {DOCS / 'index.md'}
  for page in PAGES:
    toctrees = re.findall(
      r'^```\{toctree\}\n(.*?)^```', page.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    for line in '\n'.join(toctrees).splitlines():
      if line and not line.startswith(':'):
        listed.add(page.parent / f'{line}.md')
  assert [_name(page) for page in PAGES if page not in listed] == []


@pytest.mark.parametrize('page', READ, ids=_name)
def test_commands_and_their_flags_exist(page):
  for name, *words in _commands(page.read_text()):
    if name.startswith(('-', '.')) or name.isupper() or name == COMPLETION:
      continue
    assert name in COMMANDS, f't5x-lite {name}'
    known = _flags(COMMANDS[name])
    for word in words:
      if word in ('|', '&&', ';', '>'):
        break
      if word.startswith('--') and not word.startswith('--gin.'):
        flag = word[2:].partition('=')[0]
        assert flag in known, f't5x-lite {name} --{flag}'


@pytest.mark.parametrize('page', READ, ids=_name)
def test_commands_named_in_the_text_exist(page):
  named = re.findall(r'`t5x-lite (\w+)', page.read_text())
  assert {name for name in named if not name.isupper()} <= {*COMMANDS, COMPLETION}


@pytest.mark.parametrize('page', READ, ids=_name)
def test_gin_files_exist(page):
  # T5X has files of such names too; NAME stands for any.
  named = set(re.findall(r'(?<!t5x/)configs/[\w/]+\.gin', page.read_text()))
  named = {name for name in named if 'NAME' not in name}
  assert [x for x in sorted(named) if not (ROOT / x).is_file()] == []


@pytest.mark.parametrize('page', READ, ids=_name)
def test_bindings_name_real_fields(page):
  """A gin name is the imported module and a class or function of it."""
  modules = {}
  for file in (ROOT / 'configs').rglob('*.gin'):
    for source, name, alias in re.findall(
      r'^from ([\w.]+) import (\w+)(?: as (\w+))?', file.read_text(), re.M
    ):
      if source.startswith('t5x_lite'):
        modules[alias or name] = f'{source}.{name}'
  bindings = re.findall(
    r'(?:--gin\.|`)(?:[a-z_]+/)?([a-z_]+)\.(\w+)\.(\w+)(?=[=`])', page.read_text()
  )
  for module, owner, field in bindings:
    if module not in modules:
      continue
    path = ROOT / (modules[module].replace('.', '/') + '.py')
    defined = {getattr(node, 'name', ''): node for node in ast.parse(path.read_text()).body}
    node = defined.get(owner)
    if not isinstance(node, ast.ClassDef | ast.FunctionDef):
      continue  # a name of T5X
    if isinstance(node, ast.ClassDef):
      names = {x.target.id for x in node.body if isinstance(x, ast.AnnAssign)}
    else:
      names = {argument.arg for argument in node.args.kwonlyargs}
    assert field in names, f'{module}.{owner}.{field}'


@pytest.mark.parametrize('page', READ, ids=_name)
def test_python_blocks_parse_and_name_what_is_exported(page):
  for code in _blocks(page.read_text(), 'python'):
    tree = ast.parse(code)
    used = {
      node.attr
      for node in ast.walk(tree)
      if isinstance(node, ast.Attribute)
      and isinstance(node.value, ast.Name)
      and node.value.id == 't5x_lite'
    }
    assert used <= {*t5x_lite.__all__, 'data'}


@pytest.mark.parametrize('page', READ, ids=_name)
def test_names_in_the_text_are_exported(page):
  text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
  folders = {path.name for path in (ROOT / 't5x_lite').iterdir()}
  named = set(re.findall(r'`t5x_lite\.([A-Za-z]\w*)', text))
  named -= {x.removesuffix('.py') for x in folders}
  assert named <= set(t5x_lite.__all__)


def test_every_command_and_every_name_has_its_place():
  cli = (DOCS / 'cli.md').read_text()
  assert set(re.findall(r'^```\{command\} (\w+)', cli, re.M)) == set(COMMANDS)
  shown = []
  for page in (DOCS / 'reference').glob('*.md'):
    shown += re.findall(r'^```\{api\} (\w+)$', page.read_text(), re.M)
  assert sorted(shown) == sorted(t5x_lite.__all__)


def _messages():
  """Returns the package's string literals, expressions in them as '{}'."""
  found = []
  for path in (ROOT / 't5x_lite').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
      elif isinstance(node, ast.JoinedStr):
        found.append(
          ''.join(part.value if isinstance(part, ast.Constant) else '{}' for part in node.values)
        )
  return [' '.join(text.replace('`', '').split()) for text in found]


def test_messages_that_are_explained_are_said():
  """Each piece between words in capitals or colons stands in a literal."""
  text = (DOCS / 'troubleshooting.md').read_text()
  lines = re.findall(r'^(`.+`)\n: ', text, flags=re.MULTILINE)
  messages = [x for line in lines for x in re.findall(r'`([^`]+)`', line)]
  assert len(messages) >= 25
  literals = _messages()
  unknown = []
  for message in messages:
    if message.startswith(NOT_OURS) or message in ('<extra_id_0>',):
      continue
    pieces = re.split(r"'?%?\b[A-Z]+\b(?:\.[A-Z]+)*'?|\.\.\.|: ", message)
    pieces = [piece.strip(" ,;:'()[]") for piece in pieces]
    pieces = [piece for piece in pieces if len(piece) > 4]
    assert pieces, message
    unknown += [
      (message, piece) for piece in pieces if not any(piece in literal for literal in literals)
    ]
  assert unknown == []


@pytest.fixture
def from_source(monkeypatch):
  pytest.importorskip('docutils')
  monkeypatch.syspath_prepend(str(DOCS))
  return importlib.import_module('from_source')


def test_the_reference_is_read_from_source(from_source):
  text = from_source.api_text('OptimizerConfig')
  assert "name: str = 'adafactor'" in text and '**Attributes**' in text
  text = from_source.api_text('Model.generate')
  assert 'max\\_new\\_tokens' not in text and '`max_new_tokens`\n: ' in text
  assert '**Returns**' in text
  text = from_source.command_text('train')
  assert '`--total_steps`\n: ' in text and '`--dry_run, --no-dry_run`' in text
  assert 'summarize_config_fn' not in text
  for name in t5x_lite.__all__:
    assert from_source.api_text(name)


@pytest.mark.slow
def test_what_extends_it_runs(tmp_path):
  """The Python of extend.md, then a batch of each task that it registers."""
  (tmp_path / 'corpus').mkdir()
  texts = [f'Sentence {i} says that {i} and {i + 1} are neighbours.' for i in range(200)]
  (tmp_path / 'corpus' / 'a.txt').write_text('\n'.join(texts))
  for name in ('train', 'valid'):
    rows = [{'question': text, 'answer': str(i)} for i, text in enumerate(texts)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path / f'{name}.tsv').write_text('\n'.join(f'{text}\t{i}' for i, text in enumerate(texts)))
  blocks = _blocks((DOCS / 'extend.md').read_text(), 'python')
  look = (
    'from t5x_lite.data.rows.dataset_iterator import DatasetIterator\n'
    'from t5x_lite.data.tasks import catalog\n'
    "for name in ('questions', 'my_seqio_task', 'my_denser'):\n"
    '  full_name = catalog.resolve(name, t5x_lite.VocabularyConfig())\n'
    '  config = t5x_lite.DatasetConfig(mixture_or_task_name=full_name, batch_size=4,\n'
    "    task_feature_lengths={'inputs': 64, 'targets': 64})\n"
    '  iterator = DatasetIterator(config)\n'
    "  print(name, (next(iterator)['decoder_target_tokens'] > 0).sum())\n"
    '  iterator.close()\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', '\n'.join([*blocks, look])],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  counts = dict(re.findall(r'^(\w+) (\d+)$', result.stdout, re.M))
  assert counts.keys() == {'questions', 'my_seqio_task', 'my_denser'}
  assert all(map(int, counts.values()))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
  for module in ('sphinx', 'myst_parser', 'furo'):
    pytest.importorskip(module)
  command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q']
  result = subprocess.run(
    [*command, str(DOCS), str(tmp_path / 'site')], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
