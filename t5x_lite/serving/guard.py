"""What stands before the application: limits, the token, the numbers at /metrics, errors.

Every error is {"error": {"message", "type", "param", "code"}} with the right status: 400 what is
asked makes no sense or is too long, 401 no or a wrong token, 408 the body did not come, 413 it is
too large, 429 the queue is full, 503 the server stops, 504 it took too long.
"""

import asyncio
import dataclasses
import hmac
import time
from collections.abc import Sequence
from typing import Any

from fastapi import responses
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from t5x_lite.errors import UsageError
from t5x_lite.serving.worker import QueueFullError, StoppedError, Worker

# What is shown without the token: pages without secrets, which have a field for it.
DOCS = '/docs'
OPEN = ('/', DOCS, '/openapi.json', '/healthz', '/readyz')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a client may ask for: tokens with EOS, and the rest as `programs.serve.serve` says."""

  max_input_tokens: int = 1024
  max_new_tokens: int = 256
  max_inputs: int = 64
  max_body_bytes: int = 2**20
  body_seconds: float = 10.0
  request_seconds: float = 120.0


# Of errors that clients are told of in their own words; those of a TimeoutError are ours.
STATUS = {UsageError: 400, QueueFullError: 429, StoppedError: 503, TimeoutError: 504}


def error_body(status: int, message: str) -> dict[str, Any]:
  """Returns what an error looks like to OpenAI's clients."""
  kind = 'server_error' if status >= 500 else 'invalid_request_error'
  return {'error': {'message': message, 'type': kind, 'param': None, 'code': status}}


def error_response(status: int, message: str) -> responses.JSONResponse:
  """Returns the same as an answer."""
  headers = {'Retry-After': '1'} if status in (429, 503) else None
  return responses.JSONResponse(error_body(status, message), status, headers)


class Metrics:
  """What /metrics shows, in a registry of its own."""

  def __init__(self, worker: Worker):
    self.registry = CollectorRegistry()

    def make(kind: Any, name: str, text: str, labels: Sequence[str] = ()) -> Any:
      return kind(f't5x_lite_{name}', text, labels, registry=self.registry)

    self.requests = make(Counter, 'requests', 'Answered requests.', ['path', 'status'])
    self.tokens = make(Counter, 'tokens', 'Tokens.', ['kind'])
    self.seconds = make(Histogram, 'request_seconds', 'From request to its last byte.', ['path'])
    self.first = make(Histogram, 'first_token_seconds', 'From request to its first tokens.')
    make(Gauge, 'waiting', 'Requests without a slot.').set_function(lambda: worker.num_waiting)
    make(Gauge, 'running', 'Requests being decoded.').set_function(lambda: worker.num_running)


class Guard:
  """Outermost layer: token, size and time of the body, time of the answer, counting.

  A body is read before anything else happens: a slow client holds nothing but a connection.
  """

  def __init__(self, app: Any, *, limits: Limits, token: str, metrics: Metrics):
    self._app, self._limits, self._token, self._metrics = app, limits, token, metrics

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Answers one request; ASGI's own interface."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    began, status = time.monotonic(), 500

    async def counted(message: Any) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      body = await self._body(Request(scope, receive))
      read = [{'type': 'http.request', 'body': body, 'more_body': False}]

      async def replay() -> Any:
        return read.pop() if read else await receive()

      await self._app(scope, replay, counted)
    except ClientDisconnect:
      status = 499  # nginx's: not our error
    except HTTPException as error:
      await error_response(*explain(error))(scope, receive, counted)
    finally:
      path = getattr(scope.get('route'), 'path', 'other')
      self._metrics.requests.labels(path, status).inc()
      self._metrics.seconds.labels(path).observe(time.monotonic() - began)

  async def _body(self, request: Request) -> bytes:
    """Returns the whole body of a request that may be answered."""
    path = request.scope['path']
    if self._token and path not in OPEN and not path.startswith(f'{DOCS}-files/'):
      given = dict(request.scope['headers']).get(b'authorization', b'')
      if not hmac.compare_digest(given, f'Bearer {self._token}'.encode()):
        raise HTTPException(401, 'no token, or a wrong one: Authorization: Bearer TOKEN')
    most, seconds = self._limits.max_body_bytes, self._limits.body_seconds
    body = bytearray()
    try:
      async with asyncio.timeout(seconds):
        async for part in request.stream():
          body += part
          if len(body) > most:
            raise HTTPException(413, f'the body is larger than {most} bytes')
    except TimeoutError:
      raise HTTPException(408, f'the body did not come within {seconds:g} s') from None
    return bytes(body)


def explain(error: Exception) -> tuple[int, str]:
  """Returns the status and one line."""
  if isinstance(error, HTTPException):
    return error.status_code, str(error.detail)
  if isinstance(error, RequestValidationError):
    first = error.errors()[0]
    where = '.'.join(str(part) for part in first['loc'] if part != 'body')
    return 400, f'{where or "body"}: {first["msg"]}'
  for kind, status in STATUS.items():
    if isinstance(error, kind):
      return status, 'it took too long' if kind is TimeoutError else str(error)
  return 500, f'{type(error).__name__}: the server failed; its log says more'
