"""The preview program: what a task feeds the model, seen before it trains.

Examples after every step, lengths, packed rows and rates: on the terminal, or as one page.
"""

import collections
import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import dataset_iterator
from t5x_lite.data.tasks import catalog, mixing, step_by_step
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.programs import report, report_charts, start_checks

# Rows that are packed and drawn.
_PACKED_ROWS = 8
_MAX_TOKENS, _MAX_TEXT = 160, 500
_COLORS = report_charts.COLORS[:6]
_ANSI = (27, 166, 36, 175, 178, 74)

# A piece of text, and the number of its colour or None.
Piece = tuple[str, int | None]


def preview(
  *,
  task: str,
  split: str = 'train',
  vocabulary: str = 't5',
  module: str = '',
  inputs_length: int = 512,
  targets_length: int = 114,
  examples: int = 2,
  sample: int = 500,
  output: str = '',
) -> str:
  """Shows a task or mixture as the model will see it; returns what is printed.

  UsageError if there is no such task or split, or the page is not named .html.

  Args:
    task: its name.
    split: which split.
    vocabulary: 't5', 'byte', a SentencePiece model file or 'package:NAME'.
    module: Python modules, comma-separated, whose import registers tasks.
    inputs_length: tokens of a row; longer inputs are cut.
    targets_length: likewise of targets.
    examples: of each task, shown after every step.
    sample: examples of each task that are measured.
    output: a page, NAME.html, to write instead of printing.
  """
  if output and epath.Path(output).suffix not in report.SUFFIXES:
    raise UsageError(f'preview.output is {output}: a page is named .html')
  for name, count in (('examples', examples), ('sample', sample)):
    start_checks.check_positive(f'preview.{name}', count)
  config = catalog.VOCABULARIES.get(vocabulary) or VocabularyConfig(path=vocabulary)
  catalog.import_modules(module)
  full_name = catalog.resolve(task, config)
  provider: Any = catalog.find_provider(full_name)
  wanted = {'inputs': inputs_length, 'targets': targets_length}
  features = provider.output_features
  dataset = DatasetConfig(
    mixture_or_task_name=full_name,
    task_feature_lengths={k: n for k, n in wanted.items() if k in features},
    feature_converter='enc_dec' if 'inputs' in features else 'lm',
    batch_size=_PACKED_ROWS,
    split=split,
    num_epochs=1,
  )
  catalog.task_provider(dataset)
  tasks = [one for one in getattr(provider, 'tasks', [provider]) if split in one.splits]
  blocks: list[Block] = [('title', f'{task}, {split}')]
  if shares := mixing.shares(provider, split):
    rows = [[name, f'{share:.2%}'] for name, share in shares.items()]
    blocks.append(('table', 'Mixture', ['task', 'share of examples'], rows))
  measured, lengths = [], {}
  for one in tasks:
    found = lengths[one.name] = step_by_step.measure(dataset, one, sample)
    for number, (step, rows) in enumerate(step_by_step.examples_of(one, dataset, examples)):
      shown = [pieces_of(row, config) for row in rows]
      blocks.append(('step', f'{one.name}, {number}. {step}', shown))
    for feature, counts in found.items():
      limit, total = dataset.lengths[feature], sum(counts)
      kept = np.minimum(counts, limit)
      shares = (np.mean(kept < counts), 1 - kept.sum() / max(1, total), 1 - kept.mean() / limit)
      sizes = [len(counts), f'{np.mean(counts):.1f}', max(counts), limit]
      bars = [n for _, n in _histogram(counts, 16)]
      drawn = ''.join('.▁▂▃▄▅▆▇█'[-(-8 * n // max(bars))] for n in bars)
      measured.append([one.name, feature, *sizes, *(f'{share:.1%}' for share in shares), drawn])
  header = 'task,feature,examples,mean,longest,length,cut,tokens lost,padding,histogram'.split(',')
  blocks.append(('table', 'Lengths in tokens', header, measured))
  with contextlib.closing(dataset_iterator.DatasetIterator(dataset)) as iterator:
    batch = next(iterator)
  for feature, side in (('inputs', 'encoder'), ('targets', 'decoder')):
    if (segments := batch.get(f'{side}_segment_ids')) is not None:
      blocks.append(('rows', f'Packed {feature}: padding {np.mean(segments == 0):.1%}', segments))
  if output:
    epath.Path(output).write_text(as_page(blocks, _length_charts(lengths)))
    print(output)
    return output
  print(as_text(blocks, color=sys.stdout.isatty()))
  return as_text(blocks)


def pieces_of(example: Mapping[str, Any], config: VocabularyConfig) -> dict[str, list[Piece]]:
  """Returns every field as pieces, at most _MAX_TOKENS; sentinels and their spans are numbered."""
  return {name: _pieces(name, np.asarray(x), config) for name, x in example.items()}


def _pieces(name: str, value: np.ndarray, config: VocabularyConfig) -> list[Piece]:
  if value.dtype.kind in 'OSU':
    first = value.flat[0] if value.size else ''
    first = first.decode('utf-8', 'replace') if isinstance(first, bytes) else str(first)
    more = f' (and {value.size - 1} more)' if value.size > 1 else ''
    cut = ' \u2026' if len(first) > _MAX_TEXT else ''
    return [(f'{first[:_MAX_TEXT]}{cut}{more}', None)]
  if value.ndim != 1 or value.dtype.kind not in 'iu':
    return [(str(value), None)]
  vocabulary = vocabularies.make_vocabulary(config)
  piece = getattr(vocabulary, 'piece', lambda token: vocabulary.decode([token]))
  pieces, current = [], None
  for token in value[:_MAX_TOKENS].tolist():
    sentinel = vocabulary.vocab_size - 1 - token
    is_sentinel = 0 <= sentinel < config.extra_ids
    if is_sentinel:
      current = sentinel
    # What follows a sentinel among the targets is what it stands for.
    colored = is_sentinel or (name == 'targets' and token != vocabulary.eos_id)
    text = f'<extra_id_{sentinel}>' if is_sentinel else piece(token) or f'<{token}>'
    pieces.append((text, current if colored else None))
  return pieces + [('\u2026', None)] * (len(value) > _MAX_TOKENS)


# What is shown: ('title', text), ('step', title, examples as pieces), ('table', title, header,
# rows) or ('rows', title, segments).
Block = tuple[Any, ...]


def as_text(blocks: Sequence[Block], *, color: bool = False) -> str:
  """Returns blocks as lines for a terminal."""
  lines = []

  def paint(text: str, number: int | None) -> str:
    plain = number is None or not color
    return text if plain else f'\x1b[38;5;{_ANSI[number % len(_ANSI)]}m{text}\x1b[0m'

  for kind, title, *rest in blocks:
    lines += ['', title, *['=' * len(title)] * (kind == 'title')]
    if kind == 'step':
      for name, pieces in itertools.chain(*(example.items() for example in rest[0])):
        lines.append(f'  {name:20} {" ".join(paint(*piece) for piece in pieces)}')
    elif kind == 'table':
      cells = [[str(x) for x in line] for line in (rest[0], *rest[1])]
      widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
      lines += ['  ' + '  '.join(map(str.ljust, line, widths)) for line in cells]
    elif kind == 'rows':
      lines[-1] += ' (a letter is an example, a dot padding)'
      for row in rest[0][:, :: -(-rest[0].shape[1] // 96)].tolist():
        lines.append('  ' + ''.join('.' if n == 0 else chr(97 + (n - 1) % 26) for n in row))
  return '\n'.join(lines[1:])


def as_page(blocks: Sequence[Block], charts: Iterable[str]) -> str:
  """Returns blocks, and charts after them, as a page."""
  parts = []

  def paint(text: str, number: int | None) -> str:
    color = '' if number is None else f' style="background:{_COLORS[number % len(_COLORS)]}66"'
    return f'<span{color}>{report.escape(text)}</span>'

  for kind, title, *rest in blocks:
    tag = {'title': 'h1', 'step': 'h3'}.get(kind, 'h2')
    parts.append(f'<{tag}>{report.escape(title)}</{tag}>')
    if kind == 'step':
      for name, pieces in itertools.chain(*(example.items() for example in rest[0])):
        shown = ''.join(paint(*piece) for piece in pieces)
        parts.append(f'<div class="tokens"><b>{report.escape(name)}</b> {shown}</div>')
    elif kind == 'table':
      parts.append(report.table(*rest))
    elif kind == 'rows':
      for row in rest[0].tolist():
        bars = ''
        for n, run in itertools.groupby(row):
          color = _COLORS[n % len(_COLORS)] if n else '#8883'
          bars += f'<i style="flex:{len(list(run))};background:{color}"></i>'
        parts.append(f'<div class="row">{bars}</div>')
  parts.append(f'<div class="charts">{"".join(charts)}</div>')
  return report.whole_page(blocks[0][1], parts)


def _length_charts(lengths: Mapping[str, Mapping[str, Sequence[int]]]) -> Iterator[str]:
  """Yields a chart a feature of how many examples have which length."""
  for feature in dict.fromkeys(name for one in lengths.values() for name in one):
    lines = {task: _histogram(found[feature], 40) for task, found in lengths.items()}
    yield report_charts.line_chart(f'Examples by length of {feature}', lines, x_label='tokens')


def _histogram(counts: Sequence[int], bins: int) -> list[tuple[int, int]]:
  """Returns where each of at most `bins` bins from 0 on begins, and how many counts it has."""
  width = max(counts) // bins + 1
  found = collections.Counter(n // width * width for n in counts)
  return [(n, found[n]) for n in range(0, max(found) + 1, width)]
