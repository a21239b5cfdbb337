"""What a program's source says of its arguments, read from the syntax tree without importing it.

Importing some programs takes TensorFlow's fifteen seconds, which `--help` should not.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any


def ids(text: str) -> tuple[int, ...]:
  """Reads '3,4', a sequence of ids; the name is what a message calls it."""
  return tuple(map(int, text.split(',')))


# Annotations, less `| None`, of flags: the type of one value, and whether there may be many.
_SIMPLE: Mapping[str, tuple[Callable[[str], Any], bool]] = {
  **{kind.__name__: (kind, False) for kind in (bool, float, int, str)},
  'bool | str': (str, False),
  'Sequence[int]': (int, True),
  'tuple[tuple[int, ...], ...]': (ids, True),
  **dict.fromkeys(('Sequence[str]', 'str | Sequence[str]'), (str, True)),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One keyword-only parameter of a program, or field of a dataclass."""

  name: str
  help: str  # its entry in the docstring's Args section, on one line
  type: Any  # makes a value of text; None if it cannot be written on a command line
  many: bool = False  # whether it takes several values
  default: str = ''  # as text; '' if there is none, or nothing that says more


def read_parameters(function: str) -> list[Parameter]:
  """Returns the parameters of a function, or the fields of a dataclass, without importing it."""
  module, _, name = function.rpartition('.')
  spec = importlib.util.find_spec(module)
  if spec is None or spec.origin is None:
    raise ModuleNotFoundError(module)
  with open(spec.origin, encoding='utf-8') as file:
    tree = ast.parse(file.read())
  constants: dict[str, Any] = {}  # for defaults that name one
  variables: list[tuple[str, ast.expr | None, ast.expr | None]] = []
  docstring = ''
  for node in tree.body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
      with contextlib.suppress(ValueError):
        constants[node.targets[0].id] = ast.literal_eval(node.value)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
      docstring = ast.get_docstring(node) or ''
      if isinstance(node, ast.FunctionDef):
        pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        variables = [(x.arg, x.annotation, default) for x, default in pairs]
      else:
        found = [x for x in node.body if isinstance(x, ast.AnnAssign)]
        variables = [(ast.unparse(x.target), x.annotation, x.value) for x in found]
  match = re.search(r'^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)', docstring, re.MULTILINE)
  found = re.findall(r'^  (\w+): (.*(?:\n    .*)*)', match[1] if match else '', flags=re.MULTILINE)
  entries, parameters = {name: ' '.join(text.split()) for name, text in found}, []
  for name, hint, default in variables:
    annotation = ast.unparse(hint).removesuffix(' | None') if hint else ''
    kind, many = _SIMPLE.get(annotation, (None, False))
    text, shown = entries.get(name, ''), _default(default, constants)
    parameters.append(Parameter(name, text, kind, many, shown))
  return parameters


def _default(node: ast.expr | None, constants: Mapping[str, Any]) -> str:
  if isinstance(node, ast.Name) and node.id in constants:
    return str(constants[node.id])
  try:
    value = ast.literal_eval(node) if node else None
  except ValueError:
    return ''
  return '' if value in (None, '', (), False) else str(value)
