"""The model card of an export (README.md on the Hugging Face hub), and how to make it again.

Source: https://huggingface.co/docs/hub/model-cards.
"""

import importlib.metadata
import importlib.resources
import shlex
import string
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite.data.pairs import Pairs
from t5x_lite.interop.trained_model import TrainedModel
from t5x_lite.models import model_sharding, t5


def card(
  base: TrainedModel,
  parts: Mapping[str, Pairs],
  table: Sequence[tuple[str, str]],
  *,
  results: Mapping[str, Any],
  settings: Mapping[str, Any],
  max_new_tokens: int,
) -> str:
  """Returns the text of the card of a checkpoint that was fine-tuned from a base.

  Parts are the data by split, and the table is (what, how much) of the training; settings are what
  the command was given and chose. Results have 'step' and 'metrics'.
  """
  _, shapes, _ = t5.abstract_params(base.config)
  files = ', '.join(f'`{name}`' for name in settings['train'])
  template = importlib.resources.files('t5x_lite.programs').joinpath('model_card.md').read_text()
  return string.Template(template).substitute(
    base=base.path,
    count=f'{model_sharding.count_params(shapes):,}',
    version=importlib.metadata.version('t5x_lite'),
    example=repr(parts['train'].inputs[0][:200]),
    max_new_tokens=max_new_tokens,
    validation=len(parts['validation']),
    step=results['step'],
    metrics='\n'.join(f'| {name} | {x:.4g} |' for name, x in results['metrics'].items()),
    source=f'{len(parts["train"])} training examples from {files or "memory"}',
    **dict(zip(('input', 'target'), parts['train'].fields, strict=True)),
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
