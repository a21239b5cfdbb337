import html.parser

import numpy as np
import pytest

from t5x_lite import main
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.programs import preview
from t5x_lite.programs.preview import pieces_of

SMALL = dict(inputs_length=32, targets_length=24, examples=1, sample=20)


def test_sentinels_and_their_spans_have_one_colour():
  config = VocabularyConfig()
  sentinel = 32_100 - 1
  example = {
    'inputs': np.array([8774, sentinel, 55, sentinel - 1, 1]),
    'targets': np.array([sentinel, 296, 297, sentinel - 1, 55, 1]),
  }
  found = pieces_of(example, config)
  assert [color for _, color in found['inputs']] == [None, 0, None, 1, None]
  assert [color for _, color in found['targets']] == [0, 0, 0, 1, 1, None]
  assert found['targets'][0][0] == '<extra_id_0>' and found['inputs'][0][0] == '▁Hello'
  found = pieces_of({'inputs': np.array([b'one', b'two'])}, config)
  assert found['inputs'] == [('one (and 1 more)', None)]


def test_every_step_is_shown(capsys):
  text = preview.preview(task='pronounce', vocabulary='byte', **SMALL)
  assert capsys.readouterr().out == text + '\n'
  order = ['0. source', 'first_reference', 'prefix_inputs', 'tokenize_rows', 'Lengths', 'Packed']
  places = [text.index(word) for word in order]
  assert places == sorted(places)
  assert 'pronounce: ' in text and '\x1b' not in text
  [row] = [
    line.split() for line in text.splitlines() if line.startswith('  pronounce_byte  inputs')
  ]
  assert row[2] == '20' and row[5] == '32'
  assert '█' in row[-1] and len(row[-1]) <= 17  # how many are how long
  # Rows of letters: an example each, in order, then padding.
  rows = [line.strip() for line in text.partition('Packed inputs')[2].splitlines()[1:9]]
  assert all(row.strip('.') == ''.join(sorted(row.strip('.'))) for row in rows)
  assert rows[0].startswith('a') and 'b' in rows[0]


class _Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.open, self.colors, self.rows = [], set(), 0
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    given = dict(attrs)
    assert 'src' not in given and 'href' not in given
    if tag not in ('meta', 'line', 'polyline', 'circle', 'rect', 'path'):
      self.open.append(tag)
    if tag == 'span' and 'background' in given.get('style', ''):
      self.colors.add(given['style'])
    self.rows += given.get('class') == 'row'

  def handle_endtag(self, tag):
    if tag not in ('meta', 'line', 'polyline', 'circle', 'rect', 'path'):
      assert self.open.pop() == tag


def test_a_mixture_is_one_page_of_its_own(tmp_path):
  path = tmp_path / 'page.html'
  preview.preview(task='translate', split='validation', output=str(path), **SMALL)
  text = path.read_text()
  assert not _Page(text).open
  assert 'share of examples' in text and '50.' in text
  for name in ('translate_en_de_t5', 'translate_en_fr_t5'):
    assert f'{name}, 0. source' in text


def test_denoising_is_coloured_on_the_page(tmp_path):
  path = tmp_path / 'page.html'
  preview.preview(task='shakespeare_span_corruption', output=str(path), **SMALL)
  page = _Page(path.read_text())
  assert len(page.colors) >= 2 and page.rows == 16
  assert '&lt;extra_id_0&gt;' in path.read_text()


def test_lengths_are_drawn_from_0_to_the_longest():
  assert preview._histogram([0, 1, 1, 9], 5) == [(0, 3), (2, 0), (4, 0), (6, 0), (8, 1)]
  assert preview._histogram([64] * 3, 16)[-1] == (60, 3)
  assert len(preview._histogram(range(1000), 16)) <= 16


def test_mistakes_are_told(tmp_path, capsys):
  with pytest.raises(UsageError, match='did you mean'):
    preview.preview(task='pronouns')
  with pytest.raises(UsageError, match="no split 'dev'"):
    preview.preview(task='pronounce', split='dev')
  with pytest.raises(UsageError, match=r'named \.html'):
    preview.preview(task='pronounce', output=str(tmp_path / 'page.txt'))
  assert main.main(['preview', 'pronounce', '--examples', '0']) == 2
  assert 'preview.examples is 0' in capsys.readouterr().err
