"""Text as it is streamed; the endpoints are met over HTTP in tests/programs/serve_test.py."""

import pytest

from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary
from t5x_lite.decoding.continuous import Output
from t5x_lite.serving.app import _Text


def stream(vocabulary, text, stop=(), step=1):
  tokens = vocabulary.encode(text)
  growing, parts = _Text(vocabulary, stop), []
  for end in [*range(step, len(tokens), step), len(tokens)]:
    ended = growing.add(Output(tokens[:end], [], 'eos' if end == len(tokens) else ''))
    parts.append(growing.new(ended))
    if ended:
      return parts, ended
  raise AssertionError


@pytest.mark.parametrize('kind', ['byte', 'sentencepiece'])
@pytest.mark.parametrize('step', [1, 3])
@pytest.mark.parametrize('text', ['Das Café öffnet um 8 Uhr.', 'a', '🙂🙂 ok 日本語'])
def test_parts_add_up_and_hold_no_half_character(kind, step, text):
  vocabulary = make_vocabulary(VocabularyConfig(kind=kind))
  whole = vocabulary.decode(vocabulary.encode(text))
  parts, ended = stream(vocabulary, text, step=step)
  assert (''.join(parts), ended) == (whole, 'stop')
  if kind == 'byte':
    assert '\ufffd' not in ''.join(parts)


@pytest.mark.parametrize('stop', [['STOP'], ['xyz', 'ST'], ['\n', 'STOP', '']])
def test_nothing_of_a_stop_string_is_ever_sent(stop):
  vocabulary = make_vocabulary(VocabularyConfig(kind='byte'))
  parts, ended = stream(vocabulary, 'one two STOP three', stop)
  assert (''.join(parts), ended) == ('one two ', 'stop')
