import re
from xml.etree import ElementTree

import pytest

from t5x_lite.programs import report_charts


def test_a_chart_is_well_formed_and_escaped():
  text = report_charts.line_chart(
    'loss <b>', {'a & b': [(1, 2.0), (2, 1.0)], 'c': [(1, 3.0), (2, 0.5)]}
  )
  root = ElementTree.fromstring(text)
  assert len(root.findall('.//polyline')) == 2
  assert 'loss &lt;b&gt;' in text and 'a &amp; b' in text


def test_gaps_and_flat_lines_and_single_points():
  nan = float('nan')
  assert report_charts.line_chart('x', {'a': [(1, nan)], 'b': []}) == ''
  flat = report_charts.line_chart('x', {'a': [(1, 5.0), (2, 5.0), (3, nan)]})
  assert 'nan' not in flat and 'inf' not in flat
  gap = [(1, 5.0), (2, 4.0), (3, nan), (4, 3.0), (5, 2.0), (6, nan), (7, 1.0)]
  cut = report_charts.line_chart('x', {'a': gap})
  assert cut.count('<polyline') == 2 and cut.count('<circle') == 5
  long = [(i, nan if i == 3000 else i) for i in range(6000)]
  assert report_charts.line_chart('x', {'a': long}).count('<polyline') == 2
  one = report_charts.line_chart('x', {'a': [(7, 1.0)]})
  assert '<circle' in one and '<polyline' not in one


def test_a_line_keeps_its_colour():
  """Whichever other runs have the metric."""
  points = [(1, 1.0), (2, 2.0)]
  text = report_charts.line_chart('x', {'a': [], 'b': points})
  assert report_charts.COLORS[1] in text
  assert report_charts.COLORS[0] not in text
  many = {str(i): points for i in range(9)}
  assert 'stroke-dasharray' in report_charts.line_chart('x', many)


def test_wide_ranges_get_a_logarithmic_axis():
  points = [(1, 1000.0), (2, 0.1)]
  lines = {'a': points}
  text = report_charts.line_chart('loss', lines, may_be_log=True)
  assert 'log scale' in text and '>100<' in text and '>10<' in text
  assert 'log scale' not in report_charts.line_chart('loss', lines)
  narrow = {'a': [(1, 3.0), (2, 0.1)]}
  assert 'log' not in report_charts.line_chart('x', narrow, may_be_log=True)
  zero = {'a': [(1, 3.0), (2, 0.0)]}
  assert 'log' not in report_charts.line_chart('x', zero, may_be_log=True)


def test_heat_maps_show_sign_and_size():
  text = report_charts.heat_map('bias', [[-2.0, 0.5]], ['<-1', '0'])
  root = ElementTree.fromstring(text)
  first, second = root.findall('.//rect')
  assert first.get('fill') != second.get('fill')
  opacities = first.get('fill-opacity'), second.get('fill-opacity')
  assert opacities == ('1.00', '0.25')
  assert first.findtext('title') == '0, <-1: -2'
  assert 'nan' not in report_charts.heat_map('x', [[0.0, float('nan')]], 'ab')


def test_long_lines_are_thinned():
  points = [(i, i % 10) for i in range(100_000)]
  text = report_charts.line_chart('x', {'a': points})
  assert len(re.findall(r'\d+\.\d,', text)) <= 600


@pytest.mark.parametrize(
  ('low', 'high', 'wanted'),
  [
    (0, 10, [0, 2, 4, 6, 8, 10]),
    (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (995, 1004, [996, 998, 1000, 1002, 1004]),
  ],
)
def test_ticks_are_round(low, high, wanted):
  assert report_charts.ticks(low, high) == pytest.approx(wanted)


def test_numbers_are_short():
  shown = [report_charts.number(x) for x in (0, 0.25, 12345.6, 3e-5, 2.5e9)]
  assert shown == ['0', '0.25', '12,346', '3e-05', '2.5e+09']
