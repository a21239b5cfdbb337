"""What a program's source says of its arguments, read without importing it.

Importing some programs takes the fifteen seconds that TensorFlow takes, which
`--help` and a mistyped flag should not. So the function's signature and
docstring are read from the file's syntax tree.
"""

import ast
import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Mapping
from typing import Any

# Annotations, less `| None`, whose arguments can be written on a command line:
# the type of one value, and whether there may be many.
_SIMPLE: Mapping[str, tuple[type, bool]] = {
  'bool': (bool, False),
  'float': (float, False),
  'int': (int, False),
  'str': (str, False),
  'Sequence[int]': (int, True),
  'Sequence[str]': (str, True),
  'str | Sequence[str]': (str, True),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One keyword-only parameter of a program.

  Attributes:
    name: its name.
    help: its entry in the docstring's Args section, on one line.
    type: of one value, or None if it cannot be written on a command line.
    many: whether it takes several values.
    default: as text; '' if there is none, or nothing that says more.
  """

  name: str
  help: str
  type: type | None
  many: bool = False
  default: str = ''


def read_parameters(function: str) -> list[Parameter]:
  """Returns the parameters of a function, in order.

  Args:
    function: dotted name, such as 't5x_lite.programs.train.train'. Packages on
      the way are imported, its module is not.
  """
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
    kind, many = _SIMPLE.get(annotation.removesuffix(' | None'), (None, False))
    parameters.append(
      Parameter(
        argument.arg, entries.get(argument.arg, ''), kind, many, _default(default, constants)
      )
    )
  return parameters


def _args_section(docstring: str) -> dict[str, str]:
  """Returns {name: text} of a Google-style Args section."""
  match = re.search(r'^Args:\n((?:[ ]+.*\n?|\n)+)', inspect.cleandoc(docstring), re.MULTILINE)
  if match is None:
    return {}
  found = re.findall(r'^  (\w+): (.*(?:\n    .*)*)', match[1], flags=re.MULTILINE)
  return {name: ' '.join(text.split()) for name, text in found}


def _constants(tree: ast.Module) -> dict[str, Any]:
  """Returns the module's own constants, for defaults that name one."""
  constants = {}
  for node in tree.body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
      try:
        constants[node.targets[0].id] = ast.literal_eval(node.value)
      except ValueError:
        continue
  return constants


def _default(node: ast.expr | None, constants: Mapping[str, Any]) -> str:
  if node is None:
    return ''
  if isinstance(node, ast.Name) and node.id in constants:
    return str(constants[node.id])
  try:
    value = ast.literal_eval(node)
  except ValueError:
    return ''
  return '' if value in (None, '', (), False) else str(value)
