"""The model card of an export, and the command and gin file that made it.

The card is README.md in the Hugging Face hub's form.

Source: https://huggingface.co/docs/hub/model-cards.
"""

import importlib.metadata
import shlex
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
  """Returns the text of the card.

  Args:
    base: the checkpoint that was fine-tuned.
    config: its architecture.
    parts: number of examples of each split.
    columns: names of the input's and the target's column.
    table: (what, how much) of the training.
    results: 'step' and 'metrics'.
    example: an input to try.
    max_new_tokens: most tokens of an output.
    settings: what the command was given and chose.
  """
  _, shapes, _ = t5.abstract_params(config)
  count = model_sharding.count_params(shapes)
  files = ', '.join(f'`{name}`' for name in settings['train'])
  metrics = '\n'.join(f'| {name} | {value:.4g} |' for name, value in results['metrics'].items())
  training = '\n'.join(f'| {name} | {value} |' for name, value in table)
  version = importlib.metadata.version('t5x_lite')
  source = f'{parts["train"]} training examples from {files or "memory"}'
  prefix = f' Prefix: `{settings["prefix"]}`.' if settings['prefix'] else ''
  return f"""---
library_name: transformers
pipeline_tag: text2text-generation
tags: [t5, t5x_lite]
---

# {base}, fine-tuned

A T5 of {count:,} parameters, fine-tuned from `{base}` with t5x_lite {version}.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained('.')
tokenizer = AutoTokenizer.from_pretrained('.')
inputs = tokenizer({example[:200]!r}, return_tensors='pt')
outputs = model.generate(inputs.input_ids, max_new_tokens={max_new_tokens})
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```

## Results

On {parts['validation']} validation examples, greedy decoding, step {results['step']} (the least \
validation loss):

| metric | value |
|---|---:|
{metrics}

## Data

{source}, column `{columns[0]}` to column `{columns[1]}`.{prefix}

## Training

| | |
|---|---|
{training}

The command, with every choice that it made:

```sh
{command(settings)}
```
"""


def command(settings: Mapping[str, Any]) -> str:
  """Returns the command line of a fine-tuning."""
  words = ['t5x-lite', 'finetune']
  for name, value in settings.items():
    if value in ('', [], None):
      continue
    if isinstance(value, bool):
      words.append(f'--{name}' if value else f'--no-{name}')
    else:
      words += [f'--{name}', *map(str, value if isinstance(value, list) else [value])]
  return shlex.join(words)


def gin_text(settings: Mapping[str, Any], file: str) -> str:
  """Returns the gin file that runs a fine-tuning again."""
  given = {name: value for name, value in settings.items() if value not in ('', [], None)}
  bindings = ''.join(f'  {name} = {value!r}\n' for name, value in given.items())
  return f"""# Written by `t5x-lite finetune`; every choice it made is here. Again:
#   t5x-lite finetune --gin_file={file} --output ANOTHER_DIRECTORY
from __gin__ import dynamic_registration

from t5x_lite.programs import finetune

finetune.finetune:
{bindings}"""
