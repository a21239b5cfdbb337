"""The export program: a model as compiled-ahead functions that need none of our code.

'jax' writes StableHLO by `jax.export`, the parameters beside it, and a loader of one file that
needs jax alone. 'saved_model' writes TensorFlow's, text in and text out (t5x/export_lib.py).
"""

import importlib.resources
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from etils import epath

from t5x_lite.data import vocabularies
from t5x_lite.decoding import steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError, check_one_of
from t5x_lite.interop import export as formats
from t5x_lite.interop import trained_model
from t5x_lite.interop.trained_model import TrainedModel
from t5x_lite.models import model_sharding, t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees
from t5x_lite.parallel.placement import single_device
from t5x_lite.runs import files

log = logging.getLogger(__name__)

FUNCTIONS = ('generate', 'encode', 'score')
FORMATS = ('jax', 'saved_model')
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
MANIFEST = 'export.json'
LOADER = 'load_exported.py'

Functions = dict[str, Callable[..., Any]]


def export(
  *,
  model: str,
  destination: str,
  to: str = 'jax',
  functions: Sequence[str] = FUNCTIONS,
  input_lengths: Sequence[int] = (64, 512),
  target_length: int = 128,
  platforms: Sequence[str] = ('cpu', 'cuda', 'tpu'),
  dtype: str = '',
  decoding: DecodingConfig | None = None,
) -> str:
  """Writes functions of a model that other programs can call, and returns where.

  UsageError if the model cannot be read or has no such function.

  Args:
    model: a run directory or one STEP directory of its checkpoints, a folder of transformers or
      T5X, or the NAME@REVISION of a model on the hub.
    destination: the directory to write; it must not exist yet.
    to: 'jax' (StableHLO by jax.export, with load_exported.py, which needs jax alone), or
      'saved_model' (TensorFlow's, text in, text out; loading it needs tensorflow_text).
    functions: of 'generate', 'encode' (the encoder's output), 'score' (log-probability of targets).
    input_lengths: tokens; a function is written for each, since a program has fixed lengths, and a
      caller takes the shortest that will do. The number of rows is free.
    target_length: most tokens of an output of 'generate', and of a target of 'score'.
    platforms: that the StableHLO runs on, of 'cpu', 'cuda', 'rocm', 'tpu'.
    dtype: to compute in; the checkpoint's own by default.
    decoding: how 'generate' chooses tokens; greedy by default, its length is target_length.
  """
  check_one_of('export.to', to, FORMATS)
  for function in functions:
    check_one_of('export.functions', function, FUNCTIONS)
  for platform in platforms:
    check_one_of('export.platforms', platform, PLATFORMS)
  if not functions or not input_lengths or min(*input_lengths, target_length) < 1:
    raise UsageError('export needs a function, and lengths of at least 1')
  target = formats.check_destination(destination)
  opened = trained_model.open_model(model, dtype=dtype)
  config = opened.config
  if config.architecture != 'encoder_decoder':
    raise UsageError(f'architecture={config.architecture!r} cannot be exported')
  graphdef, _, _ = t5.abstract_params(config)
  params = opened.load_params(model_sharding.param_specs(config, single_device()))
  vocabulary = vocabularies.make_vocabulary(opened.vocabulary)
  decoding = (decoding or DecodingConfig()).resolved(vocabulary, target_length)
  if decoding.stop_strings or decoding.num_return_sequences > 1:
    raise UsageError('an exported generate has no stop_strings and gives one output an input')
  made = {name: _function(name, graphdef, decoding, config) for name in functions}
  work = target.parent / f'.{target.name}.tmp'
  work.rmtree(missing_ok=True)
  work.mkdir(parents=True)
  vocabularies.save_vocabulary(opened.vocabulary, work)
  if to == 'saved_model':
    lengths = {'inputs': max(input_lengths), 'targets': target_length}
    _write_saved_model(work, opened, params, made, lengths)
  else:
    _write_stablehlo(work, opened, params, made, input_lengths, target_length, platforms)
  if target.is_dir():  # which is empty
    target.rmdir()
  work.rename(target)
  log.info('wrote %s of %s to %s', ', '.join(functions), model, destination)
  return destination


