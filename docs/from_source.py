"""Directives that write reference pages from source, without importing it.

`command NAME` lists the flags of a command, `api NAME` shows a function or
class with its docstring. Both read syntax trees, so that the site builds where
neither JAX nor TensorFlow is installed, and cannot fall behind the code.
"""

import ast
import importlib.util
import inspect
import pathlib
import re

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from t5x_lite import main
from t5x_lite.programs import command_flags

_SECTION = re.compile(r'^(Args|Attributes|Raises|Returns|Yields):[ ]*$', re.MULTILINE)
_ENTRY = re.compile(r'^(\**\w+): ', re.MULTILINE)
_CODE = re.compile(r'(`[^`\n]*`)')


def command_text(name: str) -> str:
  """Returns the flags of a command, as Markdown."""
  command = main.COMMANDS[name]
  lines = [f'{command.help[0].upper()}{_plain(command.help[1:])}.', '']
  objects = []
  found = command_flags.read_parameters(command.function)
  for parameter in [*command.parameters(), *(one for one in found if one.type is None)]:
    if parameter.type is None:
      objects.append(parameter)
      continue
    term = f'--{parameter.name}'
    if parameter.name in command.positional:
      term = parameter.name.upper()
    elif parameter.type is bool:
      term = f'--{parameter.name}, --no-{parameter.name}'
    elif parameter.many:
      term = f'--{parameter.name} A [B ...]'
    text = _plain(parameter.help)
    if parameter.default:
      text += f' Default: `{parameter.default}`.'
    lines += [f'`{term}`', f': {text}', '']
  objects = [one for one in objects if one.name not in ('summarize_config_fn', 'check')]
  if objects:
    lines += ['Set by gin alone:', '']
  for parameter in objects:
    lines += [f'`{parameter.name}`', f': {_plain(parameter.help)}', '']
  return '\n'.join(lines)


def api_text(name: str) -> str:
  """Returns signature and docstring of a name of the package, as Markdown.

  Args:
    name: exported by the package, such as 'train'; or a method of a class that
      is, such as 'Model.generate'.
  """
  exported, _, method = name.partition('.')
  found = (node for node in ast.walk(_tree('t5x_lite')) if isinstance(node, ast.ImportFrom))
  module = next(node.module for node in found if node.names[0].name == exported)
  assert module is not None
  tree = _tree(module)
  node = _find(tree, exported)
  if method:
    node = _method(tree, node, method)
  parts = [f'```python\n{_signature(node, name)}\n```']
  if not method:
    parts.append(f'In `{module}`.')
  parts.append(docstring_text(ast.get_docstring(node) or ''))
  return '\n\n'.join(parts)


def _tree(module: str) -> ast.Module:
  spec = importlib.util.find_spec(module)
  assert spec is not None and spec.origin is not None
  return ast.parse(pathlib.Path(spec.origin).read_text())


def _method(tree: ast.Module, node: ast.AST, name: str) -> ast.FunctionDef | ast.ClassDef:
  """Returns a method of a class, or of the class that it is imported to extend."""
  assert isinstance(node, ast.ClassDef)
  if any(getattr(child, 'name', '') == name for child in node.body):
    return _find(node, name)
  bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
  for statement in tree.body:
    for imported in getattr(statement, 'names', []):
      if imported.name in bases and isinstance(statement, ast.ImportFrom) and statement.module:
        other = _tree(statement.module)
        return _method(other, _find(other, imported.name), name)
  raise KeyError(name)


def _find(parent: ast.AST, name: str) -> ast.FunctionDef | ast.ClassDef:
  [node] = [
    node
    for node in ast.iter_child_nodes(parent)
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
  ]
  return node


def _signature(node: ast.FunctionDef | ast.ClassDef, name: str) -> str:
  """Returns a call, one argument a line where there are several."""
  if isinstance(node, ast.ClassDef):
    # A dataclass's fields are the arguments that it is made with.
    arguments = [ast.unparse(child) for child in node.body if isinstance(child, ast.AnnAssign)]
    if not arguments:
      return f'class {name}'
    return f'class {name}(\n  ' + ',\n  '.join(arguments) + ',\n)'
  returns = f' -> {ast.unparse(node.returns)}' if node.returns else ''
  args = node.args
  plain = args.posonlyargs + args.args
  defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
  arguments = [
    _argument(one, default)
    for one, default in zip(plain, defaults, strict=True)
    if one.arg != 'self'
  ]
  if args.kwonlyargs:
    arguments.append('*')
  arguments += [
    _argument(one, default) for one, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
  ]
  if args.kwarg:
    arguments.append(f'**{ast.unparse(args.kwarg)}')
  if not arguments:
    return f'{name}(){returns}'
  return f'{name}(\n  ' + ',\n  '.join(arguments) + f',\n){returns}'


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
  text = ast.unparse(argument)
  return text if default is None else f'{text} = {ast.unparse(default)}'


def docstring_text(docstring: str) -> str:
  """Returns a docstring of Google's style as Markdown."""
  pieces = _SECTION.split(inspect.cleandoc(docstring))
  parts = [_paragraphs(pieces[0])]
  for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
    # A section ends where its indentation does.
    match = re.match(r'(?:\n(?:[ ]{2}.*)?)*', body)
    inside, after = body[: match.end()], body[match.end() :]
    entries = _ENTRY.split(inspect.cleandoc(inside))
    parts.append(f'**{title}**')
    if len(entries) < 3:
      parts.append(_paragraphs(entries[0]))
    for key, text in zip(entries[1::2], entries[2::2], strict=True):
      parts.append(f'`{key}`\n: {_plain(" ".join(text.split()))}')
    if after.strip():
      parts.append(_paragraphs(after))
  return '\n\n'.join(part for part in parts if part)


def _paragraphs(text: str) -> str:
  return '\n\n'.join(_plain(' '.join(part.split())) for part in text.strip().split('\n\n'))


def _plain(text: str) -> str:
  """Escapes what Markdown would read as markup, outside of code."""
  parts = _CODE.split(text)
  return ''.join(
    part if part.startswith('`') else re.sub(r'([\\*_<>\[\]#$|~])', r'\\\1', part) for part in parts
  )


class _FromSource(Directive):
  """Puts the Markdown of its argument in its place."""

  required_arguments = 1
  text = staticmethod(command_text)

  def run(self) -> list[nodes.Node]:
    lines = StringList(self.text(self.arguments[0]).split('\n'), source='')
    container = nodes.container()
    self.state.nested_parse(lines, self.content_offset, container)
    return container.children


class Command(_FromSource):
  """The flags of a command."""


class Api(_FromSource):
  """A name of the package."""

  text = staticmethod(api_text)


def setup(app) -> dict[str, bool]:
  """Makes the directives known to Sphinx."""
  app.add_directive('command', Command)
  app.add_directive('api', Api)
  return {'parallel_read_safe': True}
