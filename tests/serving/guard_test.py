"""What stands before the application, around one that only echoes."""

import asyncio

import fastapi
import httpx
import pytest
from starlette.exceptions import HTTPException

from t5x_lite.errors import UsageError
from t5x_lite.serving.guard import Guard, Limits, Metrics, explain
from t5x_lite.serving.worker import QueueFullError, StoppedError


class IdleWorker:
  num_waiting = num_running = 0


def call(path, *, token='', headers=None, content=b'', **limits):
  app = fastapi.FastAPI()

  @app.post('/echo')
  async def echo(request: fastapi.Request):
    return {'size': len(await request.body())}

  metrics = Metrics(IdleWorker())
  guarded = Guard(app, limits=Limits(**limits), token=token, metrics=metrics)

  async def run():
    transport = httpx.ASGITransport(app=guarded)
    async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
      return await client.post(path, headers=headers, content=content)

  return asyncio.run(run())


async def slowly():
  yield b'a'
  await asyncio.sleep(5)
  yield b'b'


@pytest.mark.parametrize('size, status', [(0, 200), (10, 200), (11, 413)])
def test_a_body_has_a_largest_size(size, status):
  answer = call('/echo', content=b'x' * size, max_body_bytes=10)
  assert answer.status_code == status
  if status == 200:
    assert answer.json() == {'size': size}


def test_a_body_has_to_come_in_time():
  answer = call('/echo', content=slowly(), body_seconds=0.05)
  assert answer.status_code == 408
  assert answer.json()['error']['type'] == 'invalid_request_error'


def test_who_leaves_is_no_error_of_ours():
  async def leave():
    return {'type': 'http.disconnect'}

  metrics = Metrics(IdleWorker())
  guarded = Guard(None, limits=Limits(), token='', metrics=metrics)
  asyncio.run(guarded({'type': 'http', 'path': '/echo', 'headers': []}, leave, None))
  labels = {'path': 'other', 'status': '499'}
  assert metrics.registry.get_sample_value('t5x_lite_requests_total', labels) == 1


@pytest.mark.parametrize(
  'given, status', [('Bearer right', 200), ('Bearer wrong', 401), ('right', 401), ('', 401)]
)
def test_the_token_is_asked_for(given, status):
  headers = {'Authorization': given} if given else {}
  assert call('/echo', token='right', headers=headers).status_code == status


@pytest.mark.parametrize(
  'error, status',
  [
    (HTTPException(418, 'no'), 418),
    (UsageError('no'), 400),
    (QueueFullError('no'), 429),
    (StoppedError('no'), 503),
    (TimeoutError(), 504),
    (ZeroDivisionError('secret'), 500),
  ],
)
def test_every_error_has_its_status_and_tells_no_secrets(error, status):
  found, message = explain(error)
  assert found == status and message and 'secret' not in message
