"""The report program: one HTML page about a run, or about several side by side.

One file; what a run lacks is left out. report_runs.py reads, report_charts.py draws.
"""

import contextlib
import html
import importlib.resources
import itertools
import json
import math
import os
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5x_lite.errors import UsageError, first_line, refusing
from t5x_lite.interop import checkpoint_source, tensor_names
from t5x_lite.models import relative_position
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import distributed
from t5x_lite.programs import report_charts, report_runs
from t5x_lite.programs.report_runs import Run
from t5x_lite.runs import progress

SUFFIXES = ('.html', '.htm')
_NUM_SAMPLES = 20
# Longer texts are cut on the page; they are whole in the run's files.
_MAX_TEXT = 1500
# Rows of a table of evaluations, and pictures of biases: a deep umT5 has one a layer.
_MAX_ROWS = 100
_MAX_BIASES = 12
# Training curves in this order; evaluations follow by name.
_CURVES = (
  'loss accuracy learning_rate grad_norm update_norm param_norm target_tokens_per_second '
  'input_tokens_per_second seconds_per_step mfu skipped_updates'
).split()
_MAY_BE_LOG = ('loss', 'grad_norm', 'perplexity')


def report(*, runs: Sequence[str], output: str = '') -> str:
  """Writes the page and returns its path; UsageError if it cannot, or a directory is no run.

  Args:
    runs: run directories of `train`, `finetune` or others; several share the charts.
    output: the file to write; RUN/report.html of the first run by default.
  """
  if not runs:
    raise UsageError('report needs a run directory')
  path = epath.Path(output or epath.Path(runs[0]) / 'report.html')
  if path.suffix not in SUFFIXES:
    why = 'a page is named .html, so that no other file is replaced by mistake'
    raise UsageError(f'report.output is {output}: {why}')
  given = list(dict.fromkeys(runs))
  names = zip(given, report_runs.names_of(given), strict=True)
  found = [report_runs.read(one, name=name) for one, name in names]
  text = page(found)
  if distributed.is_primary():
    with refusing(f'{path} cannot be written, name another --output', OSError):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    print(os.fspath(path))
  return os.fspath(path)


def page(runs: Sequence[Run]) -> str:
  """Returns the whole page."""
  title = ', '.join(run.name for run in runs)
  body = [
    f'<h1>{escape(title)}</h1>',
    _side_by_side(runs, {'At the end': _end, 'Cost': _cost, 'Best evaluation': _best}),
    _charts(runs),
    _samples(runs),
    _side_by_side(runs, {'Data': _data, 'Model': _model}),
  ]
  for run in runs:
    if len(runs) > 1:
      body.append(f'<h1>{escape(run.name)}</h1>')
    body += [_results(run), _steps(run), _biases(run), _configuration(run)]
  return whole_page(title, body)


def whole_page(title: str, body: Sequence[str]) -> str:
  """Returns a page of its parts; empty ones are left out."""
  text = importlib.resources.files('t5x_lite.programs').joinpath('report.html').read_text()
  text = string.Template(text).substitute(title=escape(title), body='\n'.join(filter(None, body)))
  # A model may write half of a surrogate pair, which no encoding has.
  return text.encode('utf-8', 'replace').decode()


def escape(value: Any) -> str:
  """Returns a value as text of a page."""
  return html.escape(str(value))


