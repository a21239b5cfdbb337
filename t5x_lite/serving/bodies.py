"""What clients send, and what they get: the schemas of /openapi.json."""

from typing import Any

import pydantic


class GenerateBody(pydantic.BaseModel, extra='forbid', allow_inf_nan=False):
  """Texts in, texts out; greedy unless a temperature is given."""

  inputs: str | list[str]
  max_new_tokens: int | None = pydantic.Field(None, ge=1)
  temperature: float = pydantic.Field(0.0, ge=0.0, le=100.0)
  top_k: int = pydantic.Field(0, ge=0)
  top_p: float = pydantic.Field(1.0, ge=1e-9, le=1.0)
  seed: int = 0
  num_outputs: int = pydantic.Field(1, ge=1, description='samples of each input')
  stop: list[str] = []
  stream: bool = pydantic.Field(False, description='server-sent events, one input alone')
  truncate: bool = pydantic.Field(False, description='cut long inputs instead of refusing them')
  decoding: dict[str, Any] = pydantic.Field(
    {}, description='settings of DecodingConfig instead of those above; not streamed'
  )


class ScoreBody(pydantic.BaseModel, extra='forbid'):
  """Log-probabilities of given targets, EOS included, natural logarithm."""

  inputs: list[str]
  targets: list[str]


class AttentionBody(pydantic.BaseModel, extra='forbid'):
  """Where the model looks in the inputs while it writes the outputs, word by word."""

  inputs: str
  outputs: str


class CompletionBody(pydantic.BaseModel, extra='allow', allow_inf_nan=False):
  """OpenAI's /v1/completions, as far as it makes sense for an encoder-decoder."""

  model: str = ''
  prompt: str | list[str] | list[int] | list[list[int]]
  max_tokens: int | None = pydantic.Field(None, ge=1)
  temperature: float = pydantic.Field(1.0, ge=0.0, le=2.0)
  top_p: float = pydantic.Field(1.0, ge=1e-9, le=1.0)
  n: int = pydantic.Field(1, ge=1)
  seed: int | None = None
  stop: str | list[str] | None = None
  stream: bool = False
  stream_options: dict[str, Any] | None = None
  best_of: int | None = None


class EmbeddingBody(pydantic.BaseModel):
  """OpenAI's /v1/embeddings."""

  model: str = ''
  input: str | list[str] | list[int] | list[list[int]]
  encoding_format: str = 'float'
  dimensions: int | None = None


def _schema(name: str, **fields: Any) -> type[pydantic.BaseModel]:
  typed: dict[str, Any] = {field: (kind, ...) for field, kind in fields.items()}
  return pydantic.create_model(name, **typed)


def _answer(name: str, **fields: Any) -> dict[int | str, dict[str, Any]]:
  """Returns what FastAPI calls the responses of a path."""
  return {200: {'model': _schema(name, **fields)}}


# 'stop' or 'length' is the reason; a stream's objects have neither index nor num_tokens.
_GENERATED = _schema(
  'Generated', text=str, score=float, finish_reason=str | None, num_tokens=int, index=int
)
_SCORED = _schema('Scored', log_prob=float, num_tokens=int)
_READ = _schema('Read', prompt_tokens=int, total_tokens=int)
_USAGE = _schema('Usage', prompt_tokens=int, completion_tokens=int, total_tokens=int)
_CHOICE = _schema('Choice', index=int, text=str, logprobs=None, finish_reason=str | None)
_EMBEDDING = _schema('Embedding', object=str, index=int, embedding=list[float] | str)
_ERROR = _schema('Error', message=str, type=str, param=None, code=int)

OUTPUTS = _answer('Outputs', outputs=list[_GENERATED])
SCORES = _answer('Scores', scores=list[_SCORED])
ATTENTION = _answer('Attention', inputs=list[str], outputs=list[str], weights=list[list[float]])
_HEAD = {'id': str, 'object': str, 'created': int, 'model': str}
COMPLETION = _answer('Completion', **_HEAD, choices=list[_CHOICE], usage=_USAGE)
EMBEDDINGS = _answer('Embeddings', object=str, model=str, data=list[_EMBEDDING], usage=_READ)

# What each means is said in guard.py.
ERRORS: dict[int | str, dict[str, Any]] = {
  status: {'model': _schema('ErrorBody', error=_ERROR)}
  for status in (400, 401, 408, 413, 429, 500, 503, 504)
}
