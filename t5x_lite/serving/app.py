"""The ASGI application: JSON endpoints, a part of OpenAI's API, metrics, a page to try the model.

`guard.py` stands before it and says what every error looks like.
"""

import asyncio
import base64
import contextlib
import functools
import importlib.resources
import itertools
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import fastapi
import fastapi_offline
import numpy as np
import prometheus_client
from fastapi import responses
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from t5x_lite.data.model_inputs import is_unicode
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decoding.continuous import Request
from t5x_lite.decoding.prediction import Output
from t5x_lite.models import model_sharding
from t5x_lite.serving import bodies, guard
from t5x_lite.serving.guard import Guard, Limits, Metrics
from t5x_lite.serving.worker import Worker


class _Text:
  """Text of a growing output: what is new of it, and whether a stop string has come."""

  def __init__(self, vocabulary: Vocabulary, stop: Sequence[str]):
    self._vocabulary, self._stop = vocabulary, [s for s in stop if s]
    self._held = max([len(s) for s in self._stop], default=1) - 1
    self.text, self._sent = '', 0

  def add(self, output: Output) -> str:
    """Takes everything decoded so far; returns why it ends, or ''."""
    self.text = self._vocabulary.decode(output.tokens)
    found = [at for s in self._stop if (at := self.text.find(s)) >= 0]
    if found:
      self.text = self.text[: min(found)]
      return 'stop'
    return {'eos': 'stop'}.get(output.ended, output.ended)

  def new(self, ended: str) -> str:
    """Returns what can be sent: never half a character or the beginning of a stop string."""
    end = len(self.text)
    if not ended:
      end = max(self._sent, len(self.text.rstrip('\ufffd')) - self._held)
    part, self._sent = self.text[self._sent : end], max(self._sent, end)
    return part


