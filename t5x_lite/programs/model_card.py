"""The model card of an export (README.md on the Hugging Face hub), and how to make it again.

Source: https://huggingface.co/docs/hub/model-cards.
"""

import importlib.metadata
import importlib.resources
import shlex
import string
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite.models import model_sharding, t5
from t5x_lite.models.config import T5Config


def card(
  *,
  base: str,
  config: T5Config,
  parts: Mapping[str, int],
  columns: tuple[str, str],
  table: Sequence[tuple[str, str]],
  results: Mapping[str, Any],
  example: str,
  max_new_tokens: int,
  settings: Mapping[str, Any],
) -> str:
  """Returns the text of the card of a checkpoint that was fine-tuned from a base.

  The config is the base's; parts are numbers of examples by split, columns the names of the input's
  and the target's; the table is (what, how much) of the training, the example an input to try, and
  settings are what the command was given and chose. Results have 'step' and 'metrics'.
  """
  _, shapes, _ = t5.abstract_params(config)
  files = ', '.join(f'`{name}`' for name in settings['train'])
  template = importlib.resources.files('t5x_lite.programs').joinpath('model_card.md').read_text()
  return string.Template(template).substitute(
    base=base,
    count=f'{model_sharding.count_params(shapes):,}',
    version=importlib.metadata.version('t5x_lite'),
    example=repr(example[:200]),
    max_new_tokens=max_new_tokens,
    validation=parts['validation'],
    step=results['step'],
    metrics='\n'.join(f'| {name} | {x:.4g} |' for name, x in results['metrics'].items()),
    source=f'{parts["train"]} training examples from {files or "memory"}',
    input=columns[0],
    target=columns[1],
    prefix=f' Prefix: `{settings["prefix"]}`.' if settings['prefix'] else '',
    training='\n'.join(f'| {name} | {value} |' for name, value in table),
    command=command(settings),
  )


def command(settings: Mapping[str, Any]) -> str:
  """Returns the command line of a fine-tuning."""
  words = ['t5x-lite', 'finetune']
  for name, value in _given(settings).items():
    if isinstance(value, bool):
      words.append(f'--{name}' if value else f'--no-{name}')
    else:
      words += [f'--{name}', *map(str, value if isinstance(value, list) else [value])]
  return shlex.join(words)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in settings.items() if value not in ('', [], None)}


def gin_text(settings: Mapping[str, Any], file: str) -> str:
  """Returns the gin file that runs a fine-tuning again."""
  bindings = ''.join(f'  {name} = {value!r}\n' for name, value in _given(settings).items())
  return f"""# Written by `t5x-lite finetune`; every choice it made is here. Again:
#   t5x-lite finetune --gin_file={file} --output ANOTHER_DIRECTORY
from __gin__ import dynamic_registration

from t5x_lite.programs import finetune

finetune.finetune:
{bindings}"""
