import dataclasses
import importlib
import inspect

import pytest

from t5x_lite import main
from t5x_lite.decoding.config import DecodingConfig
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


@pytest.mark.parametrize('name', ['infer', 'eval'])
def test_fields_of_the_decoding_are_flags(name):
  """Every field that can be written, once, with a help of its own."""
  found = main.COMMANDS[name].parameters()
  names = [p.name for p in found]
  assert len(set(names)) == len(names)
  own = {p.name for p in command_flags.read_parameters(main.COMMANDS[name].function)}
  fields = {p.name: p for p in found if p.name not in own}
  left_out = {f.name for f in dataclasses.fields(DecodingConfig)} - set(fields)
  assert left_out == {'automaton', 'stopper'}
  assert all(p.help and 'likewise' not in p.help for p in fields.values())
  assert (fields['num_beams'].type, fields['brevity_alpha'].type) == (int, float)
  assert fields['labels'].many and fields['max_decode_length'].type is int


def test_fields_become_bindings():
  given = {'model': 'm', 'num_beams': 4, 'labels': ['yes', "it's"]}
  statements = main.COMMANDS['infer'].bindings(given)
  assert given == {'model': 'm'}
  owner = 't5x_lite.decoding.config.DecodingConfig'
  labels = ['yes', "it's"]
  assert statements[-2:] == [f'{owner}.labels = {labels!r}', f'{owner}.num_beams = 4']
  assert main.COMMANDS['infer'].bindings({'model': 'm'}) == []