def _function(name: str, graphdef: Any, decoding: DecodingConfig, config: T5Config) -> Callable:
  """Returns function(params, inputs[, targets]) of arrays of ids padded with pad_id."""
  if name == 'generate':
    predict = steps.make_predict_step(graphdef, decoding)

    # The seed as an argument of a sampling model would change its signature.
    def generate(params, inputs):
      found = predict(params, {'encoder_input_tokens': inputs}, jax.random.key(0))
      assert found.scores_Bn is not None
      return found.tokens_BnL[:, 0], found.scores_Bn[:, 0]

    return generate
  if name == 'encode':
    encode = steps.make_encode_step(graphdef)
    return lambda params, inputs: encode(params, {'encoder_input_tokens': inputs})
  score_step = steps.make_score_step(graphdef)

  def score(params, inputs, targets):
    batch = {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': jnp.roll(targets, 1, axis=1).at[:, 0].set(config.decoder_start_id),
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (targets != config.pad_id).astype(jnp.float32),
    }
    return score_step(params, batch)

  return score


def _write_stablehlo(
  work: epath.Path,
  opened: TrainedModel,
  params: Any,
  functions: Functions,
  input_lengths: Sequence[int],
  target_length: int,
  platforms: Sequence[str],
) -> None:
  leaves = pytrees.flatten_names(params)
  (work / 'params.safetensors').write_bytes(safetensors.flax.save(leaves))
  structure = jax.tree.structure(params)
  shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values()]
  [rows] = jax.export.symbolic_shape('rows')
  entries = []
  for name, function in functions.items():

    def of_leaves(leaves, *tokens, function=function):
      return function(jax.tree.unflatten(structure, leaves), *tokens)

    for length in sorted(set(input_lengths)):
      ids = [jax.ShapeDtypeStruct((rows, length), jnp.int32)]
      if name == 'score':
        ids.append(jax.ShapeDtypeStruct((rows, target_length), jnp.int32))
      exported = jax.export.export(jax.jit(of_leaves), platforms=platforms)(shapes, *ids)
      file = f'{name}_{length}.stablehlo'
      (work / file).write_bytes(bytes(exported.serialize()))
      entries.append({'function': name, 'input_length': length, 'file': file})
  # Parameters are in the order of the functions' first argument.
  manifest = {'functions': entries, 'params': list(leaves), 'target_length': target_length}
  manifest |= {name: getattr(opened.config, name) for name in ('pad_id', 'eos_id')}
  files.write_json(work / MANIFEST, manifest)
  loader = importlib.resources.files('t5x_lite.interop').joinpath(LOADER)
  (work / LOADER).write_text(loader.read_text())


def _write_saved_model(
  work: epath.Path, opened: TrainedModel, params: Any, functions: Functions, lengths: dict[str, int]
) -> None:
  import tensorflow as tf
  from jax.experimental import jax2tf

  from t5x_lite.data.tasks.seqio_vocabulary import to_seqio

  if opened.vocabulary.kind == 'passthrough':
    raise UsageError("a SavedModel takes text, which kind='passthrough' has none of: to='jax'")
  vocabulary = to_seqio(opened.vocabulary)
  module: Any = tf.Module()
  module.weights = tf.nest.map_structure(lambda x: tf.Variable(tf.constant(np.asarray(x))), params)
  eos, pad = [opened.config.eos_id], opened.config.pad_id

  def tokens(texts: Any, length: int) -> Any:
    def encode(text: Any) -> Any:
      return tf.concat([vocabulary.encode_tf(text)[: length - 1], eos], 0)

    row = tf.RaggedTensorSpec([None], tf.int32)
    return tf.map_fn(encode, texts, fn_output_signature=row).to_tensor(pad, shape=[None, length])

  def named(name: str, result: Any) -> dict[str, Any]:
    if name != 'generate':
      return {{'encode': 'encoded', 'score': 'log_probs'}[name]: result}
    ids, log_probs = result
    return {'outputs': vocabulary.decode_tf(ids), 'tokens': ids, 'log_probs': log_probs}

  signatures = {}
  for name, function in functions.items():
    texts = ('inputs', 'targets') if name == 'score' else ('inputs',)
    shapes = [None, *['rows, _'] * len(texts)]
    converted = jax2tf.convert(function, polymorphic_shapes=shapes, with_gradient=False)

    def call(*given, name=name, converted=converted, texts=texts):
      ids = [tokens(text, lengths[key]) for key, text in zip(texts, given, strict=True)]
      return named(name, converted(module.weights, *ids))

    specs = [tf.TensorSpec([None], tf.string, name=key) for key in texts]
    signatures[name] = tf.function(call, input_signature=specs, autograph=False)
  signatures['serving_default'] = next(iter(signatures.values()))
  tf.saved_model.save(module, str(work), signatures=signatures)
