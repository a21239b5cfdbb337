import importlib
import inspect

import pytest

from t5x_lite import main
from t5x_lite.programs import command_flags


@pytest.mark.parametrize('name', main.COMMANDS)
def test_the_source_says_what_the_function_says(name):
  """Names, order, defaults and types, of every command."""
  command = main.COMMANDS[name]
  module, _, function = command.function.rpartition('.')
  real = inspect.signature(getattr(importlib.import_module(module), function))
  found = command_flags.read_parameters(command.function)
  assert [p.name for p in found] == list(real.parameters)
  assert set(command.positional) <= set(real.parameters)
  for parameter in found:
    theirs = real.parameters[parameter.name]
    assert theirs.kind is theirs.KEYWORD_ONLY
    assert parameter.help, parameter.name
    if parameter.default:
      assert parameter.default == str(theirs.default), parameter.name
    if parameter.type is not None and not parameter.many:
      assert parameter.type in (theirs.annotation, *getattr(theirs.annotation, '__args__', ()))


def test_objects_have_no_type_here():
  found = command_flags.read_parameters('t5x_lite.programs.train.train')
  types = {parameter.name: parameter.type for parameter in found}
  assert types['model'] is types['train_eval'] is types['decoding'] is None
  assert (types['model_dir'], types['total_steps']) == (str, int)
  assert types['dry_run'] is bool
  assert types['eval_steps'] is int  # int | None


def test_constants_of_the_module_are_resolved():
  found = command_flags.read_parameters('t5x_lite.programs.infer.infer')
  defaults = {parameter.name: parameter.default for parameter in found}
  assert defaults['max_input_length'] == '1024'
  assert defaults['field'] == ''