def _cut(value: Any) -> str:
  text = str(value)
  return escape(text if len(text) <= _MAX_TEXT else f'{text[:_MAX_TEXT]} \u2026')


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a table; columns of numbers are set flush right."""

  def cell(tag: str, value: Any, is_number: bool) -> str:
    if isinstance(value, float) or (is_number and isinstance(value, int)):
      value = report_charts.number(value)
    kind = ' class="n"' if is_number else ''
    return f'<{tag}{kind}>{escape("" if value is None else value)}</{tag}>'

  numeric = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
  lines = [''.join(map(cell, itertools.repeat('td'), row, numeric)) for row in rows]
  head = ''.join(map(cell, itertools.repeat('th'), header, numeric)) if any(header) else ''
  return _table_of(head, lines)


def _table_of(head: str, lines: Sequence[str], kind: str = '') -> str:
  body = ''.join(f'<tr>{line}</tr>' for line in lines)
  head = head and f'<thead><tr>{head}</tr></thead>'
  return f'<div class="scroll"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def _side_by_side(runs: Sequence[Run], tables: Mapping[str, Callable[[Run], Any]]) -> str:
  """Returns tables by title, with a column a run; rows that none has are left out."""
  parts = ''
  header = ['', *(run.name for run in runs)] if len(runs) > 1 else ['', '']
  for title, facts in tables.items():
    columns = [facts(run) for run in runs]
    labels = dict.fromkeys(label for one in columns for label in one)
    rows = [[label, *(one.get(label) for one in columns)] for label in labels]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    parts += f'<section><h2>{title}</h2>{table(header, rows)}</section>' if rows else ''
  return f'<div class="tables">{parts}</div>'


def _end(run: Run) -> dict[str, Any]:
  steps = [points[-1][0] for points in run.series.values()]
  done = max([*steps, *run.steps], default=None)
  total = run.config.get('total_steps')
  return {
    'steps': done if total in (None, done) else f'{done or 0:,} of {total}',
    'training loss': run.last('loss'),
    'training accuracy': run.last('accuracy'),
    'gradient norm': run.last('grad_norm'),
    'learning rate': run.last('learning_rate'),
    'checkpoints': ', '.join(map(str, run.steps)) or 'none',
  }


def _model(run: Run) -> dict[str, Any]:
  if not run.model:
    return {}
  shown: dict[str, Any] = {}
  with contextlib.suppress(UsageError, TypeError, ValueError):  # another version's, or damaged
    leaves = tensor_names.leaves(T5Config(**run.model))
    shown['parameters'] = f'{sum(math.prod(leaf.shape) for _, leaf, _ in leaves):,}'
  given = {name: value for name, value in run.model.items() if value is not None}
  for name, value in sorted(given.items(), key=lambda field: isinstance(field[1], bool)):
    if isinstance(value, list):
      value = ', '.join(map(str, value))
    shown[name] = value if type(value) in (int, float) else str(value)
  return shown


def _data(run: Run) -> dict[str, Any]:
  dataset = report_runs.as_dict(run.config.get('dataset'))
  names = {'task or mixture': 'mixture_or_task_name', 'split': 'split', 'batch size': 'batch_size'}
  found = {label: dataset.get(name) for label, name in names.items()}
  found |= {f'length of {k}': v for k, v in run.lengths.items()}
  for name in sorted(run.series):
    if name.endswith('_tokens_fill') and (share := run.mean(name)) is not None:
      label = name.removesuffix('_tokens_fill')
      found[f'positions filled with {label} tokens'] = f'{share:.1%}'
  return found


def _cost(run: Run) -> dict[str, Any]:
  found: dict[str, Any] = {}
  if (seconds := run.total('seconds_per_step')) is not None:
    found['time in training steps'] = progress.format_duration(seconds)
  if len(run.times) > 1:
    span = max(run.times) - min(run.times)
    found['first to last line of metrics'] = progress.format_duration(span)
  speeds = ('seconds_per_step', 'target_tokens_per_second', 'input_tokens_per_second')
  found |= {name.replace('_', ' '): run.mean(name) for name in speeds}
  found['model TFLOP/s'] = run.mean('model_tflops_per_second')
  found['model FLOP utilisation'] = run.mean('mfu')
  for kind in ('target', 'input'):
    if (tokens := run.total(f'{kind}_tokens')) is not None:
      found[f'{kind} tokens in all, about'] = progress.format_count(tokens)
  return found


def _best(run: Run) -> dict[str, Any]:
  """Returns the best value of every evaluation's metric and its step."""
  found = {}
  for name, points in sorted(run.evaluations().items()):
    step, value = report_runs.best(name, points)
    newest = points[-1][1]
    now = '' if newest == value else f', now {report_charts.number(newest)}'
    found[name] = f'{report_charts.number(value)} at step {step}{now}'
  return found


