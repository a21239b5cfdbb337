"""The report program: one HTML page about a run, or about several side by side.

Everything is inside the page, so that it opens from disk and can be mailed.
What a run does not have is left out.
"""

import html
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5x_lite.errors import UsageError
from t5x_lite.interop import checkpoint_source
from t5x_lite.models import relative_position
from t5x_lite.models.config import T5Config
from t5x_lite.programs import report_charts
from t5x_lite.runs import checkpoints, metric_writers, progress, run_directory

log = logging.getLogger(__name__)

REPORT = 'report.html'
_SAMPLES = 20
# Training curves in this order; evaluations follow by name.
_CURVES = (
  'loss', 'accuracy', 'learning_rate', 'grad_norm', 'update_norm', 'param_norm',
  'target_tokens_per_second', 'seconds_per_step', 'mfu', 'skipped_updates',
)  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #8884; }
td.n, th.n { text-align: right; }
.charts { display: grid; gap: 1em;
  grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
figure { margin: 0; } svg { width: 100%; height: auto; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
svg text.title { font-weight: 600; font-size: 13px; }
svg .grid { stroke: #8883; } svg polyline { fill: none; stroke-width: 1.6; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
.legend span { margin-right: 1em; font-size: 12px; }
.legend i { display: inline-block; width: 10px; height: 10px;
  margin-right: 4px; }
pre { overflow: auto; background: #8881; padding: .8em; font-size: 12px; }
.wrong { color: #d55e00; } .scroll { overflow-x: auto; }
"""


def report(*, runs: Sequence[str], output: str = '') -> str:
  """Writes the page and returns its path.

  Args:
    runs: run directories, such as those of `train` and `finetune`; several are
      drawn into the same charts.
    output: the file to write; RUN/report.html of the first run by default.

  Raises:
    UsageError: if a directory is no run, or the page cannot be written.
  """
  if not runs:
    raise UsageError('report needs a run directory')
  found = {name: _read(name) for name in dict.fromkeys(runs)}
  path = epath.Path(output or epath.Path(runs[0]) / REPORT)
  text = page(found)
  try:
    path.write_text(text)
  except OSError as error:
    raise UsageError(
      f'{path} cannot be written ({error.strerror}): name another --output'
    ) from error
  log.info('%s', path)
  print(os.fspath(path))
  return os.fspath(path)


def _read(name: str) -> dict[str, Any]:
  """Returns everything that is known of a run."""
  root = epath.Path(name)
  if not (root / run_directory.MODEL_FILE).exists():
    raise UsageError(
      f'{name} is no run directory: it has no {run_directory.MODEL_FILE}'
    )
  directory = root / checkpoints.CHECKPOINTS
  return {
    'root': root,
    'metrics': [
      entry
      for entry in metric_writers.read_metrics(name)
      if isinstance(entry, dict) and isinstance(entry.get('step'), int)
    ],
    'model': _json(root / run_directory.MODEL_FILE),
    'config': _json(root / run_directory.CONFIG_FILE),
    'gin': _text(root / 'config.gin'),
    'steps': checkpoints.steps_in(directory),
  }


def _json(path: epath.Path) -> dict[str, Any]:
  try:
    entry = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return entry if isinstance(entry, dict) else {}


def _text(path: epath.Path) -> str:
  try:
    return path.read_text()
  except (OSError, ValueError):
    return ''


# ---- The page ----------------------------------------------------------------


def page(runs: Mapping[str, dict[str, Any]]) -> str:
  """Returns the whole page."""
  title = ', '.join(runs)
  body = [f'<h1>{_escape(title)}</h1>', _headline(runs), _charts(runs)]
  for name, run in runs.items():
    if len(runs) > 1:
      body.append(f'<h1>{_escape(name)}</h1>')
    body += [
      _evaluations(run), _samples(run), _biases(name, run), _cost(run),
      _model(run), _configuration(run),
    ]  # fmt: skip
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{_escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
    + '\n'.join(part for part in body if part)
    + '\n</body></html>\n'
  )


def _escape(value: Any) -> str:
  return html.escape(str(value), quote=True)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a table; numbers are set flush right."""

  def cell(tag: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
      return f'<{tag}>{_escape("" if value is None else value)}</{tag}>'
    return f'<{tag} class="n">{report_charts.number(value)}</{tag}>'

  lines = [''.join(cell('td', value) for value in row) for row in rows]
  head = ''.join(cell('th', name) for name in header)
  body = ''.join(f'<tr>{line}</tr>' for line in lines)
  head = f'<thead><tr>{head}</tr></thead>' if any(header) else ''
  return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _series(run: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
  """Returns (step, value) of every metric."""
  series: dict[str, list[tuple[float, float]]] = {}
  for entry in run['metrics']:
    for name, value in entry.items():
      if name in ('step', 'time') or isinstance(value, bool):
        continue
      if isinstance(value, int | float):
        series.setdefault(name, []).append((entry['step'], value))
  return series


def _headline(runs: Mapping[str, dict[str, Any]]) -> str:
  rows = []
  for name, run in runs.items():
    series = _series(run)
    last = max((entry['step'] for entry in run['metrics']), default=None)
    losses = series.get('loss', [])
    best = [
      min(value for _, value in points)
      for metric, points in series.items()
      if metric.startswith('eval/') and metric.endswith('/loss')
    ]
    rows.append(
      [
        name,
        last,
        losses[-1][1] if losses else None,
        min(best, default=None),
        ', '.join(map(str, run['steps'])),
      ]
    )
  header = ['run', 'steps', 'last training loss', 'least validation loss']
  return _table([*header, 'checkpoints'], rows)


def _charts(runs: Mapping[str, dict[str, Any]]) -> str:
  series = {name: _series(run) for name, run in runs.items()}
  names = {metric for one in series.values() for metric in one}
  groups = sorted(n for n in names if n.startswith('grad_norm/'))
  evaluations = sorted(
    n for n in names if n.startswith(('eval/', 'infer_eval/'))
  )
  charts = [
    report_charts.line_chart(
      metric, {name: one.get(metric, []) for name, one in series.items()}
    )
    for metric in (*(n for n in _CURVES if n in names), *evaluations)
    if not metric.endswith('/target_tokens')
  ]
  for name, one in series.items():
    title = 'gradient norm by group' + (f', {name}' if len(runs) > 1 else '')
    lines = {n.removeprefix('grad_norm/'): one.get(n, []) for n in groups}
    charts.append(report_charts.line_chart(title, lines))
  if not any(charts):
    return '<p>No metrics yet.</p>'
  return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'


def _evaluations(run: Mapping[str, Any]) -> str:
  """Metrics by checkpoint; those that are kept are marked."""
  rows: dict[int, dict[str, float]] = {}
  for name, points in _series(run).items():
    if name.startswith(('eval/', 'infer_eval/')):
      for step, value in points:
        rows.setdefault(int(step), {})[name] = value
  if not rows:
    return ''
  names = sorted({name for row in rows.values() for name in row})
  names = [name for name in names if not name.endswith('/target_tokens')]
  lines = [
    [f'{step} (kept)' if step in run['steps'] else str(step)]
    + [rows[step].get(name) for name in names]
    for step in sorted(rows)
  ]
  return '<h2>Evaluations</h2>' + _table(['step', *names], lines)


def _samples(run: Mapping[str, Any]) -> str:
  """Predictions beside references, of the newest evaluation of each kind."""
  root: epath.Path = run['root']
  files = [
    path
    for folder in ('evaluation', 'test')
    for path in sorted((root / folder).glob('*.jsonl'))
  ]
  for folder in sorted((root / 'infer_eval').glob('*')):
    steps = [path for path in folder.glob('*.jsonl') if path.stem.isdigit()]
    files += sorted(steps, key=lambda path: int(path.stem))[-1:]
  parts = []
  for path in files:
    rows = []
    for line in _text(path).splitlines()[:_SAMPLES]:
      try:
        entry = json.loads(line)
        rows.append([entry[key] for key in ('input', 'prediction', 'target')])
      except (ValueError, KeyError, TypeError):
        continue
    title = f'Predictions: {path.relative_to(root)}'
    body = ''.join(
      f'<tr><td>{_escape(one)}</td>'
      f'<td{_mark(prediction, target)}>{_escape(prediction)}</td>'
      f'<td>{_escape(target)}</td></tr>'
      for one, prediction, target in rows
    )
    head = '<tr><th>input</th><th>prediction</th><th>reference</th></tr>'
    if rows:
      parts.append(
        f'<h2>{_escape(title)}</h2><div class="scroll"><table>{head}{body}'
        '</table></div>'
      )
  return ''.join(parts)


def _mark(prediction: Any, target: Any) -> str:
  references = target if isinstance(target, list) else str(target).split(' | ')
  equal = str(prediction).strip() in [str(one).strip() for one in references]
  return '' if equal else ' class="wrong"'


def _biases(name: str, run: Mapping[str, Any]) -> str:
  """The relative position biases of each stack by distance, head by head."""
  if not run['steps']:
    return ''
  try:
    source = checkpoint_source.open_source(name)
  except UsageError as error:
    return f'<p class="wrong">{_escape(error)}</p>'
  charts = []
  for tensor, values in source.tensors.items():
    if not tensor.endswith('relpos_bias/rel_embedding'):
      continue
    charts.append(_bias_chart(tensor, values.read(), source.config))
  found = ''.join(charts[:4])
  return found and (
    '<h2>Attention bias by distance</h2><p>Key position minus query position, '
    f'in tokens; a line is a head.</p><div class="charts">{found}</div>'
  )


def _bias_chart(name: str, table: np.ndarray, config: T5Config) -> str:
  reach = config.relpos_max_distance
  is_encoder = name.startswith('encoder')
  distances = np.arange(-reach, reach + 1 if is_encoder else 1)
  buckets = relative_position.relative_position_bucket(
    distances,
    bidirectional=is_encoder,
    num_buckets=config.relpos_num_buckets,
    max_distance=reach,
  )
  lines = {
    f'head {head}': list(
      zip(distances.tolist(), row[buckets].astype(float).tolist(), strict=True)
    )
    for head, row in enumerate(table[:12])
  }
  title = name.removesuffix('/rel_embedding')
  return report_charts.line_chart(title, lines, x_label='distance')


def _cost(run: Mapping[str, Any]) -> str:
  series = _series(run)
  times = [
    entry['time'] for entry in run['metrics'] if isinstance(
      entry.get('time'), int | float
    )
  ]  # fmt: skip
  rows: list[list[Any]] = []
  if len(times) > 1:
    span = progress.format_duration(max(times) - min(times))
    rows.append(['from the first to the last metric', span])
  for label, name in (
    ('seconds a step', 'seconds_per_step'),
    ('target tokens a second', 'target_tokens_per_second'),
    ('input tokens a second', 'input_tokens_per_second'),
    ('rows filled with targets', 'target_tokens_fill'),
    ('rows filled with inputs', 'input_tokens_fill'),
    ('model TFLOP/s', 'model_tflops_per_second'),
    ('model FLOP utilisation', 'mfu'),
  ):
    if points := series.get(name):
      mean = sum(value for _, value in points) / len(points)
      rows.append([label, mean])
  if points := series.get('target_tokens'):
    last = max(step for step, _ in points)
    mean = sum(value for _, value in points) / len(points)
    rows.append(['target tokens in all, about', mean * last])
  return '<h2>Cost and data</h2>' + _table(['', ''], rows) if rows else ''


def _model(run: Mapping[str, Any]) -> str:
  entry = run['model']
  fields = dict(entry.get('model', {}))
  fields['lengths'] = entry.get('lengths')
  rows = [[name, str(value)] for name, value in fields.items()]
  return (
    '<h2>Model</h2><details><summary>Architecture</summary>'
    + _table(['', ''], rows)
    + '</details>'
  )


def _configuration(run: Mapping[str, Any]) -> str:
  parts = []
  for title, text in (
    ('config.gin', run['gin']),
    ('config.json', json.dumps(run['config'], indent=2)),
    ('finetune.gin', _text(run['root'] / 'finetune.gin')),
  ):
    if text and text != '{}':
      parts.append(
        f'<details><summary>{title}</summary><pre>{_escape(text)}</pre>'
        '</details>'
      )
  return '<h2>Configuration</h2>' + ''.join(parts) if parts else ''
