"""What a model in memory says: generated outputs, and scores of given ones; base of `api.Model`."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite.data import model_inputs
from t5x_lite.data.vocabularies import Vocabulary, VocabularyConfig
from t5x_lite.decoding import prediction, steps
from t5x_lite.decoding.config import decoding_config
from t5x_lite.decoding.processors import Processor
from t5x_lite.errors import UsageError, check_positive
from t5x_lite.models import model_sharding
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.placement import Placement
from t5x_lite.runs import run_directory

# Relative positions reach as far as one likes, memory does not.
MAX_INPUT_TOKENS = 1024

Texts = str | Sequence[str]
Rows = Sequence[Sequence[int]]
Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


@dataclasses.dataclass(eq=False, repr=False)
class Generation:
  """Needs a config, parameters, a placement, and a vocabulary for texts."""

  config: T5Config
  params: Any
  placement: Placement
  vocabulary: Vocabulary | None = None
  vocabulary_config: VocabularyConfig | None = None
  lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def generate(
    self,
    inputs: Texts | Ids,
    *,
    max_new_tokens: int = 128,
    max_input_tokens: int = MAX_INPUT_TOKENS,
    batch_size: int = 32,
    seed: int | Sequence[int] = 0,
    temperature: float | Sequence[float] = 0.0,
    prefix: Any = None,
    processors: Sequence[Processor] = (),
    bidirectional_prefix: bool | None = None,
    draft: 'Generation | None' = None,
    return_scores: bool = False,
    return_log_probs: bool = False,
    **settings: Any,
  ) -> Any:
    """Generates an output for each input, or several.

    Args:
      inputs: texts (EOS is added for an encoder, or where `lengths` says that training had inputs)
        or ids as they are; a decoder continues them.
      max_new_tokens: most tokens an output, EOS included.
      max_input_tokens: longer inputs are cut, and a warning counts them.
      batch_size: inputs decoded at a time.
      seed: of sampling; or one for each input, whatever batch it is in.
      temperature: 0 is greedy; or one for each input.
      prefix: what outputs begin with, a text or ids for all or for each input; of a model with an
        encoder. It is returned with them, and does not count for length and score.
      processors: functions (logits_RV, history) -> logits_RV, see decoding/processors.py; each must
        be one object from call to call, or everything is compiled again.
      bidirectional_prefix: a decoder's, instead of the config's.
      draft: a smaller model of the same vocabulary that proposes tokens: see docs/generation.md.
      return_scores: return (outputs, scores); a score is the sum of the log-probabilities, of beams
        and best_of divided as `DecodingConfig.normalization` says.
      return_log_probs: also return, last, the log-probabilities of the tokens, EOS included.
      **settings: fields of DecodingConfig, such as num_beams=4, top_p=0.9, no_repeat_ngram_size=3,
        labels=['yes', 'no']; greedy by default.

    Returns:
      Texts for texts, lists of ids without EOS for ids; one alone if the input was one text. With
      num_return_sequences above 1, a list of so many each.
    """
    temperatures = np.asarray(temperature).tolist() if np.ndim(temperature) else None
    settings['temperature'] = temperature if temperatures is None else max(temperatures, default=0)
    if temperatures and not min(temperatures) >= 0:
      raise UsageError(f'temperature has {min(temperatures)}; it must be 0 (greedy) or positive')
    config = decoding_config(max_new_tokens, **settings)
    config = config.resolved(self.vocabulary, prefixed=prefix is not None)
    is_text = model_inputs.is_text(inputs)
    check_positive('batch_size', batch_size)
    eos = self.config.has_encoder or 'inputs' in self.lengths
    rows = self._rows(inputs, eos=eos, limit=max_input_tokens)
    seeds = np.asarray(seed).tolist() if np.ndim(seed) else None
    prefixes = None if prefix is None else self._prefixes(prefix, len(rows))
    for name, given in (('seed', seeds), ('temperature', temperatures)):
      if given is not None and len(given) != len(rows):
        raise UsageError(f'generate got {len(rows)} inputs and {len(given)} of {name}')
    # Few sizes, temperatures and limits by row, so that what is compiled serves the next call too.
    config = dataclasses.replace(config, max_decode_length=prediction.padded_length(max_new_tokens))
    if config.temperature:
      temperatures = temperatures or [config.temperature] * len(rows)
      config = dataclasses.replace(config, temperature=1.0)
    size = min(batch_size, prediction.padded_length(len(rows), shortest=1))
    model = self.config
    if bidirectional_prefix is not None:
      model = model.replace(bidirectional_prefix=bidirectional_prefix)
    pair: Any = self.vocabulary_config, draft and draft.vocabulary_config
    if None not in pair and not run_directory.same_vocabulary(*pair):
      raise UsageError('the draft has another vocabulary: its tokens mean something else')
    predictor = prediction.Predictor(
      model,
      placement=self.placement,
      decoding=config,
      batch_size=size,
      max_input_length=prediction.padded_length(max(map(len, rows))),
      seed=0 if isinstance(seed, Sequence | np.ndarray) else seed,
      scored=return_scores or return_log_probs,
      extra=tuple(processors),
      draft=draft.config if draft else None,
    )
    params = (self.params, draft.params) if draft else self.params
    each: dict[str, Any] = {'prefixes': prefixes, 'seeds': seeds, 'temperatures': temperatures}
    found: list[list[prediction.Output]] = []
    for index, start in enumerate(range(0, len(rows), size)):
      part = slice(start, start + size)
      given = {name: values and values[part] for name, values in each.items()}
      found += predictor.predict_all(params, rows[part], index=index, limit=max_new_tokens, **given)

    def read(row: int, output: prediction.Output) -> Any:
      tokens = [*(prefixes[row] if prefixes else ()), *output.tokens]
      if not is_text:
        return tokens
      assert self.vocabulary is not None
      text = self.vocabulary.decode(tokens)
      given = self.vocabulary.decode(prefixes[row]) if prefixes else ''
      return config.cut(text, len(given) if text.startswith(given) else 0)

    def result(of: Callable[[int, prediction.Output], Any]) -> Any:
      each = [[of(i, output) for output in outputs] for i, outputs in enumerate(found)]
      each = each if config.num_return_sequences > 1 else [outputs[0] for outputs in each]
      return each[0] if isinstance(inputs, str) else each

    results = [result(read)]
    for name, wanted in (('score', return_scores), ('log_probs', return_log_probs)):
      if wanted:
        results.append(result(lambda _, output, name=name: getattr(output, name)))
    return results[0] if len(results) == 1 else tuple(results)

  def _prefixes(self, prefix: Any, count: int) -> list[list[int]]:
    """Returns the ids that each output begins with."""
    if not self.config.has_encoder:
      raise UsageError('without an encoder the input itself is the prefix: leave out prefix=...')
    if isinstance(prefix, str) or (len(prefix) and isinstance(prefix[0], int | np.integer)):
      prefix = [prefix] * count
    rows = self._rows(prefix, eos=False)
    if len(rows) != count:
      raise UsageError(f'generate got {count} inputs and {len(rows)} prefixes')
    return rows

  def encode(
    self,
    inputs: Texts | Ids,
    *,
    pooling: str | None = None,
    max_input_tokens: int = MAX_INPUT_TOKENS,
  ) -> np.ndarray:
    """Returns the encoder's output for texts (EOS is added), or ids as they are.

    Pooling None returns every position, [B, M, D]; 'mean' the mean over real positions, [B, D]
    (Sentence-T5's choice); 'first' the first position. Inputs of more than max_input_tokens are
    cut, and a warning counts them.
    """
    if not self.config.has_encoder:
      raise UsageError("architecture='decoder' has no encoder")
    if pooling not in steps.POOLINGS:
      raise UsageError(f"pooling is {pooling!r}; allowed are None, 'mean', 'first'")
    rows = self._rows(inputs, limit=max_input_tokens)
    shape = np.shape(inputs) if isinstance(inputs, np.ndarray) else ()
    length = shape[1] if len(shape) == 2 else max(map(len, rows))
    length = min(length, max_input_tokens)
    batch = {'encoder_input_tokens': self._padded(rows, length)}
    encoded = self._call(steps.make_encode_step, batch, pooling)
    return encoded[:, :length] if pooling is None else encoded

  def score(
    self,
    inputs: Texts | Ids | None,
    targets: Texts | Ids,
    *,
    max_input_tokens: int = MAX_INPUT_TOKENS,
    batch_size: int = 32,
    length_normalized: bool = False,
  ) -> np.ndarray:
    """Returns the log-probability of each target, EOS of texts included.

    Rows, of texts or ids, go in batches of about one length, whatever order they come in; a model
    without an encoder has no inputs, but None. Inputs of more than max_input_tokens are cut with a
    warning, targets refused. length_normalized divides by the number of a target's tokens.
    """
    wanted = self._rows(targets)
    longest = max(map(len, wanted))
    if longest > max_input_tokens:
      raise UsageError(f'a target has {longest} tokens; max_input_tokens is {max_input_tokens}')
    check_positive('batch_size', batch_size)
    read: list[list[int]] = []
    if self.config.has_encoder:
      if inputs is None:
        raise UsageError('score needs inputs: there is an encoder')
      read = self._rows(inputs, limit=max_input_tokens)
      if len(read) != len(wanted):
        raise UsageError(f'score got {len(read)} inputs and {len(wanted)} targets')
    elif inputs is not None:
      raise UsageError('score of a model without an encoder takes no inputs: give None')
    scores = self._score_rows(read or None, wanted, batch_size)
    if length_normalized:
      scores /= np.maximum([len(row) for row in wanted], 1)
    return scores

  def _score_rows(
    self, rows: Rows | None, targets: Rows, batch_size: int, matches: bool = False
  ) -> np.ndarray:
    """Returns what `steps.make_score_step` does of each row of targets, as many for each input."""
    each = len(targets) // len(rows) if rows else 1
    groups = [targets[i : i + each] for i in range(0, len(targets), each)]
    lengths = [(len(rows[i]) if rows else 0, max(map(len, x))) for i, x in enumerate(groups)]
    order = sorted(range(len(groups)), key=lengths.__getitem__)
    scores = np.zeros((len(groups), each, 2)[: 2 + matches], np.float32)
    size = max(1, batch_size // each)
    for start in range(0, len(order), size):
      part = order[start : start + size]
      wanted = [row for i in part for row in groups[i]]
      batch = self._batch(rows and [rows[i] for i in part], wanted)
      real = np.arange(batch['decoder_target_tokens'].shape[1])
      real = real < np.asarray([[len(row)] for row in wanted])
      batch['decoder_loss_weights'] = real.astype(np.float32)
      found = self._call(steps.make_score_step, batch, matches)
      scores[part] = found.reshape(len(part), *scores.shape[1:])
    return scores.reshape(-1, *scores.shape[2:])

  def _batch(self, rows: Rows | None, targets: Rows) -> dict[str, np.ndarray]:
    """Returns a batch of these inputs and targets."""
    tokens = self._padded(targets, max(map(len, targets)))
    shifted = np.roll(tokens, 1, axis=1)
    shifted[:, 0] = self.config.decoder_start_id
    batch = {'decoder_target_tokens': tokens, 'decoder_input_tokens': shifted}
    if rows:
      batch['encoder_input_tokens'] = self._padded(rows, max(map(len, rows)))
    return batch

  def cross_attention(
    self,
    inputs: Texts | Ids,
    targets: Texts | Ids,
    *,
    max_input_tokens: int = MAX_INPUT_TOKENS,
    mean: bool = False,
  ) -> list[np.ndarray]:
    """Returns where the decoder looks in each input while it predicts each target.

    An array [layers, heads, target tokens, input tokens] of each pair, whose last axis adds up to
    1, EOS of texts included; with mean [target tokens, input tokens], over layers and heads.
    """
    if self.config.architecture != 'encoder_decoder':
      raise UsageError(f'architecture={self.config.architecture!r} has no cross-attention')
    rows, wanted = self._rows(inputs, limit=max_input_tokens), self._rows(targets)
    if len(rows) != len(wanted):
      raise UsageError(f'cross_attention got {len(rows)} inputs and {len(wanted)} targets')
    found = self._call(steps.make_attention_step, self._batch(rows, wanted), mean)
    triples = zip(found, wanted, rows, strict=True)
    return [one[..., : len(target), : len(row)] for one, target, row in triples]

  def classify(
    self,
    inputs: Texts | Ids,
    labels: Sequence[Any],
    *,
    max_input_tokens: int = MAX_INPUT_TOKENS,
    batch_size: int = 32,
    length_normalized: bool = False,
    return_scores: bool = False,
  ) -> Any:
    """Returns the label that the model finds likeliest for each input, which is encoded once.

    Every label, a text or a list of ids with EOS, is scored (Brown et al. 2020; rank_classification
    of t5.evaluation.metrics); length_normalized by the log-probability a token, which favours
    longer ones. With return_scores it is (labels, scores [inputs, labels]). The rest is `score`'s,
    batch_size counts pairs.
    """
    if not len(labels) or isinstance(labels, str):
      raise UsageError(f'labels is {labels!r}; give a list of at least one label')
    if not self.config.has_encoder:
      raise UsageError('classify needs an encoder: without one, compare texts by score')
    check_positive('batch_size', batch_size)
    read, wanted = self._rows(inputs, limit=max_input_tokens), self._rows(labels)
    few = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    parts = [self._score_rows(read, part * len(read), batch_size) for part in few]
    scores = np.concatenate([x.reshape(len(read), -1) for x in parts], axis=1)
    if length_normalized:
      scores /= np.maximum([len(row) for row in wanted], 1)
    found: Any = [labels[i] for i in scores.argmax(axis=1)]
    if isinstance(inputs, str):
      found, scores = found[0], scores[0]
    return (found, scores) if return_scores else found

  def perplexity(
    self, inputs: Texts | Ids | None, targets: Texts | Ids, **arguments: Any
  ) -> dict[str, float]:
    """Returns how well the targets are predicted, over all of them together.

    The arguments are those of `score`. What comes back is loss (natural logarithm, a token, EOS of
    texts included), perplexity (its exponential), tokens; of texts also bits_per_byte (UTF-8 bytes
    of the targets, of any vocabulary), bytes.
    """
    total = -float(self.score(inputs, targets, **arguments).sum(dtype=np.float64))
    tokens = sum(map(len, self._rows(targets)))
    loss = total / max(tokens, 1)
    measured = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0)), 'tokens': float(tokens)}
    if model_inputs.is_text(targets):
      texts: Any = [targets] if isinstance(targets, str) else targets
      size = sum(len(text.encode()) for text in texts)
      bits = total / math.log(2.0) / max(size, 1)
      measured |= {'bits_per_byte': bits, 'bytes': float(size)}
    return measured

  def _rows(self, inputs: Any, *, eos: bool = True, limit: int | None = None) -> list[list[int]]:
    ids = {'num_ids': self.config.vocab_size, 'pad_id': self.config.pad_id}
    return model_inputs.token_rows(inputs, self.vocabulary, eos=eos, limit=limit, **ids)

  def _padded(self, rows: Rows, length: int) -> np.ndarray:
    """Returns rows as one array, as wide as the next size compiled for."""
    size = {'batch_size': len(rows), 'length': prediction.padded_length(length)}
    return prediction.pad_rows(rows, pad_id=self.config.pad_id, **size)

  def _call(self, make_step: Any, batch: Mapping[str, np.ndarray], *arguments: Any) -> np.ndarray:
    """Runs a step that steps.py makes of arguments on a batch; whole on every process.

    Inputs are added, so that few sizes compile, and their results (of several rows each) dropped.
    """
    size = min(map(len, batch.values()))
    full = self.placement.whole_batch(prediction.padded_length(size, shortest=1))

    def filled(array: np.ndarray) -> np.ndarray:
      grouped = array.reshape(size, -1, *array.shape[1:])
      more = np.repeat(grouped[:1], full - size, axis=0)
      return np.concatenate([grouped, more]).reshape(-1, *array.shape[1:])

    filled_batch = {name: filled(array) for name, array in batch.items()}
    step = model_sharding.jit_step(make_step, self.config, self.placement, *arguments)
    result = step(self.params, partitioning.global_batch(filled_batch, self.placement.mesh))
    found = prediction.to_host(result)
    return found[: len(found) // full * size]