def _charts(runs: Sequence[Run]) -> str:
  """Returns curves, a line a run; evaluations of a single run share a chart, a line a task."""

  def lines(name: str) -> dict[str, report_charts.Points]:
    return {run.name: run.series.get(name, ()) for run in runs}

  names = {name for run in runs for name in run.series}
  panels = {name: lines(name) for name in _CURVES if name in names}
  for name in sorted({name for run in runs for name in run.evaluations()}):
    kind, task, metric = (*name.split('/', 2), '')[:3]
    if len(runs) == 1:
      panels.setdefault(f'{kind}: {metric}', {})[task] = runs[0].series[name]
    else:
      panels[name] = lines(name)
  groups = {x.removeprefix('grad_norm/'): x for x in sorted(names) if x.startswith('grad_norm/')}
  for run in runs if groups else ():
    title = f'grad_norm by group{f", {run.name}" if len(runs) > 1 else ""}'
    panels[title] = {group: run.series.get(name, ()) for group, name in groups.items()}
  charts = ''.join(
    report_charts.line_chart(title, found, may_be_log=any(part in title for part in _MAY_BE_LOG))
    for title, found in panels.items()
  )
  if not charts:
    return '<p>No metrics yet.</p>'
  return f'<h2>Curves</h2><div class="charts">{charts}</div>'


def _samples(runs: Sequence[Run]) -> str:
  """Returns predictions beside references, a column a run."""
  found: dict[str, dict[str, report_runs.Predictions]] = {}
  for run in runs:
    for one in run.predictions:
      found.setdefault(one.name, {})[run.name] = one
  shown = ''.join(_sample_table(*item, several=len(runs) > 1) for item in found.items())
  return shown and f'<h2>Predictions</h2>{shown}'


def _sample_table(name: str, columns: dict[str, report_runs.Predictions], *, several: bool) -> str:
  """Returns the first examples of an evaluation; other runs' by their input."""
  first, *_ = columns.values()
  answers = [{_key(line): line['prediction'] for line in one.lines} for one in columns.values()]
  rows = []
  for line in first.lines[:_NUM_SAMPLES]:
    target = line['target']
    cells = f'<td>{_cut(line["input"])}</td>'
    for answer in answers:
      prediction = answer.get(_key(line))
      mark = '' if prediction is None or is_right(prediction, target) else ' class="wrong"'
      cells += f'<td{mark}>{"" if prediction is None else _cut(prediction)}</td>'
    text = ' | '.join(map(str, target)) if isinstance(target, list) else target
    rows.append(f'{cells}<td>{_cut(text)}</td>')
  titles = list(columns) if several else ['prediction']
  head = ''.join(f'<th>{escape(one)}</th>' for one in ('input', *titles, 'reference'))
  notes = []
  for run, one in columns.items():
    equal = sum(is_right(x['prediction'], x['target']) for x in one.lines)
    prefix = f'{run}: ' if several else ''
    notes.append(f'{prefix}{one.file}, {equal} of {len(one.lines)} equal to a reference')
  note = f'<p class="note">{escape("; ".join(notes))}</p>'
  return f'<h3>{escape(name)}</h3>{note}' + _table_of(head, rows, ' class="samples"')


def _key(line: Any) -> tuple[str, str]:
  return str(line['input']), str(line['target'])


def is_right(prediction: Any, target: Any) -> bool:
  """True if a prediction equals a reference; ' | ' parts alternatives."""
  references = [str(one).strip() for one in (target if isinstance(target, list) else [target])]
  parts = [part for one in references for part in (one, *one.split(' | '))]
  return str(prediction).strip() in map(str.strip, parts)


