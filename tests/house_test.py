"""The rules of the house that no linter knows."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 't5x_lite'
MODULES = sorted(PACKAGE.rglob('*.py'))
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())

MAX_LINES = 500

# NNX constructs modules; every transformation is jax's own.
NNX_NAMES = {
  'Dropout',
  'List',
  'Module',
  'Param',
  'Rngs',
  'Variable',
  'eval_shape',
  'initializers',
  'merge',
  'split',
  'to_pure_dict',
}

# Who may import what, anywhere in the file. Paths inside the package.
ALLOWED_IMPORTERS = {
  'gin': ('gin_front/',),
  'safetensors': ('interop/', 'programs/export.py'),
  'seqio': ('data/',),
  'tensorflow': ('data/', 'programs/export.py'),
  'tensorflow_datasets': ('data/',),
  'tensorflow_text': ('data/',),
  'torch': (),
  'transformers': (),
}
# Inference and the JAX side use these parts of data/.
WITHOUT_TENSORFLOW = (
  'data/__init__.py',
  'data/config.py',
  'data/pairs.py',
  'data/records.py',
  'data/rows/feature_converters.py',
  'data/rows/packing.py',
  'data/text_files.py',
  'data/vocabularies.py',
)
# Nothing to test in them but what others test.
WITHOUT_TEST = {'errors.py'}


def _name(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).as_posix()


def _imports(path: pathlib.Path) -> set[str]:
  """Returns dotted names of all modules that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names.add(node.module)
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def _tracked_files() -> list[pathlib.Path]:
  listing = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
  if listing.returncode:
    pytest.skip('not a git checkout')
  files = [ROOT / name for name in listing.stdout.split('\0') if name]
  return [file for file in files if file.is_file()]


def test_no_file_is_too_long_to_read():
  long = {
    file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines())
    for file in _tracked_files()
    if file.suffix == '.py'
  }
  assert {f: n for f, n in long.items() if n > MAX_LINES} == {}


def test_no_drawer_files():
  drawers = {'utils.py', 'common.py', 'helpers.py', 'misc.py'}
  assert [p for p in MODULES if p.name in drawers] == []


@pytest.mark.parametrize('module', [p for p in MODULES if p.name != '__init__.py'], ids=_name)
def test_every_module_has_its_test_file(module):
  if _name(module) in WITHOUT_TEST:
    return
  mirrored = ROOT / 'tests' / module.relative_to(PACKAGE)
  assert mirrored.with_name(f'{module.stem}_test.py').is_file()


@pytest.mark.parametrize('module', MODULES, ids=_name)
def test_imports_come_through_the_right_door(module):
  name = _name(module)
  for imported in _imports(module):
    allowed = ALLOWED_IMPORTERS.get(imported.split('.')[0])
    if allowed is not None:
      assert name.startswith(allowed), f'{name} imports {imported}'
    if imported.startswith(('tensorflow', 'seqio')):
      assert name not in WITHOUT_TENSORFLOW, f'{name} imports {imported}'
    assert not imported.startswith('t5x_lite.main'), name
    if name.startswith('data/'):
      assert not imported.startswith(('flax', 't5x_lite.models')), name
    if name.startswith('models/'):
      assert not imported.startswith('t5x_lite.data'), name


def test_the_jax_side_never_imports_tensorflow():
  modules = [
    't5x_lite',
    't5x_lite.runs.checkpoints',
    't5x_lite.data.rows.packing',
    't5x_lite.decoding.sampling',
    't5x_lite.programs.infer',
    't5x_lite.models.t5',
    't5x_lite.training.steps',
    't5x_lite.training.train_state',
  ]
  code = (
    f'import {", ".join(modules)}, sys; '
    'bad = {"tensorflow", "seqio", "gin", "torch", "transformers"}; '
    'print(sorted(bad & set(sys.modules)))'
  )
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
  assert result.stdout == '[]\n', result.stderr


def test_importing_the_package_costs_nothing():
  code = 'import t5x_lite, sys; print("jax" in sys.modules)'
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
  assert result.stdout == 'False\n', result.stderr


def test_every_public_name_can_be_imported():
  import t5x_lite

  assert set(t5x_lite.__all__) <= set(dir(t5x_lite))
  for name in t5x_lite.__all__:
    assert getattr(t5x_lite, name).__name__ == name
  with pytest.raises(AttributeError, match='no attribute'):
    t5x_lite.no_such_name  # noqa: B018


@pytest.mark.parametrize('module', MODULES, ids=_name)
def test_nnx_only_constructs(module):
  used = {
    node.attr
    for node in ast.walk(ast.parse(module.read_text()))
    if isinstance(node, ast.Attribute)
    and isinstance(node.value, ast.Name)
    and node.value.id == 'nnx'
  }
  assert used <= NNX_NAMES
  if used:
    assert _name(module).startswith(('models/', 'training/steps.py', 'decoding/'))


def test_no_path_of_one_machine():
  # Put together here, so that this file is clean too.
  folders = '|'.join(['work', 'farm', 'root', 'opt'])
  hidden = '|'.join(['library', 'mirror'])
  pattern = re.compile(rf'(?<![a-z.])/(?:{folders})/|[.](?:{hidden})\b')
  found = []
  for file in _tracked_files():
    try:
      lines = file.read_text().splitlines()
    except UnicodeDecodeError:
      continue
    found += [
      f'{file.relative_to(ROOT)}:{number}: {line.strip()}'
      for number, line in enumerate(lines, 1)
      if pattern.search(line)
    ]
  assert found == []


def test_the_wheel_lists_every_package():
  listed = set(PYPROJECT['tool']['setuptools']['packages'])
  found = {'.'.join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob('__init__.py')}
  found |= {
    '.'.join(('t5x_lite', *path.relative_to(ROOT).parts))
    for path in [ROOT / 'configs', *(ROOT / 'configs').iterdir()]
    if path.is_dir()
  }
  assert listed == found


def test_the_lock_satisfies_the_metadata():
  locked = {}
  for line in (ROOT / 'requirements.lock').read_text().splitlines():
    if line and not line.startswith('#'):
      requirement = Requirement(line)
      [pin] = requirement.specifier
      assert pin.operator == '==' and not requirement.url, line
      locked[_canonical(requirement.name)] = Version(pin.version)
  project = PYPROJECT['project']
  extras = project['optional-dependencies']
  wanted = [*project['dependencies'], *extras['dev'], *extras['hf']]
  for requirement in map(Requirement, wanted):
    version = locked[_canonical(requirement.name)]
    assert requirement.specifier.contains(version), requirement


def _canonical(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


@pytest.mark.parametrize('module', MODULES, ids=_name)
def test_no_pickle_is_ever_loaded(module):
  """Nor anything else that runs what a file says."""
  roots = {name.split('.')[0] for name in _imports(module)}
  assert not roots & {'pickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve', 'yaml'}
  found = re.findall(r'allow_pickle|torch\.load|(?<![.\w])(?:eval|exec)\(', module.read_text())
  assert found == []
