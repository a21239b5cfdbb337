import dataclasses
import functools
from typing import Any

import flax
import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data import benchmark_metrics, vocabularies
from t5x_lite.data.rows import packing
from t5x_lite.data.rows.dataset_iterator import DatasetIterator
from t5x_lite.data.tasks import catalog, text_formats
from t5x_lite.decoding import continuous, prediction
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators
from t5x_lite.models import model_sharding, t5
from t5x_lite.programs.generation import Generation
from t5x_lite.training.losses import cross_entropy_with_logits
from tests import tiny_run
from tests.models import tiny


@pytest.fixture(scope='module')
def setting():
  """A model, where it runs and its parameters."""
  cfg = tiny_run.model()
  placement = model_sharding.place_model(cfg)
  params = t5.init_params(cfg, jax.random.key(0))
  return cfg, dict(placement=placement), params


def config(name='language_id_byte', **overrides):
  return tiny_run.dataset(name, split='validation', pack=False, **overrides)


def test_teacher_forced_is_the_mean_over_all_tokens(setting):
  """Padding rows of the last batch weigh nothing."""
  cfg, where, params = setting
  one = config(shuffle=False)
  forced = evaluators.TeacherForced('x', one, cfg, **where, num_steps=2)
  metrics = forced.run(params).metrics
  assert forced.run(params).metrics == metrics

  total = weight = correct = 0.0
  iterator = DatasetIterator(dataclasses.replace(one, num_epochs=1))
  for _ in range(2):
    batch = next(iterator)
    logits = tiny.apply(cfg, params, '__call__', batch)
    targets = batch['decoder_target_tokens']
    loss, _ = cross_entropy_with_logits(logits, targets)
    weights = batch['decoder_loss_weights']
    total += float(np.sum(loss * weights))
    weight += float(weights.sum())
    correct += float(np.sum((np.argmax(logits, -1) == targets) * weights))
  iterator.close()
  assert metrics['loss'] == pytest.approx(total / weight, rel=1e-5)
  assert metrics['perplexity'] == pytest.approx(np.exp(total / weight), rel=1e-4)
  assert metrics['accuracy'] == pytest.approx(correct / weight)
  assert metrics['target_tokens'] == weight
  none = dataclasses.replace(one, drop_remainder=True, batch_size=2**20)
  with pytest.raises(UsageError, match='x has no batch: drop_remainder'):
    evaluators.TeacherForced('x', none, cfg, **where).run(params)


def test_a_mixture_is_evaluated_task_by_task(setting, tmp_path):
  cfg, where, params = setting
  both = evaluators.Evaluators(
    cfg,
    tiny_run.VOCABULARY,
    **where,
    train_eval=[config('quickstart_mixture_byte', shuffle=True)],
    eval_steps=2,
  )
  metrics = both.run(params, 0, str(tmp_path))
  tasks = {'pronounce', 'language_id', 'syllables'}
  assert {name.split('/')[1] for name in metrics} == tasks
  assert both.run(params, 1, str(tmp_path)) == metrics


@flax.struct.dataclass
class Seen(seqio.metrics.Metric):
  """A metric object that shows what it gets."""

  model_output_type: Any = seqio.metrics.ModelOutputType.PREDICTION_WITH_AUX
  seen: Any = None

  @classmethod
  def from_model_output(cls, inputs, model_output, features, target_field_name='targets', **_):
    return cls(seen=(inputs, model_output, features[target_field_name].vocabulary))

  def compute(self):
    inputs, (tokens, aux), vocabulary = self.seen
    assert tokens.shape[0] == len(inputs) == aux['scores'].shape[0]
    decoded = [vocabulary.decode(row.tolist()) for row in tokens]
    return {'characters': sum(map(len, decoded)), 'of_object': float(np.sum(aux['scores']))}


@flax.struct.dataclass
class Unknown(Seen):
  model_output_type: Any = seqio.metrics.ModelOutputType.SCORE_WITH_INTERMEDIATES


def seen_task(task):
  """The task with metrics that show what they get, and what they got."""
  seen = {}

  def postprocess(text, *, example, is_target):
    assert 'inputs_pretokenized' in example
    return ('target' if is_target else 'prediction', text)

  def predict_metric(targets, predictions):
    seen['targets'], seen['predictions'] = targets, predictions
    return {'count': np.int64(len(targets)), 'text': 'not a number'}

  def score_metric(targets, scores):
    seen['scores'] = scores
    return {'mean': float(np.mean(scores))}

  def aux_metric(targets, predictions, aux_values):
    seen['aux'] = aux_values['scores']
    return {'of_function': float(np.sum(seen['aux']))}

  def same(targets, predictions):
    return {'same': float((targets, predictions) == (seen['targets'], seen['predictions']))}

  def likely(targets, scores):
    return {'likely': float(np.mean(scores))}

  passthrough = seqio.metrics.PassthroughLegacyMetric.from_metric_fn
  task = seqio.Task(
    'fake',
    source=task.source,
    preprocessors=task.preprocessors,
    output_features=task.output_features,
    postprocess_fn=postprocess,
    metric_fns=[predict_metric, score_metric, aux_metric],
    metric_objs=[
      passthrough(same, postprocess).empty(),
      seqio.metrics.LegacyMetric.empty(likely, postprocess),
      Seen(),
      Unknown(),
    ],
  )
  return task, seen


