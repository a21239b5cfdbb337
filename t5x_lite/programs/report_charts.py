"""Charts as SVG text, for pages that open from disk without a library."""

import functools
import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Told apart by people who do not see all colours (Okabe and Ito 2008).
COLORS = '#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #808080'.split()

_WIDTH, _HEIGHT = 500, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 36
# Points of one line at most: more than pixels only make the page large.
_MAX_POINTS = 600
# Lines of at most so many points show each as a dot.
_MAX_DOTS = 40
_LOG_FACTOR = 50

Points = Sequence[tuple[float, float]]


def line_chart(
  title: str, lines: Mapping[str, Points], *, x_label: str = 'step', may_be_log: bool = False
) -> str:
  """Returns an SVG picture of points by name; '' if no line has any.

  A value that is not finite is a gap; a line keeps its colour whichever others have points. The
  axis `may_be_log` if the values span a factor of 50.
  """
  segments = {name: _segments(points) for name, points in lines.items()}
  flat = [point for parts in segments.values() for part in parts for point in part]
  if not flat:
    return ''
  ys = [y for _, y in flat]
  is_log = may_be_log and min(ys) > 0 and max(ys) / min(ys) > _LOG_FACTOR
  level = math.log10 if is_log else float
  x_bounds, y_bounds = _bounds([x for x, _ in flat]), _bounds([*map(level, ys)])
  x_place = _placer(x_bounds, _LEFT, _WIDTH - _RIGHT)
  y_place = _placer(y_bounds, _HEIGHT - _BOTTOM, _TOP)
  picture = ''
  for tick in ticks(*(10.0**y if is_log else y for y in y_bounds), is_log=is_log):
    y = y_place(level(tick))
    ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    picture += f'<line {ends} class="grid"/>' + _tick(_LEFT - 6, y + 4, number(tick), 'end')
  picture += _x_ticks(x_bounds, x_place, _HEIGHT - _BOTTOM)
  picture += _tick((_LEFT + _WIDTH) / 2, _HEIGHT - 4, x_label)
  for i, found in enumerate(segments.values()):
    picture += _draw(found, lambda x, y: (x_place(x), y_place(level(y))), i)
  legend = ''
  if len(lines) > 1:
    entries = [
      f'<span><svg viewBox="0 0 18 8" class="key"><line x2="18" y1="4" y2="4" {_stroke(i)}/></svg>'
      f'{html.escape(name)}</span>'
      for i, name in enumerate(lines)
      if segments[name]
    ]
    legend = f'<div class="legend">{"".join(entries)}</div>'
  return _figure(f'{title} (log scale)' if is_log else title, _HEIGHT, picture, legend)


