"""Line charts as SVG text, for pages that open from disk without a library."""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

# Told apart by people who do not see all colours (Okabe and Ito 2008).
COLORS = (
  '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#808080',
)  # fmt: skip

_WIDTH, _HEIGHT = 500, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 36
# Points of one line at most: more than pixels only make the page large.
_MAX_POINTS = 600

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Scale:
  """Numbers to pixels along one axis."""

  low: float
  high: float
  start: float
  end: float

  def __call__(self, value: float) -> float:
    """Returns the pixel of a number."""
    share = (value - self.low) / (self.high - self.low)
    return self.start + share * (self.end - self.start)


def line_chart(
  title: str, lines: Mapping[str, Points], *, x_label: str = 'step'
) -> str:
  """Returns an SVG picture; '' if no line has a point.

  Args:
    title: above it.
    lines: points by name, for the legend if there are several. Values that are
      not finite are left out.
    x_label: below it.
  """
  drawn = {
    name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    for name, points in lines.items()
  }
  drawn = {name: _thin(points) for name, points in drawn.items() if points}
  if not drawn:
    return ''
  xs = [x for points in drawn.values() for x, _ in points]
  ys = [y for points in drawn.values() for _, y in points]
  x_scale = Scale(*_bounds(xs), _LEFT, _WIDTH - _RIGHT)
  y_scale = Scale(*_bounds(ys), _HEIGHT - _BOTTOM, _TOP)
  parts = [
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="{_text(title)}">',
    f'<text x="{_LEFT}" y="18" class="title">{_text(title)}</text>',
  ]
  for tick in ticks(y_scale.low, y_scale.high):
    y = y_scale(tick)
    parts.append(
      f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
      f'class="grid"/><text x="{_LEFT - 6}" y="{y + 4:.1f}" '
      f'class="tick end">{number(tick)}</text>'
    )
  for tick in ticks(x_scale.low, x_scale.high):
    x = x_scale(tick)
    parts.append(
      f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
      f'class="tick middle">{number(tick)}</text>'
    )
  parts.append(
    f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" '
    f'class="tick middle">{_text(x_label)}</text>'
  )
  for i, points in enumerate(drawn.values()):
    color = COLORS[i % len(COLORS)]
    path = ' '.join(f'{x_scale(x):.1f},{y_scale(y):.1f}' for x, y in points)
    if len(points) > 1:
      parts.append(f'<polyline points="{path}" stroke="{color}"/>')
    if len(points) <= 40:
      parts += [
        f'<circle cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="2.5" '
        f'fill="{color}"><title>{number(x)}: {number(y)}</title></circle>'
        for x, y in points
      ]
  parts.append('</svg>')
  picture = ''.join(parts)
  legend = ''
  if len(drawn) > 1:
    entries = [
      f'<span><i style="background:{COLORS[i % len(COLORS)]}"></i>'
      f'{_text(name)}</span>'
      for i, name in enumerate(drawn)
    ]
    legend = f'<div class="legend">{"".join(entries)}</div>'
  return f'<figure>{picture}{legend}</figure>'


def number(value: float) -> str:
  """Returns a number in few digits."""
  if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
    return f'{value:.3g}'
  return f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Returns about `count` round numbers between two bounds."""
  raw = (high - low) / count
  unit = 10.0 ** math.floor(math.log10(raw))
  step = next((m * unit for m in (1, 2, 5) if m * unit >= raw), 10 * unit)
  first = math.ceil(low / step)
  found = [i * step for i in range(first, first + 2 * count + 2)]
  return [value for value in found if value <= high + 1e-9 * step]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
  low, high = min(values), max(values)
  if high - low < 1e-9 * max(1.0, abs(high)):
    pad = max(abs(high) * 0.05, 1e-6)
    return low - pad, high + pad
  return low, high


def _thin(points: Points) -> list[tuple[float, float]]:
  """Returns means of neighbours, as many as can be seen."""
  points = sorted(points)
  size = -(-len(points) // _MAX_POINTS)
  if size == 1:
    return list(points)
  groups = [points[i : i + size] for i in range(0, len(points), size)]
  return [
    (sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g))
    for g in groups
  ]


def _text(value: str) -> str:
  return html.escape(value, quote=True)
