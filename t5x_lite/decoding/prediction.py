"""Predictor: batches of token ids in, output ids out, padded to few sizes.

Evaluation inside training, the `eval` and `infer` programs and the Python
interface all decode through `Predictor`. Lengths are padded to one of few
sizes, so that the number of compilations does not depend on the data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from t5x_lite.decoding import steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import model_sharding
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.placement import Placement

SHORTEST = 16


def padded_length(length: int, longest: int | None = None, shortest: int = SHORTEST) -> int:
  """Returns the size that something of `length` is padded to: a power of two.

  A program is compiled for every size, and so there are few of them.

  Args:
    length: tokens of the longest row, or number of rows.
    longest: the size is never larger than this; None for no bound.
    shortest: nor smaller than this.
  """
  size = shortest
  while size < length:
    size *= 2
  return size if longest is None else min(size, longest)


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


def to_host(array: jax.Array) -> np.ndarray:
  """Returns a batch-sharded array whole, on every process."""
  if jax.process_count() == 1:
    return np.asarray(jax.device_get(array))
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def replicated_batch(array: np.ndarray, mesh: Mesh) -> jax.Array:
  """Returns an array over the mesh that every process holds all rows of."""
  sharding = partitioning.batch_sharding(mesh)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Predictor:
  """A decoding model: parameters are an argument, compilations are kept."""

  def __init__(
    self,
    model: T5Config,
    *,
    placement: Placement,
    decoding: DecodingConfig,
    batch_size: int,
    max_input_length: int,
    seed: int = 0,
  ):
    """Compiles nothing yet.

    Args:
      model: must have an encoder and a decoder.
      placement: where it runs.
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
    self.placement = placement
    self.decoding = decoding
    self.batch_size = placement.whole_batch(batch_size)
    self.max_input_length = max_input_length
    self._key = jax.random.key(seed)
    self._step = model_sharding.jit_step(steps.make_predict_step, model, placement, decoding)

  @property
  def abstract_params(self) -> Any:
    """Shapes, dtypes and shardings that parameters should be loaded with."""
    return model_sharding.inference_params(self.model, self.placement)

  def predict(
    self, params: Any, rows: Sequence[Sequence[int]], *, index: int = 0
  ) -> tuple[list[list[int]], list[float]]:
    """Decodes at most `batch_size` inputs.

    Args:
      params: as `abstract_params` describes, or in any other float dtype.
      rows: token ids of each input, EOS included if the model expects it.
      index: of this batch; sampling differs from one to the next.

    Returns:
      Token ids up to and without EOS, and the log-probability of each output.
    """
    assert 0 < len(rows) <= self.batch_size, len(rows)
    longest = max(map(len, rows))
    assert longest <= self.max_input_length, (longest, self.max_input_length)
    array = pad_rows(
      rows,
      batch_size=self.batch_size,
      length=padded_length(longest, self.max_input_length),
      pad_id=self.model.pad_id,
    )
    mesh = self.placement.mesh
    batch = {'encoder_input_tokens': replicated_batch(array, mesh)}
    key = jax.random.fold_in(self._key, index)
    tokens, scores = self._step(params, batch, key)
    return _outputs(self.model, tokens, scores, len(rows))


def continue_prompts(
  model: T5Config,
  params: Any,
  rows: Sequence[Sequence[int]],
  *,
  placement: Placement,
  decoding: DecodingConfig,
  batch_size: int,
  key: jax.Array,
  bidirectional: bool = False,
) -> tuple[list[list[int]], list[float]]:
  """Decodes what follows each prompt, by a model without an encoder.

  Args:
    model: the architecture.
    params: its parameters.
    rows: token ids of each prompt, at most batch_size.
    placement: where the parameters are.
    decoding: how tokens are chosen; its length counts new tokens alone.
    batch_size: rows that the program is compiled for.
    key: of sampling.
    bidirectional: the prompt's tokens see each other in both directions.

  Returns:
    Token ids up to and without EOS, and the log-probability of each output.
  """
  prompts = [[model.decoder_start_id, *row] for row in rows]
  prompts += prompts[:1] * (batch_size - len(prompts))
  array = pad_rows(
    prompts,
    batch_size=batch_size,
    length=padded_length(max(map(len, prompts))),
    pad_id=model.pad_id,
  )
  lengths = np.asarray([len(row) for row in prompts], np.int32)
  step = model_sharding.jit_step(
    steps.make_continue_step, model, placement, decoding, bidirectional
  )
  tokens, scores = step(params, array, lengths, key)
  return _outputs(model, tokens, scores, len(rows))


def call_step(
  make_step: Any,
  model: T5Config,
  params: Any,
  placement: Placement,
  batch: Mapping[str, np.ndarray],
  *arguments: Any,
) -> np.ndarray:
  """Runs a step of steps.py on a batch of any size, whole on every process.

  Args:
    make_step: such as `steps.make_score_step`.
    model: the architecture.
    params: its parameters.
    placement: where they are.
    batch: arrays of as many rows each; rows are added, so that few sizes are
      compiled for, and their results dropped.
    *arguments: of make_step.
  """
  size = len(next(iter(batch.values())))
  full = placement.whole_batch(padded_length(size, shortest=1))
  batch = {
    name: np.concatenate([array, np.repeat(array[:1], full - size, axis=0)])
    for name, array in batch.items()
  }
  step = model_sharding.jit_step(make_step, model, placement, *arguments)
  result = step(params, partitioning.global_batch(batch, placement.mesh))
  return to_host(result)[:size]


def _outputs(
  model: T5Config, tokens: jax.Array, scores: jax.Array, num_rows: int
) -> tuple[list[list[int]], list[float]]:
  """Returns the ids of each row without EOS and padding, and its score."""
  rows = to_host(tokens)[:num_rows].tolist()
  for row in rows:
    if model.eos_id in row:
      del row[row.index(model.eos_id) :]
      continue
    while row and row[-1] == model.pad_id:  # it never ended
      row.pop()
  return rows, to_host(scores)[:num_rows].tolist()
