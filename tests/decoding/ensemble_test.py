"""Several models that write together: the mean of their log-probabilities."""

import json

import jax
import numpy as np
import pytest
from scipy import special

from t5x_lite import main
from t5x_lite.decoding import steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.programs import evaluate
from tests import tiny_run
from tests.models import tiny


def members(count, **settings):
  cfg = tiny.config()
  graphdef, _, _ = t5.abstract_params(cfg)
  params = tuple(t5.init_params(cfg, jax.random.key(seed)) for seed in range(count))
  inputs = {'encoder_input_tokens': tiny.batch()['encoder_input_tokens']}
  predict = jax.jit(
    steps.make_predict_step(graphdef, DecodingConfig(max_decode_length=8, **settings))
  )
  return (
    cfg,
    params,
    inputs,
    lambda params: [np.asarray(x)[:, 0] for x in predict(params, inputs)[:2]],
  )


def test_tokens_and_scores_are_of_the_mean_written_out():
  cfg, params, inputs, predict = members(3)
  tokens, scores = predict(params)
  full = {**inputs, 'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]}
  logits = [np.asarray(tiny.apply(cfg, one, '__call__', full), np.float64) for one in params]
  mean = special.log_softmax(
    np.mean([special.log_softmax(one, axis=-1) for one in logits], axis=0), axis=-1
  )
  # Which is what the mean of the logits gives, as in the paper.
  np.testing.assert_allclose(mean, special.log_softmax(np.mean(logits, axis=0), -1), atol=1e-6)
  for row in range(len(tokens)):
    ended = np.flatnonzero(tokens[row] == cfg.eos_id)
    n = int(ended[0]) + 1 if len(ended) else 8
    np.testing.assert_array_equal(tokens[row, :n], mean[row, :n].argmax(-1))
    assert scores[row] == pytest.approx(mean[row, :n].max(-1).sum(), abs=1e-4)
  alone = [predict(one)[0] for one in params]
  assert not all(np.array_equal(tokens, one) for one in alone)


@pytest.mark.parametrize('settings', [{}, {'num_beams': 3}])
def test_equal_models_write_what_one_does(settings):
  _, params, _, predict = members(1, **settings)
  tokens, scores = predict((params[0],) * 3)
  expected, single = predict(params[0])
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_allclose(scores, single, rtol=1e-5)


def test_targets_are_scored_by_the_mean():
  cfg, params, _, _ = members(2)
  graphdef, _, _ = t5.abstract_params(cfg)
  batch = tiny.batch()
  score = jax.jit(steps.make_score_step(graphdef))(params, batch)
  logits = [np.asarray(tiny.apply(cfg, one, '__call__', batch), np.float64) for one in params]
  mean = special.log_softmax(np.mean(logits, axis=0), axis=-1)
  targets = np.asarray(batch['decoder_target_tokens'])
  found = np.take_along_axis(mean, targets[..., None], -1)[..., 0]
  weights = np.asarray(batch.get('decoder_loss_weights', targets > 0), np.float64)
  np.testing.assert_allclose(score, (found * weights).sum(-1), rtol=1e-4, atol=1e-4)


def infer(tmp_path, *models):
  output = tmp_path / 'out.jsonl'
  words = ['--input', str(tmp_path / 'in.txt'), '--output', str(output), '--overwrite']
  assert main.main(['infer', '--model', *map(str, models), *words]) == 0
  return [json.loads(line) for line in output.read_text().splitlines()]


def test_infer_takes_several_models(tmp_path, capsys):
  for seed, name in enumerate('ab'):
    tiny_run.save_untrained(tmp_path / name, seed=seed)
  (tmp_path / 'in.txt').write_text('one\ntwo\n')
  a, b = tmp_path / 'a', tmp_path / 'b'
  alone, twice, both = infer(tmp_path, a), infer(tmp_path, a, a), infer(tmp_path, a, b)
  for one, two in zip(alone, twice, strict=True):
    assert one['prediction'] == two['prediction']
    assert one['score'] == pytest.approx(two['score'], rel=1e-4)
  assert [line['score'] for line in both] != [line['score'] for line in alone]
  tiny_run.save_untrained(tmp_path / 'wide', emb_dim=32)
  words = ['--input', str(tmp_path / 'in.txt'), '--output', '-']
  assert main.main(['infer', '--model', str(a), str(tmp_path / 'wide'), *words]) == 2
  assert 'wide has another architecture than' in capsys.readouterr().err


def test_eval_takes_several_models(tmp_path):
  for seed, name in enumerate('ab'):
    tiny_run.save_untrained(tmp_path / name, seed=seed)
  models = [str(tmp_path / name) for name in 'ab']
  settings = dict(datasets=[tiny_run.dataset(split='test')], num_examples=8)
  with pytest.raises(UsageError, match='name a directory with --output'):
    evaluate.evaluate(model_dir=models, **settings)
  found = evaluate.evaluate(model_dir=models, output=str(tmp_path / 'out'), **settings)
  assert 'phoneme_error_rate' in found['pronounce']
  assert not any(name.startswith('eval/') for name in found['pronounce'])
  saved = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
  assert all(model in saved['checkpoint'] for model in models)
