"""Token ids in, token ids out: batches that compile a handful of times.

Evaluation inside training, the `eval` and `infer` programs and the Python
interface all decode through `Predictor`. Inputs are padded to one of a few
lengths and batches to one size, so that the number of compilations does not
depend on the data. No TensorFlow.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from t5x_lite.decoding import steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import partitioning
from t5x_lite.training import train_state

SHORTEST_BUCKET = 16


def bucket_lengths(longest: int) -> tuple[int, ...]:
  """Returns the input lengths that are compiled for: powers of two, and all.

  Args:
    longest: the longest input, in tokens.
  """
  lengths = []
  length = SHORTEST_BUCKET
  while length < longest:
    lengths.append(length)
    length *= 2
  return (*lengths, longest)


def bucket(length: int, lengths: Sequence[int]) -> int:
  """Returns the first bucket that holds `length` tokens."""
  return next(candidate for candidate in lengths if length <= candidate)


def pad_rows(
  rows: Sequence[Sequence[int]], *, batch_size: int, length: int, pad_id: int
) -> np.ndarray:
  """Returns rows as one [batch_size, length] array; missing rows repeat one.

  A row of nothing but padding would send NaN through an attention without a
  single key, so rows past the last are copies of the first.
  """
  array = np.full((batch_size, length), pad_id, np.int32)
  for i in range(batch_size):
    row = rows[i] if i < len(rows) else rows[0]
    array[i, : len(row)] = row
  return array


def replicated_batch(array: np.ndarray, mesh: Mesh) -> jax.Array:
  """Returns an array over the mesh that every process holds all rows of."""
  sharding = partitioning.batch_sharding(mesh)
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def to_host(array: jax.Array) -> np.ndarray:
  """Returns a batch-sharded array whole, on every process."""
  if jax.process_count() == 1:
    return np.asarray(jax.device_get(array))
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@functools.cache
def _predict_step(
  model: T5Config,
  config: DecodingConfig,
  mesh: Mesh,
  rules: partitioning.LogicalAxisRules,
) -> Callable[..., Any]:
  """Shares compilations; tracing writes the mesh and rules into the step."""
  del mesh, rules
  graphdef, _, _ = t5.abstract_params(model)
  return jax.jit(steps.make_predict_step(graphdef, config))


class Predictor:
  """A decoding model: parameters are an argument, compilations are kept."""

  def __init__(
    self,
    model: T5Config,
    *,
    mesh: Mesh,
    rules: partitioning.LogicalAxisRules,
    decoding: DecodingConfig,
    batch_size: int,
    max_input_length: int,
    seed: int = 0,
  ):
    """Compiles nothing yet.

    Args:
      model: must have an encoder and a decoder.
      mesh: where it runs.
      rules: how arrays are cut over the mesh.
      decoding: how tokens are chosen.
      batch_size: rows decoded at a time; raised to a multiple of the mesh's
        data axes.
      max_input_length: longest input, in tokens; longer ones are an error
        here, the caller truncates.
      seed: of sampling.

    Raises:
      UsageError: if the model does not read inputs and write outputs.
    """
    if model.architecture != 'encoder_decoder':
      raise UsageError(
        f'architecture={model.architecture!r} cannot predict outputs from '
        "inputs; it takes 'encoder_decoder'"
      )
    self.model = model
    self.mesh = mesh
    self.decoding = decoding
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    self.batch_size = -(-batch_size // ways) * ways
    self.buckets = bucket_lengths(max_input_length)
    self.rules = rules
    self._key = jax.random.key(seed)
    _, self._shapes, self._axes = t5.abstract_params(model)
    self._step = _predict_step(model, decoding, mesh, rules)

  @functools.cached_property
  def abstract_params(self) -> Any:
    """The parameters' shapes, dtypes and shardings."""
    shardings = partitioning.shardings(
      self._shapes, self._axes, self.mesh, self.rules
    )
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      self._shapes,
      shardings,
    )

  def predict(
    self, params: Any, rows: Sequence[Sequence[int]], *, index: int = 0
  ) -> tuple[list[list[int]], list[float]]:
    """Decodes at most `batch_size` inputs.

    Args:
      params: as `abstract_params` describes.
      rows: token ids of each input, EOS included if the model expects it.
      index: of this batch; sampling differs from one to the next.

    Returns:
      Token ids up to and without EOS, and the log-probability of each output.
    """
    assert 0 < len(rows) <= self.batch_size, len(rows)
    longest = max(1, *(len(row) for row in rows))
    array = pad_rows(
      rows,
      batch_size=self.batch_size,
      length=bucket(longest, self.buckets),
      pad_id=self.model.pad_id,
    )
    batch = {'encoder_input_tokens': replicated_batch(array, self.mesh)}
    key = jax.random.fold_in(self._key, index)
    with partitioning.axis_rules(self.mesh, self.rules):
      tokens, scores = self._step(params, batch, key)
    tokens, scores = to_host(tokens), to_host(scores)
    outputs = [self._until_eos(row) for row in tokens[: len(rows)].tolist()]
    return outputs, scores[: len(rows)].tolist()

  def _until_eos(self, row: list[int]) -> list[int]:
    eos = self.model.eos_id
    return (
      row[: row.index(eos)] if eos in row else _strip(row, self.model.pad_id)
    )


