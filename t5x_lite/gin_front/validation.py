"""Checks of a parsed gin configuration: no setting may do nothing in silence.

gin itself reports a misspelt parameter. It accepts, and T5X with it, a misspelt macro or scope, a
binding that nobody reads, and a value of the wrong type.
"""

import contextlib
import dataclasses
import inspect
import re
import tokenize
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from gin import config as gin_config

from t5x_lite.errors import UsageError, suggest

MACRO = 'gin.macro'
_STRING_OR_COMMENT = re.compile(
  r"""'''.*?'''|\"\"\".*?\"\"\"|'[^'\n]*'|"[^"\n]*"|\#[^\n]*""", re.DOTALL
)
_LOCATION = re.compile(r'In (?:file "([^"]+)", )?[a-z ]*line (\d+)')


class Walk:
  """All that gin evaluates or may hand over when it calls a configurable.

  Scopes follow gin's rules: a reference with a scope replaces the current one, a reference without
  inherits it, a macro is evaluated in a scope of its name.
  """

  def __init__(self):
    self.bound: dict[tuple[str, str], dict[str, Any]] = {}
    self.called: set[tuple[str, str]] = set()  # by gin, with all arguments from gin
    self.read: set[tuple[str, str]] = set()  # keys of gin's configuration that had a say

  def visit(
    self, scope: list[str], configurable: Any, *, called: bool = True, skip: Collection[str] = ()
  ) -> None:
    """Follows a configurable, called or only handed over, in a scope, outermost first.

    Bindings of the arguments in `skip` do not count.
    """
    key = ('/'.join(scope), configurable.selector)
    if called:
      self.called.add(key)
    if key in self.bound:
      return
    for end in range(len(scope) + 1):
      self.read.add(('/'.join(scope[:end]), configurable.selector))
    with gin.config_scope(list(scope)):
      bound = gin.get_bindings(configurable.selector, resolve_references=False)
    self.bound[key] = {name: value for name, value in bound.items() if name not in skip}
    for ref in gin_config.iterate_references(self.bound[key]):
      self.visit(ref.scopes or scope, ref.configurable, called=ref.evaluate)

  def parameters(self, hidden: Collection[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Bound values and defaults, as gin's formatter wants them."""
    values = {}
    for key, bound in self.bound.items():
      parameters = _signature(gin_config._REGISTRY[key[1]].wrapped).values()
      both = {p.name: p.default for p in parameters if p.default is not p.empty} | bound
      values[key] = {name: value for name, value in both.items() if name not in hidden}
    return values

  def takers(self, parameter: str) -> set[str]:
    """Returns the selectors of all that have a parameter of this name."""
    registry = gin_config._REGISTRY
    return {name for _, name in self.bound if parameter in _signature(registry[name].wrapped)}


def _signature(wrapped: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
  with contextlib.suppress(TypeError, ValueError):  # builtins
    return inspect.signature(wrapped).parameters
  return {}


def _bare(text: str) -> str:
  return _STRING_OR_COMMENT.sub(lambda match: '' if match[0].startswith('#') else "''", text)


def references(text: str) -> Iterable[gin_config.ConfigurableReference]:
  """All references written anywhere: one that an experiment overrides is no misspelling."""
  for name in set(re.findall(r'@([\w./]+)', _bare(text))):
    with contextlib.suppress(KeyError, ValueError):  # several modules have such a name
      yield gin_config.ConfigurableReference(name, evaluate=True)


def _macros() -> dict[str, Any]:
  found = gin_config._CONFIG.items()
  return {scope: bound['value'] for (scope, name), bound in found if name == MACRO}


def _names(scope: str, selector: str) -> tuple[str, str]:
  """Returns SCOPE/MODULE.NAME and MODULE.NAME, as users write them."""
  short = '.'.join(selector.split('.')[-2:])
  return f'{scope}/{short}' if scope else short, short


def check_macros(text: str, own_text: str) -> None:
  """Every macro is used somewhere, less those of the package's files that a user made useless."""
  used = set(re.findall(r'%([\w./]+)', _bare(text))) - {'gin.REQUIRED'}
  own = set(re.findall(r'^\s*([\w./]+)\s*=', _bare(own_text), re.MULTILINE))
  for name in _macros():
    if name in own and name not in used:
      raise UsageError(f'nothing uses the gin macro {name}{suggest(name, used)}')


def check_bindings_are_read(read: set[tuple[str, str]], text: str) -> None:
  """Every binding is one that some walk came across."""
  scopes = set(re.findall(r'@([\w/]+)/', _bare(text))) | set(_macros())
  scopes |= {part for scope in scopes for part in scope.split('/')}
  for (scope, selector), bound in gin_config._CONFIG.items():
    if (scope, selector) in read or selector == MACRO:
      continue
    name, short = _names(scope, selector)
    why = f'nothing refers to {short}'
    if scope:
      why = f'no scope {scope!r} ever calls {short}{suggest(scope, scopes)}'
    raise UsageError(f'gin binding {name}.{next(iter(bound))} would do nothing: {why}')


def check_values(walk: Walk, root: str, given: Mapping[str, Any], flags: Collection[str]) -> None:
  """Everything required is set, and what is set has the right type, where a program's walk came.

  Root is the program's selector, `given` its arguments that do not come from gin, and `flags` its
  parameters that have a command-line flag of that name.
  """
  macros = _macros()
  required: list[str] = []
  for (scope, selector), bound in walk.bound.items():
    if selector == MACRO:
      if scope not in macros:
        fix = f'add --gin.{scope}=...{suggest(scope, macros)}'
        raise UsageError(f'the gin macro %{scope} is used and never set: {fix}')
      if _is_required(bound['value']):
        required.append(f'--gin.{scope}')
    if selector in (MACRO, 'gin.constant'):
      continue
    wrapped = gin_config._REGISTRY[selector].wrapped
    hints, prefix = _hints(wrapped), _names(scope, selector)[0]
    is_root = (scope, selector) == ('', root)
    called = (scope, selector) in walk.called
    for name, parameter in _signature(wrapped).items():
      if is_root and name in given:
        continue
      must = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
      if _is_required(bound[name]) if name in bound else called and must:
        is_flag = is_root and name in flags
        required.append(f'--{name}' if is_flag else f'--gin.{prefix}.{name}')
      elif name in bound:
        value, hint = _literal(bound[name], macros), hints.get(name, Any)
        if not _fits(value, hint):
          kind = hint.__name__ if isinstance(hint, type) else str(hint)
          kind = kind.replace('NoneType', 'None').replace('typing.', '')
          raise UsageError(f'{prefix}.{name} is {value!r}; it must be of type {kind}')
  if required:
    missing = ' '.join(f'{setting}=...' for setting in dict.fromkeys(required))
    raise UsageError(f'required settings are missing: add {missing}, or a --gin_file with them')


def _hints(wrapped: Callable[..., Any]) -> dict[str, Any]:
  with contextlib.suppress(AttributeError, NameError, TypeError):  # not ours to judge
    return typing.get_type_hints(wrapped)
  return {}


def _is_required(value: Any) -> bool:
  return isinstance(value, gin_config.ConfigurableReference) and value.scopes == ['gin.REQUIRED']


def _literal(value: Any, macros: Mapping[str, Any]) -> Any:
  """Returns what a chain of macros stands for."""
  for _ in range(len(macros) + 1):
    if not (isinstance(value, gin_config.ConfigurableReference) and value.config_key[1] == MACRO):
      break
    value = macros.get('/'.join(value.scopes), value)
  return value


def _fits(value: Any, hint: Any) -> bool:
  """False only where a literal or an evaluated class is surely wrong."""
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, part) for part in typing.get_args(hint))
  if origin is typing.Literal:
    return value in typing.get_args(hint)
  kind = origin or hint
  if not isinstance(kind, type):
    return True
  if isinstance(value, gin_config.ConfigurableReference):
    wrapped = gin_config._REGISTRY[value.config_key[1]].wrapped
    if not (value.evaluate and isinstance(wrapped, type)):
      return not value.evaluate or kind is not type(None)
    return issubclass(wrapped, kind)
  if kind in (int, float):
    return isinstance(value, (int, kind)) and not isinstance(value, bool)
  if kind in (str, bool, type(None)):
    return isinstance(value, kind)
  if issubclass(kind, Mapping):
    return isinstance(value, dict)
  if issubclass(kind, Sequence):
    return isinstance(value, (list, tuple))
  return not dataclasses.is_dataclass(kind)


def dotted_name(configurable: Any) -> str:
  """Where a configurable is defined: 't5x_lite.programs.train.train'."""
  wrapped = configurable.wrapped
  return f'{wrapped.__module__}.{wrapped.__qualname__}'


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
  """Turns what gin raises while it parses `source` into a UsageError."""
  try:
    yield
  except tokenize.TokenError as error:
    message, (line, _) = error.args
    raise UsageError(f'{source}, line {line}: {message}') from error
  except SyntaxError as error:
    what = f'{error.msg.strip().rstrip(".")} ({(error.text or "").strip()})'
    raise UsageError(f'{source}, line {error.lineno}: {what}') from error
  except (RecursionError, MemoryError):
    raise UsageError(f'{source} is nested too deeply') from None
  except (AttributeError, ImportError, NameError, OSError, ValueError) as error:
    hint = '; is it installed?' if isinstance(error, ImportError) else ''
    raise UsageError(f'{_explain(error)}{hint}') from error


def _explain(error: Exception) -> str:
  """Returns gin's message of several lines as one, with a suggestion."""
  lines = str(error).splitlines() or [type(error).__name__]
  message = lines[0].rstrip('.')
  if match := re.match(r"Configurable '(.+)' doesn't have a parameter named '(.+)'", message):
    configurable = gin_config._REGISTRY.get_match(match[1])
    names = _signature(configurable.wrapped) if configurable else {}
    message = f'{match[1]} has no parameter {match[2]!r}'
    message += suggest(match[2], names) or f'; it has {", ".join(names)}'
  elif match := re.match(r"No configurable matching (?:reference )?'@?(.+?)(?:\(\))?'", message):
    known = {_names('', one.selector)[1] for one in gin_config._INVERSE_REGISTRY.values()}
    hint = suggest(match[1].split('.')[-1], known, cutoff=0.5)
    message = f'the gin files configure no {match[1]!r}{hint}'
  found = _LOCATION.findall(str(error))
  if found and found[0][0]:
    message = f'{found[0][0]}, line {found[0][1]}: {message}'
  return message