def make_app(name: str, model: Any, worker: Worker, limits: Limits, *, token: str = '') -> Any:
  """Returns the ASGI application; clients must send the token, if it is not empty.

  The model is a `programs.serve.Calls`, whose methods run in the worker, and is called `name`.
  """
  vocabulary: Vocabulary = model.vocabulary
  metrics, longest = Metrics(worker), {'max_input_tokens': limits.max_input_tokens}

  @contextlib.asynccontextmanager
  async def lifespan(_: Any) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(worker.stop)

  app = fastapi_offline.FastAPIOffline(
    title=f't5x_lite: {name}',
    lifespan=lifespan,
    docs_url=guard.DOCS,
    redoc_url=None,
    static_url=f'{guard.DOCS}-files',
    responses=bodies.ERRORS,
    # The guard asks for it; this tells the page of the schema.
    dependencies=[fastapi.Depends(HTTPBearer(auto_error=False))] if token else [],
  )

  def rows_of(inputs: Any, *, truncate: bool = False) -> list[list[int]]:
    """Returns token rows, EOS included, within the limits."""
    if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
      inputs = [inputs]
    if not inputs or len(inputs) > limits.max_inputs:
      raise HTTPException(400, f'{len(inputs)} inputs; 1 to {limits.max_inputs} are allowed')
    most = limits.max_input_tokens
    rows = []
    for i, one in enumerate(inputs):
      if isinstance(one, str) and not is_unicode(one):
        raise HTTPException(400, f'input {i} has half a surrogate pair: it is no Unicode')
      row = vocabulary.encode(one) if isinstance(one, str) else list(one)
      if any(not 0 <= token < vocabulary.vocab_size for token in row):
        raise HTTPException(400, f'input {i} has ids outside 0 to {vocabulary.vocab_size - 1}')
      if not row or row[-1] != vocabulary.eos_id:
        row.append(vocabulary.eos_id)
      if len(row) > most:
        if not truncate:
          raise HTTPException(400, f'input {i} has {len(row)} tokens; {most} are allowed')
        row[most - 1 :] = [vocabulary.eos_id]
      rows.append(row)
    metrics.tokens.labels('input').inc(sum(map(len, rows)))
    return rows

  def check_length(asked: int | None) -> int:
    if asked is not None and asked > limits.max_new_tokens:
      raise HTTPException(400, f'{asked} new tokens; {limits.max_new_tokens} are allowed')
    return asked or limits.max_new_tokens

  def check_count(outputs: int) -> None:
    most = min(limits.max_inputs, worker.max_queue)  # more would never find room to wait
    if outputs > most:
      raise HTTPException(400, f'{outputs} outputs; at most {most} are allowed')

  def requests_of(
    rows: list[list[int]], length: int, seed: int, each: int, **settings: Any
  ) -> list[Request]:
    """Returns `each` requests of every row, of different seeds."""
    check_count(len(rows) * each)
    return [
      Request(tokens=row, max_new_tokens=length, seed=seed + i, **settings)
      for row in rows
      for i in range(each)
    ]

  async def outputs(
    request: Request, stop: Sequence[str]
  ) -> AsyncGenerator[tuple[_Text, Output, str]]:
    """Yields what is decoded, as it grows, and why it ends; leaving early gives the slot back."""
    queue: asyncio.Queue[Output | Exception] = asyncio.Queue()
    put = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, queue.put_nowait)
    text, first, began = _Text(vocabulary, stop), True, time.monotonic()
    ticket = worker.submit(request, put)
    try:
      while True:
        output = await queue.get()
        if isinstance(output, Exception):
          raise output
        if first:
          metrics.first.observe(time.monotonic() - began)
        first = False
        if ended := text.add(output):
          metrics.tokens.labels('output').inc(len(output.tokens))
        yield text, output, ended
        if ended:
          return
    finally:
      worker.cancel(ticket)

  async def finish(request: Request, stop: Sequence[str]) -> tuple[str, Output, str]:
    """Returns text, output and why it ended."""
    async with contextlib.aclosing(outputs(request, stop)) as growing:
      *_, (text, output, ended) = [one async for one in growing]
    return text.text, output, ended

  async def on_device(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    async with asyncio.timeout(limits.request_seconds):
      call = functools.partial(function, *args, **settings)
      return await asyncio.wrap_future(worker.call(call))

  async def stream(
    requests: list[Request],
    stop: Sequence[str],
    wrap: Callable[[str, str | None, Output], Any],
    last: Callable[[Output], Any] | None = None,
  ) -> responses.StreamingResponse:
    """Answers with server-sent events, and the last; what is refused is so before the first."""
    if len(requests) > 1:
      raise HTTPException(400, 'stream takes one input and one output of it: num_outputs or n is 1')
    growing = outputs(requests[0], stop)
    async with asyncio.timeout(limits.request_seconds):
      first = await anext(growing)

    async def events() -> AsyncIterator[str]:
      text, output, ended = first
      try:
        async with asyncio.timeout(limits.request_seconds), contextlib.aclosing(growing):
          while True:
            if (part := text.new(ended)) or ended:
              yield f'data: {json.dumps(wrap(part, ended or None, output))}\n\n'
            if ended:
              break
            text, output, ended = await anext(growing)
        if last is not None:
          yield f'data: {json.dumps(last(output))}\n\n'
      except Exception as error:
        yield f'data: {json.dumps(guard.error_body(*guard.explain(error)))}\n\n'
      yield 'data: [DONE]\n\n'

    headers = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
    return responses.StreamingResponse(events(), media_type='text/event-stream', headers=headers)

  async def all_of(requests: list[Request], stop: Sequence[str]) -> list[tuple[str, Output, str]]:
    tasks: list[asyncio.Task] = []
    try:
      async with asyncio.timeout(limits.request_seconds), asyncio.TaskGroup() as group:
        tasks = [group.create_task(finish(request, stop)) for request in requests]
    except ExceptionGroup as errors:
      raise errors.exceptions[0] from None
    return [task.result() for task in tasks]

  @app.post('/generate', responses=bodies.OUTPUTS)
  async def generate(body: bodies.GenerateBody) -> Any:
    rows = rows_of(body.inputs, truncate=body.truncate)
    length = check_length(body.max_new_tokens)
    if body.decoding:
      replaced = {'stream', 'stop', 'num_outputs', 'temperature', 'top_k', 'top_p'}
      if replaced & body.model_dump(exclude_defaults=True).keys():
        raise HTTPException(400, 'decoding replaces the other settings, and is not streamed')
      names = ('num_beams', 'best_of', 'num_return_sequences')
      numbers = [x for n in names if isinstance(x := body.decoding.get(n), int)]
      check_count(len(rows) * max([1, *numbers]))
      tokens, scores = await on_device(model.decode_rows, rows, length, body.seed, body.decoding)
      metrics.tokens.labels('output').inc(sum(map(len, tokens)))
      each = len(tokens) // len(rows)
      found = [
        {
          'text': vocabulary.decode(row),
          'score': score,
          'finish_reason': 'stop' if len(row) < length else 'length',
          'num_tokens': len(row),
          'index': i // each,
        }
        for i, (row, score) in enumerate(zip(tokens, scores, strict=True))
      ]
      return {'outputs': found}
    settings = {'temperature': body.temperature, 'top_k': body.top_k, 'top_p': body.top_p}
    requests = requests_of(rows, length, body.seed, body.num_outputs, **settings)

    def show(text: str, ended: str | None, output: Output, **more: Any) -> dict[str, Any]:
      return {'text': text, 'score': output.score, 'finish_reason': ended, **more}

    if body.stream:
      return await stream(requests, body.stop, show)
    found = [
      show(text, ended, output, num_tokens=len(output.tokens), index=i // body.num_outputs)
      for i, (text, output, ended) in enumerate(await all_of(requests, body.stop))
    ]
    return {'outputs': found}

  @app.post('/score', responses=bodies.SCORES)
  async def score(body: bodies.ScoreBody) -> Any:
    if len(body.inputs) != len(body.targets):
      raise HTTPException(400, f'{len(body.inputs)} inputs and {len(body.targets)} targets')
    rows, targets = rows_of(body.inputs), rows_of(body.targets)
    # A few at a time: logits of a whole call may take gigabytes.
    scores = await on_device(model.score, rows, targets, batch_size=4, **longest)
    pairs = zip(scores, targets, strict=True)
    return {'scores': [{'log_prob': float(x), 'num_tokens': len(row)} for x, row in pairs]}

  token_texts = functools.cache(vocabulary.token_texts)

  @app.post('/attention', responses=bodies.ATTENTION)
  async def attention(body: bodies.AttentionBody) -> Any:
    [row], [target] = rows_of(body.inputs), rows_of(body.outputs)
    [weights] = await on_device(model.cross_attention, [row], [target], mean=True)
    (read, columns), (written, lines) = (_words(token_texts(), one) for one in (row, target))
    # What is looked at of a word adds up; how its tokens look is their mean.
    table = np.add.reduceat(weights, columns, axis=1)
    table = np.add.reduceat(table, lines, axis=0) / np.diff([*lines, len(target)])[:, None]
    return {'inputs': read, 'outputs': written, 'weights': table.round(4).tolist()}

  @app.post('/v1/completions', responses=bodies.COMPLETION)
  async def completions(body: bodies.CompletionBody) -> Any:
    for field in 'logprobs echo suffix logit_bias presence_penalty frequency_penalty'.split():
      if getattr(body, field, None):
        raise HTTPException(400, f'{field} is not supported')
    if body.best_of not in (None, body.n):
      raise HTTPException(400, 'best_of is not supported: ask for n and choose by score')
    rows = rows_of(body.prompt)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    seed = uuid.uuid4().int % 2**31 if body.seed is None else body.seed
    length = check_length(body.max_tokens)
    settings = {'temperature': body.temperature, 'top_p': body.top_p}
    requests = requests_of(rows, length, seed, body.n, **settings)
    head = {'object': 'text_completion', 'created': int(time.time()), 'model': name}
    head['id'] = f'cmpl-{uuid.uuid4().hex}'

    def choice(index: int, text: str, ended: str | None) -> dict[str, Any]:
      return {'index': index, 'text': text, 'logprobs': None, 'finish_reason': ended}

    def usage(*outputs: Output) -> dict[str, int]:
      return _usage(rows, completion_tokens=sum(len(output.tokens) for output in outputs))

    if body.stream:

      def part(text: str, ended: str | None, _: Output) -> dict[str, Any]:
        return {**head, 'choices': [choice(0, text, ended)]}

      wanted = (body.stream_options or {}).get('include_usage')
      last = (lambda output: {**head, 'choices': [], 'usage': usage(output)}) if wanted else None
      return await stream(requests, stop, part, last)
    found = await all_of(requests, stop)
    choices = [choice(i, text, ended) for i, (text, _, ended) in enumerate(found)]
    return {**head, 'choices': choices, 'usage': usage(*(output for _, output, _ in found))}

  @app.post('/v1/embeddings', responses=bodies.EMBEDDINGS)
  async def embeddings(body: bodies.EmbeddingBody) -> Any:
    if body.encoding_format not in ('float', 'base64'):
      raise HTTPException(400, f'encoding_format is {body.encoding_format!r}; float or base64')
    if body.dimensions is not None:
      raise HTTPException(400, 'dimensions is not supported: vectors are as wide as the model')
    rows = rows_of(body.input)

    def shown(vector: Any) -> Any:
      if body.encoding_format == 'float':
        return vector.tolist()
      return base64.b64encode(vector.astype('<f4').tobytes()).decode()

    vectors = map(shown, await on_device(model.encode, rows, pooling='mean', **longest))
    data = [{'object': 'embedding', 'index': i, 'embedding': x} for i, x in enumerate(vectors)]
    return {'object': 'list', 'model': name, 'data': data, 'usage': _usage(rows)}

  @app.get('/v1/models')
  async def models() -> Any:
    entry = {'id': name, 'object': 'model', 'created': 0, 'owned_by': 't5x_lite'}
    sizes = {'num_parameters': model_sharding.count_params(model.params), **longest}
    sizes['max_new_tokens'] = limits.max_new_tokens
    return {'object': 'list', 'data': [{**entry, **sizes}]}

  @app.get('/healthz')
  async def healthz() -> Any:
    return {'status': 'ok'}

  @app.get('/readyz')
  async def readyz() -> Any:
    if not worker.alive:
      raise HTTPException(503, 'the server is stopping')
    return {'status': 'ready'}

  @app.get('/metrics')
  async def read_metrics() -> Any:
    text = prometheus_client.generate_latest(metrics.registry)
    return responses.Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

  @app.get('/', response_class=responses.HTMLResponse)
  async def page() -> str:
    return importlib.resources.files('t5x_lite.serving').joinpath('page.html').read_text('utf-8')

  async def explained(_: Any, error: Exception) -> responses.JSONResponse:
    return guard.error_response(*guard.explain(error))

  for kind in (*guard.STATUS, RequestValidationError, HTTPException, Exception):
    app.add_exception_handler(kind, explained)
  for operations in app.openapi()['paths'].values():
    for one in operations.values():
      one['responses'].pop('422', None)  # FastAPI's own; a wrong body is 400
  return Guard(app, limits=limits, token=token, metrics=metrics)


def _words(texts: Sequence[bytes], row: Sequence[int]) -> tuple[list[str], list[int]]:
  """Returns the words of a row, of up to two its tokens, and where each begins; the end is last."""
  pieces = [texts[token] for token in row[:-1]]
  pairs = enumerate(itertools.pairwise(pieces), start=1)
  # A space belongs to the word after it, or to its own piece.
  between = [i for i, (a, b) in pairs if a.strip() and (a[-1:] + b[:1]).strip() != a[-1:] + b[:1]]
  starts = [0, *between] if len(between) > 1 else [*range(len(pieces))]
  starts.append(len(pieces))
  words = [b''.join(pieces[i:j]) for i, j in itertools.pairwise(starts)]
  return [*(word.decode('utf-8', 'replace').strip() or '␣' for word in words), ''], starts


def _usage(rows: list[list[int]], **written: int) -> dict[str, int]:
  read = sum(map(len, rows))
  return {'prompt_tokens': read, **written, 'total_tokens': read + sum(written.values())}
