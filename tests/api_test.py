"""The Python interface; parity with transformers is interop/hf_test's."""

import jax
import numpy as np
import pytest

import t5x_lite
from t5x_lite import api, errors
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.placement import make_placement
from tests.models import tiny

BYTES = VocabularyConfig(kind='byte')


@pytest.fixture(scope='module')
def model():
  cfg = tiny.config(vocab_size=384, num_heads=8)
  return api.Model(cfg, tiny.params(cfg), BYTES, lengths={'targets': 5})


@pytest.fixture(scope='module')
def language_model():
  cfg = tiny.config(vocab_size=384, architecture='decoder')
  return api.Model(cfg, tiny.params(cfg), BYTES)


@pytest.mark.parametrize('format', ['t5x_lite', 'hf', 't5x'])
def test_saved_and_loaded_it_is_the_same(model, format, tmp_path):
  model.save(str(tmp_path / 'out'), format=format)
  again = t5x_lite.load(str(tmp_path / 'out'))
  assert again.vocabulary_config == BYTES
  assert again.report.summary().endswith('tensors loaded')
  inputs, targets = np.ones((2, 5), int) * 7, np.ones((2, 3), int)
  np.testing.assert_array_equal(again.logits(inputs, targets), model.logits(inputs, targets))
  if format == 't5x_lite':
    assert again.config == model.config
    assert again.lengths == {'targets': 5}
  with pytest.raises(errors.UsageError, match='already there'):
    model.save(str(tmp_path / 'out'))


def test_spread_over_a_mesh_it_is_the_same(model, tmp_path):
  model.save(str(tmp_path / 'out'), format='hf')
  config = partitioning.MeshConfig(data=2, fsdp=2, model=2, parameter_dims=2)
  spread = t5x_lite.load(str(tmp_path / 'out'), mesh=config)
  kernel = spread.params['encoder']['layers']['mlp']['wo']['kernel']
  assert len(kernel.sharding.device_set) == 8
  assert not kernel.sharding.is_fully_replicated
  texts = ['one', 'two', 'three']
  np.testing.assert_allclose(
    spread.encode(texts, pooling='mean'), model.encode(texts, pooling='mean'), atol=1e-5
  )
  assert spread.generate(texts, max_new_tokens=4) == model.generate(texts, max_new_tokens=4)
  spread.save(str(tmp_path / 'again'))
  again = t5x_lite.load(str(tmp_path / 'again'))
  np.testing.assert_array_equal(again.params['encoder']['layers']['mlp']['wo']['kernel'], kernel)


def test_fields_of_the_config_can_be_changed(model, tmp_path):
  model.save(str(tmp_path / 'out'))
  half = t5x_lite.load(
    str(tmp_path / 'out'), dtype='bfloat16', param_dtype='bfloat16', scan_layers=False
  )
  assert half.config.dtype == 'bfloat16'
  kernel = half.params['encoder']['layers'][0]['mlp']['wo']['kernel']
  assert kernel.dtype.name == 'bfloat16'
  with pytest.raises(errors.UsageError, match=r"'dtyp'.*no field of T5Config"):
    t5x_lite.load(str(tmp_path / 'out'), dtyp='bfloat16')


def test_texts_in_texts_out_and_ids_in_ids_out(model):
  texts = ['a few words', 'more']
  outputs = model.generate(texts, max_new_tokens=6)
  assert len(outputs) == 2 and all(isinstance(x, str) for x in outputs)
  assert model.generate(texts[0], max_new_tokens=6) == outputs[0]
  ids = [[*model.vocabulary.encode(t), 1] for t in texts]
  rows = model.generate(ids, max_new_tokens=6)
  assert [model.vocabulary.decode(row) for row in rows] == outputs
  padded = np.zeros((2, 20), int)
  for i, row in enumerate(ids):
    padded[i, : len(row)] = row
  assert model.generate(padded, max_new_tokens=6) == rows
  # Batches only bound memory.
  assert model.generate(ids, max_new_tokens=6, batch_size=1) == rows


def test_sampling_is_repeatable(model):
  options = {'max_new_tokens': 8, 'temperature': 1.0, 'top_k': 50}
  one = model.generate([[5, 6], [7]], seed=1, **options)
  assert one == model.generate([[5, 6], [7]], seed=1, **options)
  assert one != model.generate([[5, 6], [7]], seed=2, **options)
  with pytest.raises(errors.UsageError, match='temperature'):
    model.generate([[5]], temperature=-1.0)


def test_scores_are_those_of_the_outputs(model):
  rows = [[5, 6, 7], [9]]
  outputs, scores = model.generate(rows, max_new_tokens=5, return_scores=True)
  targets = [[*row, 1] if len(row) < 5 else row for row in outputs]
  np.testing.assert_allclose(model.score(rows, targets), scores, rtol=1e-4, atol=1e-4)
  by_hand = model.logits(np.asarray([rows[0]]), np.asarray([[0, *targets[0][:-1]]]))[0]
  log_probs = by_hand - np.log(np.exp(by_hand).sum(-1, keepdims=True))
  total = sum(log_probs[i, t] for i, t in enumerate(targets[0]))
  np.testing.assert_allclose(model.score(rows, targets)[0], total, rtol=1e-4)


def test_pooled_encodings_do_not_see_padding(model):
  one = model.encode('short', pooling='mean')
  both = model.encode(['short', 'very much longer than that'], pooling='mean')
  np.testing.assert_allclose(both[0], one[0], atol=1e-5)
  whole = model.encode('short')
  assert whole.shape == (1, 6, 16)  # five bytes and EOS
  np.testing.assert_allclose(one[0], whole[0].mean(0), atol=1e-5)
  np.testing.assert_array_equal(model.encode('short', pooling='first')[0], whole[0, 0])
  with pytest.raises(errors.UsageError, match="pooling is 'max'"):
    model.encode('short', pooling='max')


