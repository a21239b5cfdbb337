"""Mixtures that are made by their name, and how often each task is drawn.

`pronounce+language_id` mixes by the number of examples, `a*0.7+b*0.3` as it says. Any of the first
kind, or any mixture, takes other rates by an ending: `all_mix_equal`, `all_mix_limit65536`,
`all_mix_temperature2`: the rows of the paper's table 11.
"""

import re

import seqio

from t5x_lite.data.tasks import catalog
from t5x_lite.data.tasks.catalog import MixtureRecipe
from t5x_lite.errors import UsageError, refusing

_NUMBER = r'\d*\.?\d+'
_ENDING = re.compile(rf'(?P<equal>_equal)?(_limit(?P<limit>\d+))?(_temperature(?P<t>{_NUMBER}))?$')


def find(name: str) -> MixtureRecipe | None:
  """Returns the mixture of a name such as the module's, or None; UsageError for a bad part."""
  ending = _ENDING.search(name)
  assert ending is not None  # it may be empty
  base = name[: ending.start()]
  parts = base.split('+')
  weights = dict(part.split('*', 1) for part in parts if '*' in part)
  if not weights and len(parts) == 1 and (not ending[0] or catalog.leaves(base) == [base]):
    return None
  for part in parts:
    catalog.check_known(name, part.partition('*')[0])
  if weights:
    for rate in weights.values():
      if not re.fullmatch(_NUMBER, rate) or not float(rate) > 0:
        raise UsageError(f'The mixture {name!r} has the rate {rate!r}; rates must be more than 0')
    rates = {task: float(rate) for task, rate in weights.items()}
    if len(rates) < len(parts) or ending[0]:
      raise UsageError(f'The mixture {name!r} must give every task a rate, as in a*0.7+b*0.3')
    return MixtureRecipe(rates=rates)
  if ending['equal'] and len(ending[0]) > len('_equal'):
    raise UsageError(f'The mixture {name!r} is to be equal and limited: choose one')
  rate = 1.0
  if not ending['equal']:
    limit = int(ending['limit']) if ending['limit'] else None
    rate = catalog.proportional(limit=limit, temperature=float(ending['t'] or 1))
  return MixtureRecipe(rates={task: rate for part in parts for task in catalog.leaves(part)})


def shares(provider: seqio.Task | seqio.Mixture, split: str) -> dict[str, float]:
  """Returns each task's share of a split, {} for a task; UsageError if its size cannot be told."""
  if not isinstance(provider, seqio.Mixture):
    return {}
  tasks = [task for task in provider.tasks if split in task.splits]
  with refusing(f'the rates of {provider.name} cannot be told', TypeError, ValueError):
    rates = {task.name: float(provider.get_rate(task)) for task in tasks}
  total = sum(rates.values())
  if not total > 0:
    raise UsageError(f'the tasks of {provider.name} with a split {split!r} have rates of 0')
  return {name: rate / total for name, rate in rates.items()}


def table(provider: seqio.Task | seqio.Mixture, split: str) -> str:
  """Returns lines of the tasks and their shares, the largest first."""
  found = shares(provider, split)
  width = max(map(len, found), default=0)
  rows = sorted(found.items(), key=lambda item: -item[1])
  return '\n'.join(f'  {name:{width}}  {100 * share:7.3f}%' for name, share in rows)


catalog.add_finder(find, tuple)
