"""The report of a study: our numbers, the paper's beside them, and the cost.

As in the paper's tables (Raffel et al. 2020, 3.1.4), bold is what is within two deviations of the
best of its column: those of one run, pooled over rows that have several seeds, or published.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from t5x_lite.compiler import flops
from t5x_lite.data.config import DatasetConfig, batch_spec
from t5x_lite.errors import UsageError
from t5x_lite.models import model_sharding, t5
from t5x_lite.models.config import T5Config
from t5x_lite.programs import report, report_charts, report_runs, study
from t5x_lite.runs import files, progress

_NOTE = (
  'Mean and standard deviation over seeds. **Bold**: within two deviations of the best of its '
  'column; ↑ and ↓: better and worse than the baseline (★) by more than two.'
)


@functools.cache
def _open(directory: str) -> report_runs.Run | None:
  try:
    return report_runs.read(directory)
  except UsageError:
    return None  # it never began, or is no training


def _score(run: study.StageRun, names: str) -> float:
  """Returns a metric of a run, or the mean of several; NaN if there is none."""
  parts = names.split(' + ')
  if run.stage.command != 'train':
    tasks = report_runs.read_json(epath.Path(run.directory) / 'metrics.json').get('tasks', {})
    named = [part.removeprefix('infer_eval/').partition('/') for part in parts]
    found = [tasks.get(task, {}).get(metric) for task, _, metric in named]
    return math.nan if None in found else statistics.fmean(found)
  opened = _open(run.directory)
  series = opened.evaluations() if opened else {}
  points = [dict(series.get(part, ())) for part in parts]
  steps = set(points[0]).intersection(*points)
  if not steps:
    return math.nan
  means = [(step, statistics.fmean(one[step] for one in points)) for step in steps]
  return report_runs.best(parts[0], means)[1]


def _size(run: study.StageRun) -> tuple[int, float]:
  """Returns parameters and model FLOPs of a step of a training run; 0 for what does not train."""
  opened = _open(run.directory)
  if not opened or run.stage.command != 'train' or not opened.model:
    return 0, 0.0
  fields = {key: x for key, x in opened.config.get('dataset', {}).items() if key != 'class'}
  spec = batch_spec(DatasetConfig(**fields))
  shapes = {name: jax.ShapeDtypeStruct(*one) for name, one in spec.items()}
  model = T5Config(**opened.model)
  params = model_sharding.count_params(t5.abstract_params(model)[1])
  return params, flops.batch_train_flops(model, shapes)


def _training_flops(run: study.StageRun) -> float:
  opened = _open(run.directory)
  steps = max((points[-1][0] for points in opened.series.values()), default=0) if opened else 0
  return steps * _size(run)[1]


def _relative(amounts: Mapping[str, float], baseline: str) -> dict[str, str]:
  """Returns each amount, and in brackets how many of the baseline's it is."""
  base = amounts.get(baseline)
  return {
    row: f'{amount:.3g}' + (f' ({amount / base:.2f})' if base else '') if amount else ''
    for row, amount in amounts.items()
  }