@functools.cache
def _continue_step(
  model: T5Config,
  config: DecodingConfig,
  bidirectional: bool,
  mesh: Mesh,
  rules: partitioning.LogicalAxisRules,
) -> Callable[..., Any]:
  """As `_predict_step`."""
  del mesh, rules
  graphdef, _, _ = t5.abstract_params(model)
  return jax.jit(steps.make_continue_step(graphdef, config, bidirectional))


def continue_prompts(
  model: T5Config,
  params: Any,
  rows: Sequence[Sequence[int]],
  *,
  decoding: DecodingConfig,
  mesh: Mesh,
  rules: partitioning.LogicalAxisRules,
  key: jax.Array,
  bidirectional: bool = False,
) -> tuple[list[list[int]], list[float]]:
  """Decodes what follows each prompt, by a model without an encoder.

  Args:
    model: the architecture.
    params: its parameters.
    rows: token ids of each prompt.
    decoding: how tokens are chosen; its length counts new tokens alone.
    mesh: where the parameters are.
    rules: how arrays are cut over it.
    key: of sampling.
    bidirectional: the prompt's tokens see each other in both directions.

  Returns:
    Token ids up to and without EOS, and the log-probability of each output.
  """
  prompts = [[model.decoder_start_id, *row] for row in rows]
  longest = max(map(len, prompts))
  array = pad_rows(
    prompts,
    batch_size=len(prompts),
    length=bucket(longest, bucket_lengths(longest)),
    pad_id=model.pad_id,
  )
  lengths = np.asarray([len(row) for row in prompts], np.int32)
  step = _continue_step(model, decoding, bidirectional, mesh, rules)
  with partitioning.axis_rules(mesh, rules):
    tokens, scores = step(params, array, lengths, key)
  outputs = []
  for row in to_host(tokens).tolist():
    eos = model.eos_id
    ended = eos in row
    outputs.append(
      row[: row.index(eos)] if ended else _strip(row, model.pad_id)
    )
  return outputs, to_host(scores).tolist()


def _strip(row: list[int], pad_id: int) -> list[int]:
  """Removes the padding after a row that never ended."""
  while row and row[-1] == pad_id:
    row = row[:-1]
  return row


def mesh_and_rules(
  model: T5Config, config: partitioning.MeshConfig | None
) -> tuple[Mesh, partitioning.LogicalAxisRules]:
  """Returns the mesh that a config means for a model, and its rules."""
  _, shapes, _ = t5.abstract_params(model)
  config = partitioning.resolve(
    config or partitioning.MeshConfig(),
    num_params=train_state.count_params(shapes),
    num_heads=model.num_heads,
  )
  mesh = partitioning.make_mesh(config)
  return mesh, partitioning.logical_axis_rules(config)
