"""The serve program: a model behind HTTP, until SIGTERM; no TensorFlow, so it starts quickly."""

import dataclasses
import ipaddress
import itertools
import logging
import os
import signal
import socket
import time
from typing import Any

import jax
from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decoding.config import decoding_config
from t5x_lite.decoding.continuous import ContinuousBatch, Request
from t5x_lite.errors import UsageError
from t5x_lite.interop import trained_model
from t5x_lite.models import model_sharding
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs.generation import Generation, Rows
from t5x_lite.serving.worker import Worker

log = logging.getLogger(__name__)


def serve(
  *,
  model: str,
  name: str = '',
  host: str = '127.0.0.1',
  port: int = 8000,
  num_slots: int = 8,
  chunk: int = 4,
  max_queue: int = 256,
  max_input_tokens: int = 1024,
  max_new_tokens: int = 256,
  max_inputs: int = 64,
  max_body_bytes: int = 2**20,
  body_seconds: float = 10.0,
  request_seconds: float = 120.0,
  token_file: str = '',
  dtype: str = '',
  param_dtype: str = '',
  mesh: MeshConfig | None = None,
) -> None:
  """Serves a model over HTTP until SIGTERM or Ctrl-C; what was accepted is answered before it ends.

  GET / is a page to try it, /openapi.json describes it, OpenAI's clients take http://HOST:PORT/v1.
  UsageError if the model cannot be read, the address is taken, or a package is missing.

  Args:
    model: a run directory or one STEP directory of its checkpoints, a folder of transformers or
      T5X, or the NAME@REVISION of a model on the hub.
    name: what clients call it; the folder's name by default.
    host: address to listen on; loopback by default, '0.0.0.0' for all.
    port: 0 takes any that is free.
    num_slots: outputs decoded at a time.
    chunk: tokens between looks at who ended and who waits: few stream smoothly, many are faster.
    max_queue: requests that may wait for a slot; more are answered 429.
    max_input_tokens: of an input; longer ones are refused, or cut if the client asks for it.
    max_new_tokens: of an output.
    max_inputs: inputs of one call, times the outputs of each.
    max_body_bytes: of a call.
    body_seconds: in which a call's body must have come.
    request_seconds: in which a call must be answered.
    token_file: file with the token that clients must send as 'Authorization: Bearer TOKEN'; the
      environment's T5X_LITE_TOKEN by default; none, if that is empty.
    dtype: to compute in; the checkpoint's own by default.
    param_dtype: to keep parameters in: 'bfloat16' takes half of float32's memory, 'int8' a fourth;
      the checkpoint's own by default.
    mesh: how devices are arranged; decided by their number by default.
  """
  given = dict(locals())
  for what, value in given.items():
    if type(value) in (int, float) and what != 'port' and value <= 0:
      raise UsageError(f'serve.{what} is {value}; it must be positive')
  if jax.process_count() > 1:
    raise UsageError('serve runs in one process; start one on each host')
  try:
    import uvicorn

    from t5x_lite.serving import app as app_lib
    from t5x_lite.serving.guard import Limits
  except ImportError as error:
    raise UsageError(f"{error.name} is missing: in a checkout, pip install '.[serve]'") from error
  token = _read_token(token_file)
  listener = _listen(host, port)
  opened = trained_model.open_together(model, dtype=dtype, param_dtype=param_dtype)[0]
  placement = model_sharding.place_model(opened.config, mesh)
  params = opened.load_params(model_sharding.inference_params(opened.config, placement))
  vocabulary = vocabularies.make_vocabulary(opened.vocabulary)
  how = {'num_slots': num_slots, 'max_decode_length': max_new_tokens, 'chunk': chunk}
  batch = ContinuousBatch(opened.config, params, placement=placement, **how)
  _warm_up(batch, vocabulary)
  calls = Calls(opened.config, params, placement, vocabulary)
  worker = Worker(batch, max_queue=max_queue)
  name = name or os.path.basename(os.path.normpath(model))
  limits = Limits(**{field.name: given[field.name] for field in dataclasses.fields(Limits)})
  if not token and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
    log.warning('everybody who reaches %s can use it: --token_file asks for a token', host)
  app = app_lib.make_app(name, calls, worker, limits, token=token)
  patience = {'timeout_keep_alive': 5, 'timeout_graceful_shutdown': int(request_seconds) + 1}
  server = uvicorn.Server(uvicorn.Config(app, log_level='warning', **patience))
  # Of what comes before uvicorn listens; of what it raises again when all is answered, too late.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: setattr(server, 'should_exit', True))
  place = f'[{host}]' if ':' in host else host
  address = f'http://{place}:{listener.getsockname()[1]}'
  listener.listen()  # who reads the address may connect
  print(f'{name} is served at {address} (a page to try it; OpenAI: {address}/v1)', flush=True)
  server.run(sockets=[listener])
  log.info('all requests are answered: stopped')


def _read_token(path: str) -> str:
  if not path:
    return os.environ.get('T5X_LITE_TOKEN', '')
  try:
    token = epath.Path(path).read_text().strip()
  except (OSError, UnicodeError) as error:
    raise UsageError(f'cannot read token_file {path}: {error}') from error
  if not token:
    raise UsageError(f'token_file {path} is empty')
  return token


def _listen(host: str, port: int) -> socket.socket:
  """Binds now, so that a taken address is told before the model is read."""
  try:
    listener = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
  except (OSError, OverflowError) as error:
    raise UsageError(f'cannot listen on {host}:{port}: {error}') from error
  return listener


def _warm_up(batch: ContinuousBatch, vocabulary: Vocabulary) -> None:
  """Compiles what the first clients would wait for: a program for every number of rows."""
  began, most = time.monotonic(), batch.num_free
  request = Request(tokens=[vocabulary.eos_id], max_new_tokens=2)
  for power in range((2 * most - 1).bit_length()):
    list(batch.run([request] * min(2**power, most)))
  log.info('compiled in %.1f s', time.monotonic() - began)


class Calls(Generation):
  """What runs in the worker beside the continuous batch, of rows of tokens."""

  def decode_rows(
    self, rows: Rows, max_new_tokens: int, seed: int, settings: dict[str, Any]
  ) -> tuple[list[list[int]], list[float]]:
    """Returns the outputs of all rows by settings of DecodingConfig, and their scores."""
    config = decoding_config(max_new_tokens, **settings)
    if config.stop_strings or config.regex or config.json_schema:  # a regex can have many states
      raise UsageError('decoding takes no stop_strings, regex and json_schema from clients')
    settings |= {'max_new_tokens': max_new_tokens, 'max_input_tokens': max(map(len, rows))}
    settings |= {'batch_size': 2**16, 'seed': seed % 2**32, 'return_scores': True}
    flat: Any = itertools.chain.from_iterable if config.num_return_sequences > 1 else iter
    tokens, scores = map(flat, self.generate(rows, **settings))
    return [*tokens], [*scores]
