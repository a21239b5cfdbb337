"""What a program's source says of its arguments, read from the syntax tree without importing it.

Importing some programs takes TensorFlow's fifteen seconds, which `--help` should not.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from typing import Any

# Annotations, less `| None`, whose arguments can be written on a command line: the type of one
# value, and whether there may be many.
_SIMPLE: Mapping[str, tuple[type, bool]] = {
  **{kind.__name__: (kind, False) for kind in (bool, float, int, str)},
  'bool | str': (str, False),
  'Sequence[int]': (int, True),
  **dict.fromkeys(('Sequence[str]', 'str | Sequence[str]'), (str, True)),
}
# Dataclasses whose fields are flags of their own where a command says so.
NESTED: Mapping[str, str] = {'DecodingConfig': 't5x_lite.decoding.config'}


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One keyword-only parameter of a program, or a field of one."""

  name: str
  help: str  # its entry in the docstring's Args section, on one line
  type: type | None  # of one value; None if it cannot be written on a command line
  many: bool = False  # whether it takes several values
  default: str = ''  # as text; '' if there is none, or nothing that says more
  parent: str = ''  # the program's parameter that this is a field of
  owner: str = ''  # the dataclass of that field


def read_fields(function: str, parent: str) -> list[Parameter]:
  """Returns the fields of the dataclass of `parent`, whose annotation is in NESTED, as flags."""
  [owner] = [p.owner for p in read_parameters(function) if p.name == parent]
  cls = getattr(importlib.import_module(NESTED[owner]), owner)
  entries = _args_section(inspect.getdoc(cls) or '', 'Attributes')
  found = []
  for field in dataclasses.fields(cls):
    annotation = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    name = annotation.replace('collections.abc.', '').removesuffix(' | None')
    if name in _SIMPLE:
      how = (entries.get(field.name, ''), *_SIMPLE[name], _shown(field.default))
      found.append(Parameter(field.name, *how, parent, owner))
  return found


def read_parameters(function: str) -> list[Parameter]:
  """Returns the parameters of a function, 't5x_lite.programs.train.train', without importing it."""
  module, _, name = function.rpartition('.')
  spec = importlib.util.find_spec(module)
  if spec is None or spec.origin is None:
    raise ModuleNotFoundError(module)
  with open(spec.origin, encoding='utf-8') as file:
    tree = ast.parse(file.read())
  [node] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
  entries = _args_section(ast.get_docstring(node) or '')
  constants = _constants(tree)
  parameters = []
  for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
    annotation = ast.unparse(argument.annotation) if argument.annotation else ''
    annotation = annotation.removesuffix(' | None')
    owner = annotation if annotation in NESTED else ''
    kind, many = _SIMPLE.get(annotation, (None, False))
    text, shown = entries.get(argument.arg, ''), _default(default, constants)
    parameters.append(Parameter(argument.arg, text, kind, many, shown, owner=owner))
  return parameters


def _args_section(docstring: str, section: str = 'Args') -> dict[str, str]:
  """Returns {name: text} of a section of a Google-style docstring."""
  match = re.search(rf'^{section}:\n((?:[ ]+.*\n?|\n)+)', inspect.cleandoc(docstring), re.MULTILINE)
  if match is None:
    return {}
  found = re.findall(r'^  (\w+): (.*(?:\n    .*)*)', match[1], flags=re.MULTILINE)
  return {name: ' '.join(text.split()) for name, text in found}


def _constants(tree: ast.Module) -> dict[str, Any]:
  """Returns the module's own constants, for defaults that name one."""
  constants = {}
  for node in tree.body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
      with contextlib.suppress(ValueError):
        constants[node.targets[0].id] = ast.literal_eval(node.value)
  return constants


def _default(node: ast.expr | None, constants: Mapping[str, Any]) -> str:
  if isinstance(node, ast.Name) and node.id in constants:
    return str(constants[node.id])
  try:
    return _shown(ast.literal_eval(node) if node else None)
  except ValueError:
    return ''


def _shown(value: Any) -> str:
  return '' if value in (None, '', (), False) else str(value)