def heat_map(title: str, rows: Sequence[Sequence[float]], columns: Sequence[str]) -> str:
  """Returns a picture of a table with named columns; blue is below zero, orange above."""
  finite = [abs(x) for row in rows for x in row if math.isfinite(x)]
  top = max(finite, default=0.0) or 1.0
  width = (_WIDTH - _LEFT - _RIGHT) / len(columns)
  height = max(6.0, min(20.0, 200 / len(rows)))
  bottom = _TOP + height * len(rows)
  picture = ''
  for i, row in enumerate(rows):
    y = _TOP + i * height
    if height >= 10 or i % 4 == 0:
      picture += _tick(_LEFT - 6, y + height / 2 + 4, str(i), 'end')
    for j, value in enumerate(row):
      if math.isfinite(value):
        color = COLORS[0] if value < 0 else COLORS[1]
        picture += (
          f'<rect x="{_LEFT + j * width:.1f}" y="{y:.1f}" width="{width:.1f}" '
          f'height="{height:.1f}" fill="{color}" '
          f'fill-opacity="{abs(value) / top:.2f}">'
          f'<title>{i}, {html.escape(columns[j])}: {number(value)}</title></rect>'
        )
  for j in range(0, len(columns), -(-len(columns) // 8)):
    picture += _tick(_LEFT + (j + 0.5) * width, bottom + 16, columns[j])
  return _figure(f'{title} (\u00b1{number(top)})', round(bottom + _BOTTOM), picture)


def dot_chart(
  title: str, rows: Mapping[str, Sequence[float]], marks: Mapping[str, float | None]
) -> str:
  """Returns a row of dots for each name, their mean as a bar, its mark as a ring; '' if no dot."""
  found = [x for values in rows.values() for x in values]
  if not found:
    return ''
  found += [x for x in marks.values() if x is not None]
  bounds = _bounds(found)
  place = _placer(bounds, 2.6 * _LEFT, _WIDTH - 2 * _RIGHT)
  bottom = _TOP + 20 * len(rows)
  picture = _x_ticks(bounds, place, bottom)
  for i, (name, values) in enumerate(rows.items()):
    y = _TOP + 20 * i + 10
    picture += _tick(2.5 * _LEFT, y + 4, name[:26], 'end')
    for value in values:
      picture += f'<circle cx="{place(value):.1f}" cy="{y}" r="3" fill="{COLORS[0]}"/>'
    if values:
      x = place(sum(values) / len(values))
      picture += f'<path d="M{x:.1f} {y - 7}V{y + 7}" stroke="{COLORS[1]}" stroke-width="2"/>'
    if (mark := marks.get(name)) is not None:
      ring = f'r="4" fill="none" stroke="{COLORS[2]}"'
      picture += f'<circle cx="{place(mark):.1f}" cy="{y}" {ring}/>'
  return _figure(title, bottom + _BOTTOM, picture)


def _figure(title: str, height: int, picture: str, legend: str = '') -> str:
  title = html.escape(title)
  return (
    f'<figure><svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{title}">'
    f'<text x="{_LEFT}" y="18" class="title">{title}</text>{picture}</svg>{legend}</figure>'
  )


def _placer(bounds: tuple[float, float], start: float, end: float) -> Callable[[float], Any]:
  """Returns the pixel of a number along an axis."""
  return functools.partial(np.interp, xp=bounds, fp=(start, end))


def _x_ticks(bounds: tuple[float, float], place: Callable[[float], Any], bottom: float) -> str:
  return ''.join(_tick(place(tick), bottom + 16, number(tick)) for tick in ticks(*bounds))


def _tick(x: float, y: float, text: str, anchor: str = 'middle') -> str:
  return f'<text x="{x:.1f}" y="{y:.1f}" class="tick {anchor}">{html.escape(text)}</text>'


def _stroke(i: int) -> str:
  """Returns the colour of the i-th line, dashed once colours run out."""
  dashes = i // len(COLORS)
  dash = f' stroke-dasharray="{6 / dashes:.0f} 3"' if dashes else ''
  return f'stroke="{COLORS[i % len(COLORS)]}"{dash}'


def _draw(
  segments: Sequence[Points], place: Callable[[float, float], tuple[float, float]], i: int
) -> str:
  """Returns the elements of one line; few points, or lone ones, are dots."""
  few, drawn = sum(map(len, segments)) <= _MAX_DOTS, ''
  for points in segments:
    places = [(*point, *place(*point)) for point in points]
    if len(points) > 1:
      path = ' '.join(f'{x:.1f},{y:.1f}' for _, _, x, y in places)
      drawn += f'<polyline points="{path}" {_stroke(i)}/>'
    for step, value, x, y in places if few or len(points) == 1 else ():
      drawn += (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{COLORS[i % len(COLORS)]}">'
        f'<title>{number(step)}: {number(value)}</title></circle>'
      )
  return drawn


def number(value: float) -> str:
  """Returns a number in few digits."""
  if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
    return f'{value:.3g}'
  return f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'


def ticks(low: float, high: float, *, is_log: bool = False) -> list[float]:
  """Returns a few round numbers between two bounds."""
  from matplotlib import ticker  # takes a second to import

  locator = ticker.MaxNLocator(5, steps=[1, 2, 5, 10])
  if is_log:
    locator = ticker.LogLocator(subs=(1, 2, 5) if high <= 1000 * low else (1,), numticks=9)
  slack = 1e-9 * (high - low)
  found = map(float, locator.tick_values(low, high))
  return [x for x in found if low - slack <= x <= high + slack]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
  low, high = min(values), max(values)
  flat = high - low < 1e-9 * max(1.0, abs(high))
  pad = max(abs(high) * 0.05, 1e-6) if flat else 0.0
  return low - pad, high + pad


def _segments(points: Points) -> list[list[tuple[float, float]]]:
  """Cuts a line at its gaps, into means of neighbours: as many as can be seen."""
  points = sorted(points, key=lambda point: point[0])
  size = max(1, -(-len(points) // _MAX_POINTS))
  groups = itertools.groupby(points, key=lambda point: math.isfinite(point[1]))
  found = []
  for segment in (list(group) for is_drawn, group in groups if is_drawn):
    parts = (segment[i : i + size] for i in range(0, len(segment), size))
    found.append([tuple(np.mean(part, axis=0).tolist()) for part in parts])
  return found