@dataclasses.dataclass(frozen=True)
class Table:
  """What the cells of a study measured; see `study.study`."""

  cells: Mapping[tuple[str, int], Sequence[study.StageRun]]  # by row and seed
  baseline: str
  paper: Mapping[str, Mapping[str, float]]  # published numbers by row and column
  paper_deviations: Mapping[str, float]  # of those, by column

  @functools.cached_property
  def rows(self) -> dict[str, list[Sequence[study.StageRun]]]:
    """The cells of each row, one a seed."""
    found: dict[str, list[Sequence[study.StageRun]]] = {}
    for (row, _), runs in self.cells.items():
      found.setdefault(row, []).append(runs)
    return found

  @functools.cached_property
  def values(self) -> dict[str, dict[str, list[float]]]:
    """Finite values by column and row, one a seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for (row, _), runs in self.cells.items():
      last = {column: run for run in runs for column in run.stage.scores}
      for column, run in last.items():
        values = found.setdefault(column, {}).setdefault(row, [])
        value = statistics.fmean(_score(run, names) for names in run.stage.scores[column])
        if run.outcome().get('exit_code') == 0 and math.isfinite(value):
          values.append(value)
    return found

  def deviation(self, column: str) -> float | None:
    """Returns the standard deviation of one run in a column."""
    several = [one for one in self.values[column].values() if len(one) > 1]
    if several:
      squares = sum(statistics.variance(one) * (len(one) - 1) for one in several)
      return math.sqrt(squares / sum(len(one) - 1 for one in several))
    return self.paper_deviations.get(column)

  def lower_is_better(self, column: str) -> bool:
    """True if the column's metrics are losses or error rates."""
    scores = [run.stage.scores for run in itertools.chain(*self.cells.values())]
    return report_runs.lower_is_better(next(x[column][0] for x in scores if column in x))

  def cell(self, column: str, row: str) -> str:
    """Returns what is written at a column and row."""
    values = self.values[column].get(row)
    if not values:
      return ''
    mean = statistics.fmean(values)
    digits = 2 if abs(mean) >= 10 else 3
    text = f'{mean:.{digits}f}'
    if len(values) > 1:
      text += f' ± {statistics.stdev(values):.{digits}f}'
    deviation, sign = self.deviation(column), -1 if self.lower_is_better(column) else 1
    if deviation is None:
      return text
    means = {r: sign * statistics.fmean(x) for r, x in self.values[column].items() if x}
    if means[row] >= max(means.values()) - 2 * deviation:
      text = f'**{text}**'
    gain = means[row] - means.get(self.baseline, means[row])
    return text + (f' {"↑" if gain > 0 else "↓"}' if abs(gain) > 2 * deviation else '')

  def lines(self) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the whole table."""
    lines, published = [], list(dict.fromkeys(itertools.chain(*self.paper.values())))
    sizes = {row: _size(next(itertools.chain(*cells))) for row, cells in self.rows.items()}
    params, step = (
      _relative({row: size[i] for row, size in sizes.items()}, self.baseline) for i in range(2)
    )
    for row, cells in self.rows.items():
      line = {'row': f'★ {row}' if row == self.baseline else row}
      for column in dict.fromkeys((*self.values, *published)):
        if column in self.values:
          line[column] = self.cell(column, row)
        if column in published:
          line[f'{column}, paper'] = str(self.paper.get(row, {}).get(column, ''))
      runs = list(itertools.chain(*cells))
      ran = max(1, sum(bool(one[0].outcome()) for one in cells if one))
      seconds = sum(run.outcome().get('seconds', 0.0) for run in runs) / ran
      line['seeds'] = f'{sum(not _problem(one) for one in cells)} of {len(cells)}'
      line['parameters (P)'], line['FLOPs of a step (M)'] = params[row], step[row]
      line['training FLOPs'] = f'{sum(map(_training_flops, runs)) / ran:.2e}'
      line['time'] = progress.format_duration(seconds)
      lines.append(line)
    header = list(dict.fromkeys(itertools.chain(*lines)))
    return header, [list(line.values()) for line in lines]

  def problems(self) -> list[str]:
    """Returns a line for every cell that did not end well."""
    found = {cell: _problem(runs) for cell, runs in self.cells.items()}
    return [f'{row}, seed {seed}: {problem}' for (row, seed), problem in found.items() if problem]


def _problem(runs: Sequence[study.StageRun]) -> str:
  """Returns what is the matter with a cell, '' for nothing."""
  for run in runs:
    outcome = run.outcome()
    if outcome.get('exit_code') != 0:
      return f'{run.stage.name} {study.state(outcome)}. {outcome.get("message", "")}'.strip()
    for name in itertools.chain(*run.stage.scores.values()):
      if math.isnan(_score(run, name)):
        return f'{run.stage.name} has no metric {name}'
  return ''


def write(table: Table, stem: str, title: str) -> str:
  """Writes STEM.md and STEM.html, and returns the former's path."""
  _open.cache_clear()
  header, rows = table.lines()
  deviations = {name: table.deviation(name) for name in table.values}
  told = [f'{name} {number:.3g}' for name, number in deviations.items() if number is not None]
  notes = [_NOTE, *([f'Deviation of one run: {", ".join(told)}.'] if told else [])]
  notes.append('Parameters and a step are those of the first stage; in brackets, of the baseline.')
  notes.append('FLOPs and time are means over seeds of all stages, shared ones counted each time.')
  problems = table.problems()
  lines = [f'| {" | ".join(line)} |' for line in [header, ['---'] * len(header), *rows]]
  lines = [f'# {title}', '', *lines, '', *notes]
  if problems:
    lines += ['', '## What did not finish', '', *(f'- {problem}' for problem in problems)]
  body = [
    f'<h1>{report.escape(title)}</h1>',
    _bold(report.table(header, rows)),
    f'<p class="note">{_bold(report.escape(" ".join(notes)))}</p>',
    *(f'<p class="wrong">{report.escape(problem)}</p>' for problem in problems),
    '<h2>Every seed</h2><div class="charts">',
  ]
  for column, found in table.values.items():
    published = {row: table.paper.get(row, {}).get(column) for row in found}
    body.append(report_charts.dot_chart(column, found, published))
  body.append('</div><h2>Curves of the first seed</h2><div class="charts">')
  page = report.whole_page(title, [*body, *_curves(table), '</div>'])
  os.makedirs(os.path.dirname(stem), exist_ok=True)
  files.write_text(epath.Path(f'{stem}.md'), '\n'.join(lines) + '\n')
  files.write_text(epath.Path(f'{stem}.html'), page)
  return f'{stem}.md'


def _bold(text: str) -> str:
  return re.sub(r'\*\*(.+?)\*\*', r'<b>\1</b>', text)


def _curves(table: Table) -> list[str]:
  """Returns charts of what the first seed of each row measured as it trained."""
  panels: dict[str, dict[str, report_charts.Points]] = {}
  for row, (first, *_) in table.rows.items():
    for run in first:
      series = opened.series if (opened := _open(run.directory)) else {}
      scores = itertools.chain(*run.stage.scores.values())
      for name in dict.fromkeys(itertools.chain(['loss'], *(x.split(' + ') for x in scores))):
        panels.setdefault(f'{run.stage.name}: {name}', {})[row] = series.get(name, ())
  return [report_charts.line_chart(title, lines) for title, lines in panels.items()]