def _results(run: Run) -> str:
  """Returns the metrics of `eval`, the quickstart's test and the like."""
  shown = ''
  for folder, tasks in run.results.items():
    rows = [[task, name, value] for task, found in tasks.items() for name, value in found.items()]
    shown += f'<h2>Evaluation of a checkpoint: {escape(folder)}</h2>'
    shown += table(['task', 'metric', 'value'], rows)
  return shown


def _steps(run: Run) -> str:
  """Returns metrics by step; checkpoints that are kept are marked."""
  evaluations = {name: dict(xy) for name, xy in run.evaluations().items()}
  steps = set(run.steps).union(*evaluations.values())
  if not steps or not run.series:
    return ''
  losses = run.series.get('loss', ())
  rows = []
  for step in sorted(steps):
    loss = [y for x, y in losses if x <= step and math.isfinite(y)][-1:]
    values = [points.get(step) for points in evaluations.values()]
    kept = 'kept' if step in run.steps else ''
    rows.append([str(step), kept, *(loss or [None]), *values])
  shown = [row for row in rows[:-_MAX_ROWS] if row[1]] + rows[-_MAX_ROWS:]
  note = ''
  if len(shown) < len(rows):
    text = f'Of {len(rows)} steps, the last {_MAX_ROWS} and those with a checkpoint.'
    note = f'<p class="note">{text}</p>'
  header = ['step', 'checkpoint', 'training loss', *evaluations]
  return f'<h2>Metrics by step</h2>{note}{table(header, shown)}'


def _biases(run: Run) -> str:
  """Returns the relative position biases of each stack by distance."""
  if not run.steps:
    return ''
  try:
    source = checkpoint_source.open_source(run.path)
    names = [name for name in source.tensors if name.endswith('relpos_bias/rel_embedding')]
    tables = {name: source.tensors[name].read() for name in names}
  except (UsageError, OSError, ValueError, KeyError) as error:
    return f'<p class="wrong">{_cut(first_line(error))}</p>'
  if not tables:
    return ''
  names = list(tables)[:: -(-len(tables) // _MAX_BIASES)]
  charts = ''.join(_bias_chart(name, tables[name], source.config) for name in names)
  left = len(tables) - len(names)
  note = f' {left} more layers are not drawn.' if left else ''
  return (
    f'<h2>Attention bias by distance, step {source.step}</h2><p class="note">A row is a head, a '
    'column the distances (key position minus query position, in tokens) that share a number. Blue '
    f'is below zero and orange above; only differences within a row matter.{note}</p><div '
    f'class="charts">{charts}</div>'
  )


def _bias_chart(name: str, table: np.ndarray, config: T5Config) -> str:
  reach, is_encoder = config.relpos_max_distance, name.startswith('encoder')
  distances = np.arange(-reach, reach + 1 if is_encoder else 1)
  how = {'num_buckets': config.relpos_num_buckets, 'max_distance': reach}
  buckets = relative_position.relative_position_bucket(distances, bidirectional=is_encoder, **how)
  # Distances that share a bucket are neighbours.
  starts = np.flatnonzero(np.diff(buckets, prepend=-1))
  ends = [*(starts[1:] - 1), len(buckets) - 1]
  bounds = zip(distances[starts], distances[ends], strict=True)
  columns = [f'{a}' if a == b else f'{a}\u2026{b}' for a, b in bounds]
  rows = np.asarray(table, np.float32)[:, buckets[starts]].tolist()
  return report_charts.heat_map(name.removesuffix('/rel_embedding'), rows, columns)


def _configuration(run: Run) -> str:
  shown = ''
  for name, text in run.texts.items():
    if name.endswith('.json') and run.config:
      text = json.dumps(run.config, indent=2, ensure_ascii=False)
    shown += f'<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>'
  return f'<h2>Configuration</h2>{shown}' if shown else ''