def test_decoded_gives_tasks_what_seqio_gives_them(setting):
  """Functions and objects, of predictions, scores and T5X's aux values."""
  cfg, where, params = setting
  one = config()
  task, seen = seen_task(catalog.task_provider(one))
  predictor = prediction.Predictor(
    cfg,
    **where,
    decoding=DecodingConfig(max_decode_length=4),
    batch_size=one.batch_size,
    max_input_length=one.lengths['inputs'],
  )
  decode, slots = (continuous.RowDecoder(predictor, continuous=how) for how in (False, True))
  continuously = evaluators.Decoded('x', task, one, slots, num_examples=11).run(params)
  decoded = evaluators.Decoded('x', task, one, decode, num_examples=11)
  result = decoded.run(params)
  for one_line, other in zip(continuously.lines, result.lines, strict=True):
    assert one_line.pop('score') == pytest.approx(other['score'], rel=1e-5)
    assert one_line == {name: other[name] for name in ('input', 'prediction', 'target')}
  assert continuously.metrics == pytest.approx(result.metrics, rel=1e-5)

  names = {'count', 'mean', 'same', 'likely', 'characters', 'of_function', 'of_object'}
  assert set(result.metrics) == names
  assert result.metrics['count'] == 11 == len(result.lines)
  assert all(kind == 'target' for kind, _ in seen['targets'])
  assert all(kind == 'prediction' for kind, _ in seen['predictions'])
  for line, (_, target), (_, text) in zip(
    result.lines, seen['targets'], seen['predictions'], strict=True
  ):
    assert line['input'].startswith('language: ')
    assert (line['target'], line['prediction']) == (target, text)
  # Scores are the log-probabilities of the references, aux values those of the outputs.
  assert len(seen['scores']) == 11 and max(seen['scores']) < 0
  assert len(seen['aux']) == 11 and max(seen['aux']) < 0
  assert result.metrics['same'] == 1
  assert result.metrics['likely'] == pytest.approx(result.metrics['mean'])
  assert result.metrics['of_object'] == pytest.approx(result.metrics['of_function'])
  assert result.metrics['characters'] == sum(len(line['prediction']) for line in result.lines)
  [failed] = result.failed
  assert 'Unknown' in failed and 'SCORE_WITH_INTERMEDIATES' in failed
  assert decoded.run(params).lines == result.lines

  # A bootstrap draws what objects get as it draws the rest.
  drawn = evaluators.Decoded('x', task, one, decode, num_examples=11, num_bootstrap=20)
  metrics = drawn.run(params).metrics
  for end in ('low', 'high'):
    assert metrics[f'likely_{end}'] == pytest.approx(metrics[f'mean_{end}'])