@pytest.mark.parametrize('bidirectional', [False, True])
def test_a_language_model_continues(language_model, bidirectional):
  prompts = [[5, 6, 7, 8], [9]]
  outputs, scores = language_model.generate(
    prompts, max_new_tokens=5, bidirectional_prefix=bidirectional, return_scores=True
  )
  # Token by token, each time with the whole sequence.
  for prompt, output, score in zip(prompts, outputs, scores, strict=True):
    tokens, total = [0, *prompt], 0.0
    prefix = np.zeros((1, 16), int)
    prefix[:, : len(tokens)] = bidirectional
    for _ in range(5):
      padded = np.zeros((1, 16), int)
      padded[0, : len(tokens)] = tokens
      logits = language_model.logits(None, padded, decoder_causal_attention=prefix)[
        0, len(tokens) - 1
      ]
      best = int(logits.argmax())
      total += logits[best] - np.log(np.exp(logits).sum())
      if best == 1:
        break
      tokens.append(best)
    assert output == tokens[len(prompt) + 1 :]
    np.testing.assert_allclose(score, total, rtol=1e-3)


def test_what_a_model_cannot_do(model, language_model):
  with pytest.raises(errors.UsageError, match='no encoder'):
    language_model.encode('text')
  with pytest.raises(errors.UsageError, match='needs encoder_input_tokens'):
    model.logits(None, [[1]])
  with pytest.raises(errors.UsageError, match='1 inputs and 2 targets'):
    model.score(['a'], ['b', 'c'])
  with pytest.raises(errors.UsageError, match='outside 0 to 383'):
    model.generate([[400]])
  with pytest.raises(errors.UsageError, match='no input'):
    model.generate([])
  with pytest.raises(errors.UsageError, match="format to write is 'onnx'"):
    model.save('/nowhere', format='onnx')
  mute = api.Model(model.config, model.params)
  with pytest.raises(errors.UsageError, match='without a vocabulary'):
    mute.generate('text')
  assert mute.generate([[5]], max_new_tokens=2)
  with pytest.raises(errors.UsageError, match=r'only T5Config\.vocab_size=384 rows: name another'):
    api.Model(model.config, model.params, VocabularyConfig())


@pytest.mark.slow
def test_training_starts_from_it(tmp_path):
  from tests import tiny_run

  cfg = tiny_run.model(num_heads=4)
  placement = make_placement(partitioning.MeshConfig(data=8))
  start = api.Model(cfg, tiny.params(cfg), BYTES, placement=placement)
  arguments = tiny_run.arguments(tmp_path / 'run', total_steps=2)
  del arguments['model'], arguments['vocabulary']
  assert start.train(**arguments, dry_run=True) is start
  trained = start.train(**arguments)
  assert trained.step == 2
  assert trained.config == cfg
  assert trained.placement == placement
  before = start.params['decoder']['decoder_norm']['scale']
  after = np.asarray(trained.params['decoder']['decoder_norm']['scale'])
  assert 0 < np.abs(before - after).max() < 0.1


def test_new_lengths_batch_sizes_and_temperatures_compile_nothing_new(model):
  compiled = []
  listener = compiled.append
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: listener(name))

  def compilations(call):
    compiled.clear()
    call()
    return sum('backend_compile' in name for name in compiled)

  def use(size, length, temperature):
    texts = ['x' * length] * size
    ids = np.full((size, length), 7)
    model.generate(texts, max_new_tokens=4, temperature=temperature)
    model.score(texts, texts)
    model.encode(texts)
    model.logits(ids, ids)

  assert compilations(lambda: use(3, 9, 1.0)) > 0
  assert compilations(lambda: use(4, 13, 0.7)) == 0
  assert compilations(lambda: use(3, 3, 1.0)) == 0


def test_padding_to_a_size_is_not_seen(model):
  """What has a size of its own gives what its padded form gives."""
  ids = np.arange(3, 3 + 16)[None]
  whole = model.logits(ids, ids)
  assert whole.shape == (1, 16, 384)
  # Causal: the first positions are the same, whatever follows or pads them.
  np.testing.assert_allclose(model.logits(ids, ids[:, :5]), whole[:, :5], atol=1e-5)


def test_twenty_thousand_characters_do_not_kill_the_process(model, caplog):
  text = model.generate(['x' * 20_000], max_new_tokens=2)
  assert len(text) == 1
  assert '1 of 1 inputs are longer than max_input_tokens=1024' in caplog.text
  assert model.encode('y' * 3000).shape[1] == 1024
  with pytest.raises(errors.UsageError, match='a target has 3001 tokens'):
    model.score('a', 'y' * 3000)


def test_wrong_arguments_are_one_clear_error(model):
  for call in (
    lambda: model.generate(5),
    lambda: model.encode(None),
    lambda: model.score('a', 7),
    lambda: model.score(None, 'a'),
    lambda: model.generate('a', num_beams=0),
    lambda: model.generate('a', top_p=0.9),
    lambda: model.generate('a', batch_size=0),
    lambda: model.generate('a', max_new_tokens=0),
  ):
    with pytest.raises(errors.UsageError):
      call()


def test_a_model_says_what_it_is(model):
  shown = repr(model)
  assert 'encoder_decoder' in shown and '384 byte ids' in shown
  assert f'{sum(x.size for x in jax.tree.leaves(model.params)):,}' in shown
