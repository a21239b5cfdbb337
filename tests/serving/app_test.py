"""Text as it is streamed; the endpoints are met over HTTP in tests/programs/serve_test.py."""

import types
from typing import Any

import pytest

from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary
from t5x_lite.decoding.prediction import Output
from t5x_lite.serving.app import _Text, make_app
from t5x_lite.serving.guard import Limits


def stream(vocabulary, text, stop=(), step=1):
  tokens = vocabulary.encode(text)
  growing, parts = _Text(vocabulary, stop), []
  for end in [*range(step, len(tokens), step), len(tokens)]:
    ended = growing.add(Output(tokens[:end], 0.0, [], 'eos' if end == len(tokens) else ''))
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


def test_a_call_for_more_than_may_ever_wait_is_told_so():
  """It would get 429 however often it came again."""
  testclient = pytest.importorskip('starlette.testclient')
  vocabulary = make_vocabulary(VocabularyConfig(kind='byte'))
  worker: Any = types.SimpleNamespace(max_queue=3, num_waiting=0, num_running=0, stop=lambda: None)
  model = types.SimpleNamespace(vocabulary=vocabulary)
  client = testclient.TestClient(make_app('name', model, worker, Limits(max_inputs=8)))
  for body in ({'inputs': ['a'] * 4}, {'inputs': ['a', 'b'], 'num_outputs': 2}):
    answer = client.post('/generate', json=body)
    assert answer.status_code == 400
    assert '4 outputs; at most 3 are allowed' in answer.json()['error']['message']