def test_choices_of_a_task_are_ranked_as_classify_ranks_them(setting):
  """The preprocessor, postprocessor and metric together, beside `Generation.classify`."""
  cfg, where, params = setting
  one = config()
  labels, rows = ['yes', 'no', 'perhaps'], [('a dog', 0), ('two', 1), ('so', 2), ('a cat', 1)]

  def make(split, shuffle_files, seed=None):
    texts, numbers = zip(*rows, strict=True)
    return tf.data.Dataset.from_tensor_slices({'text': [*texts], 'label': [*numbers]})

  formats = {'inputs_format': 'is it {text}?', 'targets_formats': labels}
  rank = functools.partial(benchmark_metrics.rank_classification, num_classes=3)
  task = seqio.Task(
    'ranked',
    source=seqio.FunctionDataSource(make, splits=['validation']),
    preprocessors=[
      functools.partial(text_formats.rank_classification, **formats),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features=catalog.task_provider(one).output_features,
    postprocess_fn=benchmark_metrics.ranked_choice,
    metric_fns=[rank],
  )
  predictor = prediction.Predictor(
    cfg,
    **where,
    decoding=DecodingConfig(max_decode_length=2),
    batch_size=one.batch_size,
    max_input_length=one.lengths['inputs'],
  )
  seqio.TaskRegistry.add_provider('ranked', task)
  try:
    ranked = dataclasses.replace(one, mixture_or_task_name='ranked')
    found = evaluators.Decoded('x', task, ranked, continuous.RowDecoder(predictor)).run(params)
  finally:
    seqio.TaskRegistry.remove('ranked')
  vocabulary = vocabularies.make_vocabulary(tiny_run.VOCABULARY)
  chosen = Generation(cfg, params, where['placement'], vocabulary).classify(
    [f'is it {text}?' for text, _ in rows], labels
  )
  right = [labels[label] == got for (_, label), got in zip(rows, chosen, strict=True)]
  assert not found.failed
  assert found.metrics['accuracy'] == 100.0 * np.mean(right)
  assert set(found.metrics) == {'accuracy', 'mean_3class_f1'}
  trained = text_formats.rank_classification(make('', False), **formats, only_right=True)
  assert [row['targets'].decode() for row in trained.as_numpy_iterator()] == [
    labels[label] for _, label in rows
  ]


def test_scores_are_kept_beside_predictions(setting):
  cfg, where, params = setting
  one = evaluators.Evaluators(
    cfg, tiny_run.VOCABULARY, **where, infer_eval=[config()], infer_eval_examples=8
  )
  [result] = one.results(params)
  assert len(result.lines) == 8 and all(line['score'] < 0 for line in result.lines)


@pytest.mark.parametrize('kind', ['lm', 'prefix_lm'])
def test_a_decoder_writes_what_training_would_call_likeliest(kind):
  """The prompt, read at once into a cache, is what the converter makes of inputs."""
  cfg = tiny_run.model(architecture='decoder', num_decoder_layers=2)
  one = config(feature_converter=kind, batch_size=8)
  params = tiny.params(cfg)
  where = dict(placement=model_sharding.place_model(cfg))
  made = evaluators.Evaluators(cfg, tiny_run.VOCABULARY, **where, infer_eval=[one])
  decoded = made._decoded[0]
  assert decoded.predictor.model.bidirectional_prefix == (kind == 'prefix_lm')
  _, examples = next(iter(decoded._batches))
  rows = [example['inputs'][:32].tolist() for example in examples]
  outputs = [output.tokens for [output] in decoded.predictor.predict_all(params, rows)]
  assert len({*map(tuple, outputs)}) > 1
  # Each token is the likeliest after those before it, in one pass over the whole row.
  ended = [[*output, 1][:16] for output in outputs]
  ragged = {
    name: packing.Ragged.from_arrays([np.asarray(x) for x in values], np.int32)
    for name, values in (('inputs', rows), ('targets', ended))
  }
  converter = one.converter
  packed = packing.pad(converter.prepare(ragged), converter.row_lengths, converter.aligned)
  batch = converter.convert(packed)
  likeliest = np.argmax(tiny.apply(cfg, params, '__call__', batch), -1)
  for row, weights, output in zip(likeliest, batch['decoder_loss_weights'], ended, strict=True):
    assert row[weights > 0].tolist() == output


def test_without_inputs_there_is_nothing_to_decode_from():
  cfg = tiny_run.model(architecture='decoder')
  one = config('shakespeare_full_lm', task_feature_lengths={'targets': 16}, feature_converter='lm')
  with pytest.raises(UsageError, match='shakespeare_full_lm without the length of inputs'):
    evaluators.Evaluators(
      cfg, tiny_run.VOCABULARY, placement=model_sharding.place_model(cfg), infer_eval=[one]
    )


def test_every_task_of_a_mixture_is_evaluated_by_itself(setting):
  cfg, where, _ = setting
  one = config('quickstart_mixture_byte')
  found = evaluators.Evaluators(cfg, tiny_run.VOCABULARY, **where, infer_eval=[one])
  assert sorted(found.names) == ['language_id', 'pronounce', 'syllables']


def test_all_evaluators_report_under_their_kind(setting, tmp_path):
  cfg, where, params = setting
  both = evaluators.Evaluators(
    cfg,
    tiny_run.VOCABULARY,
    **where,
    train_eval=[config()],
    infer_eval=[config()],
    eval_steps=1,
    infer_eval_examples=3,
  )
  metrics = both.run(params, 7, str(tmp_path))
  assert 'eval/language_id/loss' in metrics
  assert 'infer_eval/language_id/accuracy' in metrics
  lines = (tmp_path / 'infer_eval/language_id/7.jsonl').read_text()
  assert len(lines.splitlines()) == 3


def test_names_must_be_distinct():
  evaluators.check_distinct(['a', 'b'])
  with pytest.raises(UsageError, match='a is to be evaluated twice'):
    evaluators.check_distinct(['a', 'b', 'a'])


def test_large_sets_are_not_kept(monkeypatch):
  monkeypatch.setattr(evaluators, 'CACHED_ROWS', 6)
  reads = []

  def make(num):
    reads.append(num)
    return iter(range(num))

  small = evaluators._Cached(lambda: make(3), 2)
  large = evaluators._Cached(lambda: make(4), 2)
  for cached in (small, large):
    assert list(cached) == list(cached)
  assert reads == [3, 4, 4]
  partly = evaluators._Cached(lambda: make(3), 2)
  next(iter(partly))
  assert list(partly) == [0, 1, 2]
