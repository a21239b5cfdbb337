"""Finds and parses gin files and bindings for one program.

Nothing else in the library knows gin: gin files import modules themselves (`from __gin__ import
dynamic_registration`) and bind dataclasses and program functions. validation.py then checks them.
"""

import dataclasses
import functools
import inspect
import os
import pathlib
import re
import tokenize
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gin
from etils import epath
from gin import config as gin_config
from gin import config_parser

from t5x_lite.errors import UsageError, refusing, suggest
from t5x_lite.gin_front import validation

SUMMARIZE = 'summarize_config_fn'
# What a file of configs/models defines; without one the program decides, such as by a checkpoint.
_MODEL_FILE_MACROS = ('MODEL', 'VOCABULARY', 'LOSS')
_INCLUDE = re.compile(r"""^\s*include\s+['"]([^'"]+)['"]""", re.MULTILINE)


def shipped_root() -> pathlib.Path:
  """Returns where `configs/` came with: a wheel's package, or the checkout around the package."""
  package = pathlib.Path(__file__).parents[1]
  for root in (package, package.parent):
    if (root / 'configs' / 'runs').is_dir():
      return root
  raise FileNotFoundError(f'no configs/ came with {package}')


def binding(name: str, text: str) -> str:
  """Returns `--gin.NAME=text` as a gin statement.

  What is no Python literal, @reference or %macro is a string: --gin.MODEL_DIR=run needs no quotes.
  """
  # Only looks whether the text is a value.
  delegate: Any = types.SimpleNamespace(configurable_reference=lambda name, _: name, macro=str)
  try:
    [statement] = config_parser.ConfigParser(f'x.y = {text}', delegate)
    if isinstance(statement, config_parser.BindingStatement):
      return f'{name} = {text}'
  except (SyntaxError, ValueError, tokenize.TokenError):
    pass
  except (RecursionError, MemoryError):
    raise UsageError(f'the value of --gin.{name} is nested too deeply: {text:.40}...') from None
  return f'{name} = {text!r}'


@dataclasses.dataclass(frozen=True)
class Configured:
  """A program whose settings have been parsed and checked."""

  call: Callable[[], Any]  # runs it
  # Evaluates what gin binds, so that each config checks itself; before another is configured.
  arguments: Callable[[], Mapping[str, Any]]
  text: str  # the resolved configuration, defaults included, as a gin file that gives the same run


def configure(
  program: Callable[..., Any],
  *,
  gin_files: Sequence[str] = (),
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  given: Mapping[str, Any] | None = None,
  flags: Collection[str] = (),
  programs: Collection[str] = (),
  inherits: str = '',
) -> Configured:
  """Parses gin files and bindings and checks them for one program, a keyword-only function.

  Of gin files and bindings later ones win, bindings over files, and `given` arguments over both.
  Files are looked for in the working directory and search_paths; `configs/...` of the package is
  found from anywhere. `flags` are the program's parameters with a command-line flag of that name,
  `programs` dotted names of functions that gin files may configure, called in this run or not.
  Bindings of the function named by `inherits` also count for the program's parameters of the same
  name, where it has none of its own. All that has a parameter `summarize_config_fn` (T5X's name) is
  given what writes `text` into a model_dir, as config.gin. UsageError for anything that cannot work
  or would do nothing.
  """
  given = dict(given or {})
  prefixes = ['', *search_paths, str(shipped_root())]
  texts: dict[pathlib.Path, str] = {}
  paths = [_read(name, prefixes, texts) for name in gin_files]
  shipped = shipped_root().resolve() / 'configs'
  own_texts = [text for path, text in texts.items() if shipped not in path.resolve().parents]
  text, own_text = ('\n'.join([*found, *bindings]) for found in (texts.values(), own_texts))

  gin.clear_config()
  # Without gin's reader of package data: it fails on what could be a namespace package: configs/.
  gin_config._LOCATION_PREFIXES[:] = prefixes
  gin_config._FILE_READERS[:] = [(open, os.path.isfile)]
  if gin_config._inverse_lookup(program) is None:
    gin.external_configurable(program, module=program.__module__)
  selector = gin_config._as_scope_and_selector(program)[1]
  gin.parse_config('from __gin__ import dynamic_registration\n')
  for name in _MODEL_FILE_MACROS:
    if f'%{name}' in text and not re.search(rf'(?m)^{name}\s*=', text):
      gin.parse_config(f'{name} = None')
  for path in paths:
    with validation.explained(str(path)):
      gin.parse_config_file(str(path))
  with validation.explained('a binding'):
    gin.parse_config(list(bindings))
  if inherits:
    _inherit(selector, inherits, program)

  run = validation.Walk()
  run.visit([], gin_config._REGISTRY[selector], skip=given)
  others = validation.Walk()
  for reference in validation.references(text):
    others.visit(reference.scopes, reference.configurable)
  for (_, name), _ in list(gin_config._CONFIG.items()):
    if validation.dotted_name(gin_config._REGISTRY[name]) in programs:
      others.visit([], gin_config._REGISTRY[name])

  validation.check_macros(text, own_text)
  validation.check_bindings_are_read(run.read | others.read, text)
  validation.check_values(run, selector, given, flags)
  resolved = gin_config._config_str(run.parameters(hidden=[SUMMARIZE]))

  def write_config(model_dir: str) -> None:
    from t5x_lite.runs import files  # imports JAX, which memory must be set up before: see main.py

    epath.Path(model_dir).mkdir(parents=True, exist_ok=True)
    files.write_text(epath.Path(model_dir) / 'config.gin', resolved)

  for name in run.takers(SUMMARIZE):
    gin.bind_parameter(('', name, SUMMARIZE), write_config)
  arguments = functools.partial(gin.get_bindings, program)
  return Configured(lambda: gin.get_configurable(program)(**given), arguments, resolved)


def _inherit(selector: str, source: str, program: Callable[..., Any]) -> None:
  """Binds the program's parameters as those of another function are bound."""
  own = gin_config._CONFIG.get(('', selector), {})
  names = set(inspect.signature(program).parameters) - set(own)
  for (scope, name), bound in list(gin_config._CONFIG.items()):
    if not scope and validation.dotted_name(gin_config._REGISTRY[name]) == source:
      for argument in names & set(bound):
        gin.bind_parameter(('', selector, argument), bound[argument])


def _read(
  name: str,
  prefixes: Sequence[str],
  texts: dict[pathlib.Path, str],
  included_by: tuple[pathlib.Path, ...] = (),
) -> pathlib.Path:
  """Finds a gin file, and reads it and all that it includes into `texts`, before gin does."""
  if '://' in name:
    why = 'gin files run code, so none is fetched; copy it'
    raise UsageError(f'gin file {name!r} is not on a local disk: {why}')
  candidates = (pathlib.Path(prefix) / name for prefix in prefixes)
  path = next((path for path in candidates if path.is_file()), None)
  if path is None:
    root = shipped_root()
    known = [str(f.relative_to(root)) for f in root.glob('configs/**/*.gin')]
    hint = suggest(name, known, cutoff=0.5)
    what = f'{name!r} (included by {included_by[-1]})' if included_by else repr(name)
    where = 'in the working directory, --gin_search_paths or the package'
    raise UsageError(f'no gin file {what} {where}{hint}')
  if path in included_by:
    raise UsageError(f'gin file {path} includes itself')
  with refusing(f'cannot read gin file {path}', OSError, UnicodeDecodeError):
    texts[path] = path.read_text(encoding='utf-8')
  for included in _INCLUDE.findall(texts[path]):
    _read(included, prefixes, texts, (*included_by, path))
  return path
