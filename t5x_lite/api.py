"""The Python interface: load, new, and Model, which generates, scores, trains.

`model = t5x_lite.load('path-or-hub-id')` holds its config, parameters and vocabulary. It gives
logits, encodings, text and scores, is saved in any format and trained, which loads TensorFlow.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.decoding import prediction, steps
from t5x_lite.errors import UsageError
from t5x_lite.interop import adapters, assignment, checkpoint_source, export, tensors, trained_model
from t5x_lite.models import model_sharding, t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import Placement, single_device
from t5x_lite.programs import grow_vocabulary
from t5x_lite.programs.generation import Generation, Ids
from t5x_lite.runs import progress


def load(
  path: str,
  *,
  mesh: MeshConfig | None = None,
  vocabulary: VocabularyConfig | None = None,
  assignment_map: assignment.AssignmentMap = (),
  strict: bool = True,
  adapter: str = '',
  seed: int = 0,
  **changes: Any,
) -> 'Model':
  """Loads a model of any format; UsageError if nothing can be read, or it is no such model.

  Args:
    path: a folder of t5x_lite, transformers or T5X, one of its steps, or the name of a model on the
      Hugging Face hub, such as 'google/flan-t5-base' or, with a branch, tag or commit,
      'google/flan-t5-base@main'.
    mesh: how the parameters are spread over devices; one device by default.
    vocabulary: instead of the one that the folder names.
    assignment_map: see `interop.assignment.assign`.
    strict: likewise.
    adapter: a folder with LoRA (ours or PEFT's), adapters or a prompt to put on it.
    seed: of parameters that are drawn anew.
    **changes: fields of T5Config to change, such as dtype='bfloat16' to compute in,
      param_dtype='bfloat16' or 'int8' to keep, or architecture='encoder'.
  """
  opened = checkpoint_source.open_source(path)
  if adapter:
    opened = adapters.put_on(opened, adapter)
  config = opened.config.replace(**changes)
  found, report = assignment.assign(
    opened, config, assignment_map=assignment_map, strict=strict, seed=seed
  )
  placement = model_sharding.place_here(config, mesh)
  params = tensors.place(found, config, model_sharding.param_specs(config, placement))
  known = {'lengths': opened.lengths, 'step': opened.step, 'report': report}
  return Model(config, params, vocabulary or opened.vocabulary, placement=placement, **known)


def new(
  config: T5Config,
  vocabulary: VocabularyConfig | None = None,
  *,
  mesh: MeshConfig | None = None,
  seed: int = 0,
) -> 'Model':
  """Returns a model that has not been trained, with a vocabulary or for ids alone.

  The mesh says how the parameters are spread over devices, one by default; the seed is theirs.
  """
  placement = model_sharding.place_here(config, mesh)
  specs = model_sharding.param_specs(config, placement)
  shardings = jax.tree.map(lambda spec: spec.sharding, specs)
  init = jax.jit(functools.partial(t5.init_params, config), out_shardings=shardings)
  return Model(config, init(jax.random.key(seed)), vocabulary, placement=placement)


class Model(Generation):
  """A model in memory.

  It has its `config`, the architecture; `params`, a nested dict of arrays; `placement`, where they
  are; `vocabulary_config`, which names its vocabulary, and `vocabulary`, which encodes and decodes
  text, both None for ids without text; `lengths`, task feature lengths of training, empty if
  unknown; `step`, updates made so far; and `report`, what was loaded, skipped and newly
  initialised, None if the model was not loaded.
  """

  def __init__(
    self,
    config: T5Config,
    params: Any,
    vocabulary: VocabularyConfig | None = None,
    *,
    placement: Placement | None = None,
    lengths: Mapping[str, int] | None = None,
    step: int = 0,
    report: assignment.Report | None = None,
  ):
    """Wraps parameters, as `load` and `new` do; UsageError if a vocabulary has too many ids."""
    self.config, self.params = config, params
    self.vocabulary_config, self.vocabulary = vocabulary, None
    if vocabulary is not None:
      fix = 'name another with vocabulary=...'
      self.vocabulary = trained_model.check_vocabulary(config, vocabulary, fix)
    self.placement = placement or single_device()
    self.lengths = dict(lengths or {})
    self.step, self.report = step, report

  def __repr__(self) -> str:
    cfg, ids = self.config, 'ids alone'
    if self.vocabulary_config is not None and self.vocabulary is not None:
      ids = f'{self.vocabulary.vocab_size} {self.vocabulary_config.kind} ids'
    return (
      f'<t5x_lite.Model: {cfg.architecture}, {cfg.num_encoder_layers} and {cfg.num_decoder_layers} '
      f'layers of {cfg.emb_dim}, {model_sharding.count_params(self.params):,} parameters '
      f'({cfg.param_dtype}), {ids}, step {self.step}, on {self.placement.mesh.size} device(s)>'
    )

  def logits(
    self,
    encoder_input_tokens: Ids | None,
    decoder_input_tokens: Ids,
    *,
    decoder_causal_attention: Ids | None = None,
  ) -> np.ndarray:
    """Returns float32 logits [B, L, V].

    The encoder's ids [B, M] are padded with pad_id, None for a model without one; the decoder's
    [B, L] begin with decoder_start_id. decoder_causal_attention [B, L] is 1 in a prefix.
    """
    if not self.config.has_decoder:
      raise UsageError("architecture='encoder' has no logits; use encode")
    if self.config.has_encoder and encoder_input_tokens is None:
      raise UsageError('logits needs encoder_input_tokens: there is an encoder')
    given = {
      'encoder_input_tokens': encoder_input_tokens,
      'decoder_input_tokens': decoder_input_tokens,
      'decoder_causal_attention': decoder_causal_attention,
    }
    arrays, size = {}, self.config.vocab_size
    for name, ids in given.items():
      if ids is None:
        continue
      array = np.asarray(ids, np.int32)
      if array.ndim != 2 or (array.size and not 0 <= array.min() <= array.max() < size):
        raise UsageError(f'{name} of shape {array.shape} must be ids [B, L] below {size}')
      missing = prediction.padded_length(array.shape[1]) - array.shape[1]
      fill = 0 if name == 'decoder_causal_attention' else self.config.pad_id
      arrays[name] = np.pad(array, ((0, 0), (0, missing)), constant_values=fill)
    return self._call(steps.make_logits_step, arrays)[:, : np.shape(decoder_input_tokens)[1]]

  def save(self, directory: str, *, format: str = 't5x_lite', dtype: str | None = None) -> None:
    """Writes the model into a directory, which must not exist yet, or be empty.

    Formats are 't5x_lite' (a run directory), 'hf' (for from_pretrained of transformers), 't5x',
    'adapter' or 'peft'; see `convert.convert`. Numbers have the dtype of memory by default.
    """
    target = export.check_destination(directory)
    config = self.config.replace(param_dtype=dtype or self.config.param_dtype)
    export.check_target(config, format)
    export.write(target, dataclasses.replace(self._source(), config=config), to=format)

  def grow_vocabulary(self, tokens: Sequence[str] = (), *, extra_ids: int | None = None) -> 'Model':
    """Returns the model with more tokens, or with extra_ids sentinels in all.

    The rows of new tokens begin as the mean of the old ones.
    """
    self._check_vocabulary()
    grown, _ = grow_vocabulary.grow(self._source(), tokens=tokens, extra_ids=extra_ids)
    specs = model_sharding.param_specs(grown.config, self.placement)
    params = tensors.place(grown.tensors, grown.config, specs)
    kept = {'placement': self.placement, 'lengths': self.lengths, 'step': self.step}
    return Model(grown.config, params, grown.vocabulary, **kept)

  def train(self, *, model_dir: str, **arguments: Any) -> 'Model':
    """Trains from these parameters and returns the trained model, which lies where this one lies.

    In model_dir a run that is there is continued. Other arguments are those of `train.train`:
    dataset, optimizer, total_steps, ... With dry_run=True the model itself comes back.
    """
    with progress.quiet_stderr():
      from t5x_lite.programs import train
      from t5x_lite.runs import checkpoints

    vocabulary = self._check_vocabulary()
    with tempfile.TemporaryDirectory(prefix='t5x_lite_') as scratch:
      self.save(f'{scratch}/start')
      checkpoint = arguments.pop('checkpoint', checkpoints.CheckpointConfig())
      arguments['checkpoint'] = dataclasses.replace(checkpoint, restore_path=f'{scratch}/start')
      state = train.train(
        model=self.config, vocabulary=vocabulary, model_dir=model_dir, **arguments
      )
    return self if state is None else self._like_this(model_dir)  # None: dry_run

  def finetune(self, data: Any, *, output: str, validation: Any = (), **arguments: Any) -> 'Model':
    """Fine-tunes on pairs of text and returns the best checkpoint as a model.

    OUTPUT/export is for transformers.

    Args:
      data: files, as for `t5x-lite finetune`; or a list of (input, target) pairs or of dicts, a
        dict of lists, a DataFrame, a `datasets.Dataset`.
      output: the new run's directory; a run that is there is continued.
      validation: as data; a part of that is held out by default.
      **arguments: of `finetune.finetune`, such as epochs=3 or template='summarize: {article}'.
    """
    with progress.quiet_stderr():
      from t5x_lite.programs import finetune

    self._check_vocabulary()
    best = finetune.finetune_rows(data, validation, output=output, save=self.save, **arguments)
    return self._like_this(best)

  def _source(self) -> checkpoint_source.Source:
    numbers = tensors.of_params(self.params, self.config)
    known: Any = {'vocabulary': self.vocabulary_config, 'step': self.step, 'lengths': self.lengths}
    return checkpoint_source.Source('', 't5x_lite', self.config, numbers, **known)

  def _check_vocabulary(self) -> VocabularyConfig:
    if self.vocabulary_config is None:
      raise UsageError('this model came without a vocabulary=...; name it')
    return self.vocabulary_config

  def _like_this(self, path: str) -> 'Model':
    """Loads a run to where this model lies."""
    alone = self.placement.mesh.size == 1
    return load(path, mesh=None if alone else self.placement.config)
