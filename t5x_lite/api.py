"""One line in Python: `model = t5x_lite.load('path-or-hub-id')`.

The model holds its config, parameters and vocabulary; it gives logits,
encodings, generated text and scores, is saved in any format, and trained.
No TensorFlow until it is trained.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.decoding import prediction, steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import assignment, export, source, tensors
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs import grow_vocabulary

Texts = str | Sequence[str]
Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


def load(
  path: str,
  *,
  mesh: MeshConfig | None = None,
  vocabulary: VocabularyConfig | None = None,
  assignment_map: assignment.AssignmentMap = (),
  strict: bool = True,
  seed: int = 0,
  **changes: Any,
) -> 'Model':
  """Loads a model of any format.

  Args:
    path: a folder of t5x_lite, transformers or T5X, one of its steps, or the
      name of a model on the Hugging Face hub, such as 'google/flan-t5-base'.
    mesh: how the parameters are spread over devices; one device by default.
    vocabulary: instead of the one that the folder names.
    assignment_map: see `interop.assignment.assign`.
    strict: likewise.
    seed: of parameters that are drawn anew.
    **changes: fields of T5Config to change, such as dtype='bfloat16' to compute
      in, param_dtype='bfloat16' to keep, or architecture='encoder'.

  Raises:
    UsageError: if nothing there can be read, or it is another kind of model.
  """
  opened = source.open_source(path)
  known = {field.name for field in dataclasses.fields(T5Config)}
  unknown = sorted(changes.keys() - known)
  if unknown:
    raise UsageError(
      f'load got {unknown[0]!r}, which is no field of T5Config; there are '
      f'{", ".join(sorted(known))}'
    )
  config = opened.config.replace(**changes)
  found, report = assignment.assign(
    opened, config, assignment_map=assignment_map, strict=strict, seed=seed
  )
  device_mesh, rules = _mesh(config, mesh)
  params = tensors.place(found, config, _shardings(config, device_mesh, rules))
  return Model(
    config,
    params,
    vocabulary or opened.vocabulary,
    mesh=device_mesh,
    rules=rules,
    lengths=opened.lengths,
    step=opened.step,
    report=report,
  )


def new(
  config: T5Config,
  vocabulary: VocabularyConfig | None = None,
  *,
  mesh: MeshConfig | None = None,
  seed: int = 0,
) -> 'Model':
  """Returns a model that has not been trained.

  Args:
    config: the architecture.
    vocabulary: None for ids without text.
    mesh: how the parameters are spread over devices; one device by default.
    seed: of the parameters.
  """
  device_mesh, rules = _mesh(config, mesh)
  init = jax.jit(
    functools.partial(t5.init_params, config),
    out_shardings=_shardings(config, device_mesh, rules),
  )
  params = init(jax.random.key(seed))
  return Model(config, params, vocabulary, mesh=device_mesh, rules=rules)


def _mesh(
  config: T5Config, mesh: MeshConfig | None
) -> tuple[Mesh, partitioning.LogicalAxisRules]:
  if mesh is not None:
    return prediction.mesh_and_rules(config, mesh)
  one = MeshConfig(data=1, fsdp=1, model=1)
  return (
    partitioning.make_mesh(one, jax.devices()[:1]),
    partitioning.logical_axis_rules(one),
  )


def _shardings(
  config: T5Config, mesh: Mesh, rules: partitioning.LogicalAxisRules
) -> Any:
  _, shapes, axes = t5.abstract_params(config)
  return partitioning.shardings(shapes, axes, mesh, rules)


class Model:
  """A model in memory.

  Attributes:
    config: its architecture.
    params: nested dict of arrays.
    vocabulary_config: names its vocabulary; None for ids without text.
    vocabulary: encodes and decodes text; None likewise.
    mesh: where the parameters are; one device by default.
    rules: how arrays are cut over it.
    lengths: task feature lengths of training; empty if unknown.
    step: updates made so far.
    report: what was loaded, skipped and newly initialised; None if the model
      was not loaded.
  """

  def __init__(
    self,
    config: T5Config,
    params: Any,
    vocabulary: VocabularyConfig | None = None,
    *,
    mesh: Mesh | None = None,
    rules: partitioning.LogicalAxisRules | None = None,
    lengths: Mapping[str, int] | None = None,
    step: int = 0,
    report: assignment.Report | None = None,
  ):
    """Wraps parameters; see `load` and `new` for the usual ways.

    Raises:
      UsageError: if the vocabulary has more ids than the embedding has rows.
    """
    self.config = config
    self.params = params
    self.vocabulary_config = vocabulary
    self.vocabulary = None
    if vocabulary is not None:
      self.vocabulary = vocabularies.make_vocabulary(vocabulary)
      if self.vocabulary.vocab_size > config.vocab_size:
        raise UsageError(
          f'the vocabulary has {self.vocabulary.vocab_size} ids, the embedding '
          f'{config.vocab_size} rows: name another with vocabulary=...'
        )
    default_mesh, default_rules = _mesh(config, None)
    self.mesh = mesh or default_mesh
    self.rules = rules or default_rules
    self.lengths = dict(lengths or {})
    self.step = step
    self.report = report

  # ---- Numbers ----

  def logits(
    self,
    encoder_input_tokens: Ids | None,
    decoder_input_tokens: Ids,
    *,
    decoder_causal_attention: Ids | None = None,
  ) -> np.ndarray:
    """Returns float32 logits [B, L, V].

    Args:
      encoder_input_tokens: [B, M] ids, padded with pad_id; None for a model
        without an encoder.
      decoder_input_tokens: [B, L] ids, beginning with decoder_start_id.
      decoder_causal_attention: [B, L], 1 at the prefix of a prefix model.
    """
    batch = {
      'encoder_input_tokens': encoder_input_tokens,
      'decoder_input_tokens': decoder_input_tokens,
      'decoder_causal_attention': decoder_causal_attention,
    }
    if not self.config.has_decoder:
      raise UsageError("architecture='encoder' has no logits; use encode")
    if self.config.has_encoder and encoder_input_tokens is None:
      raise UsageError('logits needs encoder_input_tokens: there is an encoder')
    arrays = {
      k: np.asarray(v, np.int32) for k, v in batch.items() if v is not None
    }
    return self._call(_step(steps.make_logits_step, self.config), arrays)

  def encode(
    self, inputs: Texts | Ids, *, pooling: str | None = None
  ) -> np.ndarray:
    """Returns the encoder's output.

    Args:
      inputs: texts (EOS is added), or ids as they are.
      pooling: None returns every position, [B, M, D]; 'mean' the mean over real
        positions, [B, D] (Sentence-T5's choice); 'first' the first position.
    """
    if not self.config.has_encoder:
      raise UsageError("architecture='decoder' has no encoder")
    if pooling not in steps.POOLINGS:
      raise UsageError(
        f'pooling is {pooling!r}; allowed are '
        f'{", ".join(map(repr, steps.POOLINGS))}'
      )
    rows = self._rows(inputs)
    shape = np.shape(inputs) if isinstance(inputs, np.ndarray) else ()
    length = shape[1] if len(shape) == 2 else max(map(len, rows))
    bucket = prediction.bucket(length, prediction.bucket_lengths(length))
    tokens = self._padded(rows, bucket)
    step = _step(steps.make_encode_step, self.config, pooling)
    encoded = self._call(step, {'encoder_input_tokens': tokens})
    return encoded[:, :length] if pooling is None else encoded

  def score(self, inputs: Texts | Ids | None, targets: Texts | Ids):
    """Returns the log-probability of each target, EOS of texts included.

    Args:
      inputs: texts or ids; None for a model without an encoder.
      targets: texts or ids, as many as inputs.
    """
    wanted = self._rows(targets)
    length = max(map(len, wanted))
    batch = {'decoder_target_tokens': self._padded(wanted, length)}
    weights = np.zeros((len(wanted), length), np.float32)
    for i, row in enumerate(wanted):
      weights[i, : len(row)] = 1.0
    batch['decoder_loss_weights'] = weights
    shifted = np.roll(batch['decoder_target_tokens'], 1, axis=1)
    shifted[:, 0] = self.config.decoder_start_id
    batch['decoder_input_tokens'] = shifted
    if self.config.has_encoder:
      rows = self._rows(inputs if inputs is not None else [])
      if len(rows) != len(wanted):
        raise UsageError(
          f'score got {len(rows)} inputs and {len(wanted)} targets'
        )
      batch['encoder_input_tokens'] = self._padded(rows, max(map(len, rows)))
    return self._call(_step(steps.make_score_step, self.config), batch)

  # ---- Text ----

  def generate(
    self,
    inputs: Texts | Ids,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    bidirectional_prefix: bool = False,
    return_scores: bool = False,
    **sampling: Any,
  ) -> Any:
    """Generates an output for each input.

    Args:
      inputs: texts (for an encoder EOS is added) or ids as they are. A model
        without an encoder continues them.
      max_new_tokens: most tokens an output, EOS included.
      batch_size: inputs decoded at a time.
      seed: of sampling.
      bidirectional_prefix: the input's tokens see each other in both
        directions; for prefix language models.
      return_scores: return (outputs, log-probabilities of each).
      **sampling: fields of DecodingConfig, such as temperature=0.7, top_p=0.9;
        greedy by default.

    Returns:
      Texts for texts, lists of ids without EOS for ids; one alone if the input
      was one text.
    """
    config = DecodingConfig(max_decode_length=max_new_tokens, **sampling)
    rows = self._rows(inputs, eos=self.config.has_encoder)
    outputs: list[list[int]] = []
    scores: list[float] = []
    for index, start in enumerate(range(0, len(rows), batch_size)):
      part = rows[start : start + batch_size]
      if self.config.has_encoder:
        predictor = self._predictor(
          config, min(batch_size, len(rows)), max(map(len, rows)), seed
        )
        new, log_probs = predictor.predict(self.params, part, index=index)
      else:
        key = jax.random.fold_in(jax.random.key(seed), index)
        new, log_probs = prediction.continue_prompts(
          self.config,
          self.params,
          part,
          decoding=config,
          mesh=self.mesh,
          rules=self.rules,
          key=key,
          bidirectional=bidirectional_prefix,
        )
      outputs += new
      scores += log_probs
    results: Any = outputs
    if _is_text(inputs):
      assert self.vocabulary is not None
      results = [self.vocabulary.decode(row) for row in outputs]
    if isinstance(inputs, str):
      return (results[0], scores[0]) if return_scores else results[0]
    return (results, scores) if return_scores else results

  def _predictor(
    self, config: DecodingConfig, batch_size: int, length: int, seed: int
  ) -> prediction.Predictor:
    return prediction.Predictor(
      self.config,
      mesh=self.mesh,
      rules=self.rules,
      decoding=config,
      batch_size=batch_size,
      max_input_length=length,
      seed=seed,
    )

  # ---- Saving and training ----

  def save(
    self, directory: str, *, format: str = 't5x_lite', dtype: str | None = None
  ) -> None:
    """Writes the model; the directory must not exist yet, or be empty.

    Args:
      directory: where to.
      format: 't5x_lite' (a run directory), 'hf' (for from_pretrained of
        transformers) or 't5x'.
      dtype: of the numbers written; as they are in memory by default.
    """
    if format not in source.FORMATS:
      raise UsageError(
        f'format is {format!r}; allowed are {", ".join(source.FORMATS)}'
      )
    target = epath.Path(directory)
    export.check_destination(target)
    config = self.config.replace(param_dtype=dtype or self.config.param_dtype)
    export.check_target(config, format)
    export.write(
      target,
      tensors=tensors.of_params(self.params, self.config),
      cfg=config,
      to=format,
      vocabulary=self.vocabulary_config,
      step=self.step,
      lengths=self.lengths,
    )

  def grow_vocabulary(
    self, tokens: Sequence[str] = (), *, extra_ids: int | None = None
  ) -> 'Model':
    """Returns the model with more tokens or sentinels.

    Args:
      tokens: new pieces; their rows begin as the mean of the old ones.
      extra_ids: number of sentinels in all.
    """
    if self.vocabulary_config is None:
      raise UsageError('this model came without a vocabulary')
    grown, config, vocabulary, _ = grow_vocabulary.grow(
      tensors.of_params(self.params, self.config),
      self.config,
      self.vocabulary_config,
      tokens=tokens,
      extra_ids=extra_ids,
    )
    shardings = _shardings(config, self.mesh, self.rules)
    return Model(
      config,
      tensors.place(grown, config, shardings),
      vocabulary,
      mesh=self.mesh,
      rules=self.rules,
      lengths=self.lengths,
      step=self.step,
    )

  def train(self, *, model_dir: str, **arguments: Any) -> 'Model':
    """Trains from these parameters and returns the trained model.

    Args:
      model_dir: the new run's directory; a run that is there is continued.
      **arguments: of `train.train`: dataset, optimizer, total_steps, ...
    """
    from t5x_lite.programs import train
    from t5x_lite.runs import checkpoints

    if self.vocabulary_config is None:
      raise UsageError('training needs a vocabulary; load with vocabulary=...')
    with tempfile.TemporaryDirectory(prefix='t5x_lite_') as scratch:
      start = f'{scratch}/start'
      self.save(start)
      checkpoint = arguments.pop('checkpoint', checkpoints.CheckpointConfig())
      state = train.train(
        model=self.config,
        vocabulary=self.vocabulary_config,
        model_dir=model_dir,
        checkpoint=dataclasses.replace(checkpoint, restore_path=start),
        **arguments,
      )
    assert state is not None
    return load(model_dir)

  # ---- Plumbing ----

  def _rows(self, inputs: Any, *, eos: bool = True) -> list[list[int]]:
    """Returns token ids, one list an input."""
    if not isinstance(inputs, str) and not len(inputs):
      raise UsageError('there is no input')
    if _is_text(inputs):
      if self.vocabulary is None:
        raise UsageError(
          'this model came without a vocabulary: give ids, or load it with '
          'vocabulary=...'
        )
      texts = [inputs] if isinstance(inputs, str) else inputs
      end = [self.vocabulary.eos_id] if eos else []
      return [[*self.vocabulary.encode(text), *end] for text in texts]
    if np.ndim(inputs[0]) == 0:
      inputs = [inputs]
    rows = [[int(i) for i in row] for row in inputs]
    for row in rows:
      while row and row[-1] == self.config.pad_id:
        row.pop()
      if any(not 0 <= i < self.config.vocab_size for i in row):
        raise UsageError(
          f'the input {row} has an id outside 0 to {self.config.vocab_size - 1}'
        )
    return rows

  def _padded(self, rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    return prediction.pad_rows(
      rows,
      batch_size=len(rows),
      length=max(1, length),
      pad_id=self.config.pad_id,
    )

  def _call(self, function: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Runs a jitted function of params and a batch of any size."""
    size = len(next(iter(batch.values())))
    ways = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    full = -(-size // ways) * ways
    batch = {
      name: np.concatenate([array, np.repeat(array[:1], full - size, axis=0)])
      for name, array in batch.items()
    }
    with partitioning.axis_rules(self.mesh, self.rules):
      result = function(
        self.params, partitioning.global_batch(batch, self.mesh)
      )
    return prediction.to_host(result)[:size]


def _is_text(inputs: Any) -> bool:
  if isinstance(inputs, str):
    return True
  if isinstance(inputs, (np.ndarray, jax.Array)) or not len(inputs):
    return False
  return all(isinstance(one, str) for one in inputs)


@functools.lru_cache(maxsize=32)
def _step(make: Any, cfg: T5Config, *arguments: Any) -> Any:
  """Returns a jitted step of steps.py; models of one config share it."""
  graphdef, _, _ = t5.abstract_params(cfg)
  return jax.jit(make(graphdef, *arguments))
