"""The server as a process of its own, met by real clients over loopback."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
import uvicorn

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.programs import serve as serve_lib
from t5x_lite.programs.serve import serve
from tests import xla_flags
from tests.serving import headless_chromium

TOKEN = 'a long secret'
WORDS = ((0, 2), (2, 6), (6, 8), (8, 9))  # the tokens of each of 'ab cde f' and its end
TEXTS = ['That is good.', 'x', 'Das Fenster ist offen. ' * 4]


@pytest.fixture(scope='session')
def model_dir(tmp_path_factory):
  config = t5x_lite.named_config(
    't5_1_1_small',
    vocab_size=384,
    emb_dim=32,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
  )
  model = t5x_lite.new(config, t5x_lite.VocabularyConfig(kind='byte'), seed=3)
  directory = tmp_path_factory.mktemp('serve') / 'tiny'
  model.save(str(directory))
  return str(directory)


class Server:
  def __init__(self, model_dir, *flags, token=TOKEN):
    self.process = subprocess.Popen(
      [sys.executable, '-m', 't5x_lite.main', 'serve', model_dir, '--port=0', *flags],
      env={**os.environ, 'T5X_LITE_TOKEN': token, 'XLA_FLAGS': xla_flags.QUICK},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    line = self.process.stdout.readline()
    found = re.search(r'http://([\d.]+):(\d+)', line)
    assert found, line + self.process.stderr.read()
    self.url, self.port = found[0], int(found[2])
    self.client = httpx.Client(
      base_url=self.url, headers={'Authorization': f'Bearer {token}'} if token else {}, timeout=120
    )

  def post(self, path, body):
    # Not httpx's own JSON, which cannot send what is no Unicode.
    headers = {'Content-Type': 'application/json'}
    return self.client.post(path, content=json.dumps(body), headers=headers)

  def stop(self):
    self.client.close()
    self.process.send_signal(signal.SIGTERM)
    code = self.process.wait(timeout=120)
    return code, self.process.stderr.read()


@pytest.fixture(scope='module')
def server(model_dir):
  server = Server(
    model_dir,
    '--max_new_tokens=64',
    '--max_queue=4',
    '--max_input_tokens=128',
    '--num_slots=4',
    '--max_body_bytes=20000',
    '--body_seconds=2',
  )
  yield server
  if server.process.poll() is None:  # its last test stops it
    code, _ = server.stop()
    assert code == 0


@pytest.fixture(scope='module')
def model(model_dir):
  # In bfloat16, and with layers one by one, as the server has them on a CPU.
  return t5x_lite.load(model_dir, scan_layers=False)


def test_generate_writes_what_the_python_interface_writes(server, model):
  answer = server.post('/generate', {'inputs': TEXTS, 'max_new_tokens': 12})
  outputs = answer.json()['outputs']
  texts, scores = model.generate(TEXTS, max_new_tokens=12, return_scores=True)
  assert [one['text'] for one in outputs] == texts
  np.testing.assert_allclose([one['score'] for one in outputs], scores, rtol=1e-3)
  assert {one['finish_reason'] for one in outputs} <= {'stop', 'length'}


@pytest.mark.skipif(not headless_chromium.EXECUTABLE, reason='needs a Chromium')
def test_the_page_by_keyboard_in_a_browser(server, model, tmp_path):
  page = headless_chromium.Page(server.url, tmp_path)
  try:
    # Without the token nothing is answered; the input has the focus.
    page.wait_for("document.activeElement && document.activeElement.id == 'inputs'")
    page.type('ab cde f')
    page.press('Enter', 13, modifiers=2)
    assert 'token' in page.wait_for("at('outputs').innerText")
    # By Tab alone to the new tokens, and past the other numbers to the token.
    page.press('Tab', 9)
    assert page.value('document.activeElement.id') == 'max_new_tokens'
    page.value('document.activeElement.select()')
    page.type('12')
    for _ in range(7):
      page.press('Tab', 9)
    assert page.value('document.activeElement.id') == 'token'
    page.type(TOKEN)
    page.press('Tab', 9)
    page.press('Enter', 13, text='\r')
    ended = page.wait_for("at('outputs').rows[0]?.cells[2].textContent")
    [text], [score] = model.generate(['ab cde f'], max_new_tokens=12, return_scores=True)
    shown = page.value("[...at('outputs').rows[0].cells].map(c => c.textContent)")
    assert shown[0] == text and ended in ('length', 'stop')
    assert float(shown[1]) == pytest.approx(score, abs=2e-3)
    # On to the button of the picture: inputs above, outputs beside, each line adds up.
    page.wait_for("!!at('outputs').querySelector('button')")
    page.press('Tab', 9)
    assert page.value('document.activeElement.textContent') == 'attention'
    page.press('Enter', 13, text='\r')
    page.wait_for("at('attention').rows.length > 1")
    head = page.value("[...at('attention').rows[0].cells].map(c => c.textContent)")
    assert head[1:] == ['ab', 'cde', 'f', '(end)']
    line = page.value("[...at('attention').rows[1].cells].slice(1).map(c => parseFloat(c.title))")
    assert sum(line) == pytest.approx(100, abs=0.5)
  finally:
    page.close()


def test_samples_are_repeatable_and_differ_by_seed(server):
  body = {'inputs': 'abc', 'temperature': 2.0, 'num_outputs': 3, 'seed': 5, 'max_new_tokens': 24}
  first, again = [server.post('/generate', body).json()['outputs'] for _ in range(2)]
  assert first == again
  assert len({one['text'] for one in first}) > 1


def test_a_stream_adds_up_to_the_whole(server):
  body = {'inputs': TEXTS[0], 'temperature': 1.0, 'max_new_tokens': 20}
  whole = server.post('/generate', body).json()['outputs'][0]
  events = []
  with server.client.stream('POST', '/generate', json={**body, 'stream': True}) as answer:
    assert answer.headers['content-type'].startswith('text/event-stream')
    events = [line.removeprefix('data: ') for line in answer.iter_lines() if line]
  assert events.pop() == '[DONE]'
  parts = [json.loads(event) for event in events]
  assert ''.join(part['text'] for part in parts) == whole['text']
  assert parts[-1]['finish_reason'] == whole['finish_reason']


def test_a_stop_string_ends_the_text_before_it(server):
  body = {'inputs': 'abc', 'temperature': 3.0, 'seed': 1, 'max_new_tokens': 24}
  text = server.post('/generate', body).json()['outputs'][0]['text']
  stop = text[len(text) // 2]
  found = server.post('/generate', {**body, 'stop': [stop]}).json()['outputs'][0]
  assert found['text'] == text[: text.index(stop)]
  assert found['finish_reason'] == 'stop'


def test_settings_of_decoding_go_through(server, model):
  body = {'inputs': TEXTS, 'max_new_tokens': 8, 'decoding': {'temperature': 0.5, 'top_k': 1}}
  outputs = server.post('/generate', body).json()['outputs']
  assert [one['text'] for one in outputs] == model.generate(TEXTS, max_new_tokens=8)
  beams = {'num_beams': 2, 'num_return_sequences': 2}  # as the page asks for several
  asked = {**body, 'inputs': TEXTS[:2], 'decoding': beams}
  outputs = server.post('/generate', asked).json()['outputs']
  expected = model.generate(TEXTS[:2], max_new_tokens=8, **beams)
  assert [(x['index'], x['text']) for x in outputs] == [
    (i, text) for i, texts in enumerate(expected) for text in texts
  ]
  for settings, word in (({'beems': 3}, 'beems'), ({'regex': 'a'}, 'takes no stop_strings, regex')):
    refused = server.post('/generate', {**body, 'decoding': settings})
    assert refused.status_code == 400 and word in refused.json()['error']['message']


def test_scores_and_embeddings(server, model):
  body = {'inputs': TEXTS, 'targets': ['a', 'bc', 'def']}
  scores = [one['log_prob'] for one in server.post('/score', body).json()['scores']]
  np.testing.assert_allclose(scores, model.score(TEXTS, body['targets']), rtol=1e-4)
  answer = server.post('/v1/embeddings', {'input': TEXTS}).json()
  found = [one['embedding'] for one in answer['data']]
  np.testing.assert_allclose(found, model.encode(TEXTS, pooling='mean'), rtol=1e-3, atol=1e-4)


def test_words_and_where_the_model_looks_for_them(server, model):
  body = {'inputs': 'ab cde f', 'outputs': 'xy z'}  # bytes: a token each
  answer = server.post('/attention', body).json()
  assert answer['inputs'] == ['ab', 'cde', 'f', ''] and answer['outputs'] == [
    'x',
    'y',
    '␣',
    'z',
    '',
  ]
  table = np.array(answer['weights'])
  np.testing.assert_allclose(table.sum(axis=1), 1.0, atol=1e-3)
  [weights] = model.cross_attention([body['inputs']], [body['outputs']], mean=True)
  assert weights.shape == (5, 9)
  [each] = model.cross_attention([body['inputs']], [body['outputs']])
  np.testing.assert_allclose(weights, each.mean(axis=(0, 1)), rtol=1e-5)
  np.testing.assert_allclose(table[0], [weights[0, a:b].sum() for a, b in WORDS], atol=1e-3)
  refused = server.post('/attention', {**body, 'outputs': 'x' * 5000})
  assert refused.status_code == 400


def test_openai_clients_work_unmodified(server, model):
  client = openai.OpenAI(base_url=f'{server.url}/v1', api_key=TOKEN)
  [entry] = client.models.list().data
  done = client.completions.create(model=entry.id, prompt=TEXTS, max_tokens=9, temperature=0)
  assert [choice.text for choice in done.choices] == model.generate(TEXTS, max_new_tokens=9)
  assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
  parts = client.completions.create(
    model=entry.id, prompt=TEXTS[0], max_tokens=9, temperature=0, stream=True
  )
  assert ''.join(part.choices[0].text for part in parts) == done.choices[0].text
  *parts, last = client.completions.create(
    model=entry.id,
    prompt=TEXTS[0],
    max_tokens=9,
    temperature=0,
    stream=True,
    stream_options={'include_usage': True},
  )
  assert ''.join(part.choices[0].text for part in parts) == done.choices[0].text
  alone = client.completions.create(model=entry.id, prompt=TEXTS[0], max_tokens=9, temperature=0)
  assert not last.choices and last.usage == alone.usage
  vectors = client.embeddings.create(model=entry.id, input=TEXTS)  # asks for base64
  np.testing.assert_allclose(
    vectors.data[1].embedding, model.encode(TEXTS[1], pooling='mean')[0], rtol=1e-3, atol=1e-4
  )
  with pytest.raises(openai.BadRequestError, match='logprobs'):
    client.completions.create(model=entry.id, prompt='a', logprobs=3)
  stranger = openai.OpenAI(base_url=f'{server.url}/v1', api_key='wrong')
  with pytest.raises(openai.AuthenticationError):
    stranger.models.list()


@pytest.mark.parametrize(
  'body, message',
  [
    ({'inputs': 'a' * 500}, 'input 0 has 501 tokens; 128'),
    ({'inputs': []}, '0 inputs'),
    ({'inputs': ['a'] * 65}, '65 inputs'),
    ({'inputs': 'a', 'max_new_tokens': 65}, '65 new tokens; 64'),
    ({'inputs': 'a', 'max_new_tokens': 0}, 'max_new_tokens'),
    ({'inputs': 'a', 'temprature': 1}, 'temprature'),
    ({'inputs': 7}, 'inputs'),
    ({'inputs': 'a', 'top_p': 0}, 'top_p'),
    ({'inputs': ['a', 'b'], 'stream': True}, 'stream'),
    ({'inputs': 'a', 'num_outputs': 10**9}, '1000000000 outputs; at most'),
    ({'inputs': 'a', 'decoding': {'num_beams': 300}}, '300 outputs'),
    ({'inputs': 'a', 'top_k': 3, 'decoding': {'num_beams': 2}}, 'replaces the other settings'),
    ({'inputs': 'a', 'decoding': {'num_beams': '4'}}, 'whole number'),
    ({'inputs': 'a', 'decoding': {'max_new_tokens': 5}}, 'no setting of decoding'),
    ({'inputs': 'a\ud800'}, 'no Unicode'),
    ({}, 'inputs'),
  ],
)
def test_what_makes_no_sense_is_refused_in_one_line(server, body, message):
  answer = server.post('/generate', body)
  assert answer.status_code == 400
  assert message in answer.json()['error']['message']


def test_what_is_not_there_is_an_error_of_the_same_form(server):
  answer = server.post('/nowhere', {})
  assert (answer.status_code, answer.json()['error']['message']) == (404, 'Not Found')
  body = {'model': 'x', 'prompt': 'a', 'logit_bias': {'5': 1.0}}
  answer = server.post('/v1/completions', body)
  assert answer.status_code == 400 and 'logit_bias' in answer.json()['error']['message']


def test_long_inputs_are_cut_if_asked(server, model):
  body = {'inputs': 'a' * 500, 'truncate': True, 'max_new_tokens': 6}
  [found] = server.post('/generate', body).json()['outputs']
  assert found['text'] == model.generate('a' * 500, max_new_tokens=6, max_input_tokens=128)


def test_broken_oversized_and_slow_bodies_hold_up_nobody(server):
  headers = {'content-type': 'application/json'}
  broken = server.client.post('/generate', content=b'{"inputs": ', headers=headers)
  assert broken.status_code == 400
  big = server.client.post('/generate', content=b'x' * 30000, headers=headers)
  assert big.status_code == 413
  assert server.client.get('/no_such_page').status_code == 404
  head = f'POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n'
  with socket.create_connection(('127.0.0.1', server.port), timeout=30) as slow:
    slow.sendall((head + 'Content-Length: 100\r\n\r\n{"inp').encode())
    answer = server.post('/generate', {'inputs': 'quick', 'max_new_tokens': 2})
    assert answer.status_code == 200  # meanwhile
    assert b'408' in slow.recv(4096)


def test_health_metrics_page_and_schema(server):
  assert httpx.get(f'{server.url}/healthz').json() == {'status': 'ok'}
  assert httpx.get(f'{server.url}/readyz').json() == {'status': 'ready'}
  assert httpx.get(f'{server.url}/metrics').status_code == 401
  text = server.client.get('/metrics').text
  assert re.search(r't5x_lite_requests_total\{path="/generate",status="200"\} [1-9]', text)
  assert 't5x_lite_request_seconds_bucket' in text
  paths = server.client.get('/openapi.json').json()['paths']
  assert {'/generate', '/score', '/v1/completions', '/v1/embeddings'} <= set(paths)
  page = httpx.get(f'{server.url}/').text  # asks for the token itself
  assert '<form' in page and 'src="http' not in page


def test_answers_are_as_the_schema_says(server):
  one = {'inputs': ['a'], 'max_new_tokens': 3}
  sent = {
    '/generate': [one, {**one, 'decoding': {'num_beams': 2, 'num_return_sequences': 2}}],
    '/score': [{'inputs': ['a'], 'targets': ['b']}],
    '/attention': [{'inputs': 'a', 'outputs': 'b'}],
    '/v1/completions': [{'prompt': 'a', 'max_tokens': 3}],
    '/v1/embeddings': [{'input': 'a'}],
  }
  schema = httpx.get(f'{server.url}/openapi.json').json()
  assert schema['components']['securitySchemes']['HTTPBearer']['scheme'] == 'bearer'
  posts = {path for path, one in schema['paths'].items() if 'post' in one}
  assert posts == set(sent)
  for path, bodies in sent.items():
    answers = schema['paths'][path]['post']['responses']
    assert set(answers) == {'200', '400', '401', '408', '413', '429', '500', '503', '504'}
    for body, status in [*((body, '200') for body in bodies), ({}, '400')]:
      answer = server.post(path, body)
      assert str(answer.status_code) == status
      name = answers[status]['content']['application/json']['schema']['$ref'].split('/')[-1]
      check_schema(answer.json(), {'$ref': f'/{name}'}, schema['components']['schemas'])


def check_schema(value, schema, named):
  """The part of JSON Schema that there is: objects with all fields, lists, either, plain types."""
  if '$ref' in schema:
    schema = named[schema['$ref'].split('/')[-1]]
  if 'anyOf' in schema:
    kinds = {one['type'] for one in schema['anyOf']}
    assert {str: 'string', list: 'array', type(None): 'null'}[type(value)] in kinds
  elif schema['type'] == 'object':
    assert set(value) == set(schema['properties']) == set(schema['required'])
    for key, field in schema['properties'].items():
      check_schema(value[key], field, named)
  elif schema['type'] == 'array':
    assert value
    for item in value:
      check_schema(item, schema['items'], named)
  else:
    kinds = {'string': str, 'number': float, 'integer': int, 'null': type(None)}
    assert type(value) is kinds[schema['type']]


@pytest.mark.skipif(not headless_chromium.EXECUTABLE, reason='needs a Chromium')
def test_the_page_of_endpoints_needs_no_other_server(server, tmp_path):
  text = httpx.get(f'{server.url}/docs').text
  assert 'swagger-ui-bundle.js' in text
  assert not [u for u in re.findall(r'(?:src|href)="(.*?)"', text) if not u.startswith('/docs-')]
  page = headless_chromium.Page(f'{server.url}/docs', tmp_path)
  try:
    page.wait_for("document.body && document.body.innerText.includes('/v1/completions')")
    page.wait_for("document.querySelectorAll('.opblock-post').length == 5")
    page.wait_for("!!document.querySelector('.authorize')")
  finally:
    page.close()


def test_what_cannot_start_says_so_at_once(model_dir, tmp_path):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    with pytest.raises(UsageError, match='cannot listen'):
      serve(model=model_dir, port=taken.getsockname()[1])
  with pytest.raises(UsageError, match='num_slots is 0'):
    serve(model=model_dir, num_slots=0)
  with pytest.raises(UsageError, match='token_file'):
    serve(model=model_dir, token_file=str(tmp_path / 'none'))
  (tmp_path / 'empty').touch()
  with pytest.raises(UsageError, match='is empty'):
    serve(model=model_dir, token_file=str(tmp_path / 'empty'))


def test_a_signal_before_it_listens_is_not_lost(model_dir, monkeypatch, capsys):
  stopped = []

  def run(server, sockets):
    signal.raise_signal(signal.SIGTERM)
    stopped.append(server.should_exit)

  monkeypatch.setattr(uvicorn.Server, 'run', run)
  # It would close pytest's handlers.
  monkeypatch.setattr(uvicorn.Config, 'configure_logging', lambda _: None)
  monkeypatch.setattr(serve_lib, '_warm_up', lambda *_: None)
  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    with socket.socket(socket.AF_INET6) as probe:
      probe.bind(('::1', 0))
    host, shown = '::1', r'http://\[::1\]:\d+ '
  except OSError:  # a machine without IPv6
    host, shown = '127.0.0.1', r'http://127.0.0.1:\d+ '
  try:
    serve(model=model_dir, host=host, port=0)
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
  assert stopped == [True]
  assert re.search(shown, capsys.readouterr().out)


# The last one: it stops the server.
def test_under_load_a_full_queue_says_429_and_a_sigterm_loses_nothing(server):
  body = {'inputs': 'abc', 'temperature': 1.0, 'max_new_tokens': 64}
  with concurrent.futures.ThreadPoolExecutor(24) as pool:
    answers = list(pool.map(lambda i: server.post('/generate', body), range(24)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert {a.headers['retry-after'] for a in answers if a.status_code == 429} == {'1'}
    headers = server.client.headers
    waiting = []
    for how_many, places in ((4, 'running'), (2, 'waiting|running')):  # the queue holds 4 at a time
      waiting += [
        pool.submit(httpx.post, f'{server.url}/generate', json=body, headers=headers, timeout=120)
        for _ in range(how_many)
      ]
      while not all(one.done() for one in waiting):  # until all are in
        text = server.client.get('/metrics').text
        counts = re.findall(rf't5x_lite_(?:{places}) ([\d.]+)', text)
        if sum(map(float, counts)) == len(waiting):
          break
        time.sleep(0.01)
    code, errors = server.stop()
    assert code == 0, errors
    assert [one.result().status_code for one in waiting] == [200] * 6
  with pytest.raises(httpx.ConnectError):
    httpx.get(f'{server.url}/healthz')
