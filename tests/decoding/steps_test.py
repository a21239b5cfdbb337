"""Predictions are the argmax of the full forward pass; scores add up."""

import jax
import numpy as np

from t5x_lite.decoding import steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.models import t5
from tests.models import tiny


def test_greedy_prediction_is_argmax_of_the_full_forward():
  cfg = tiny.config()
  graphdef, _, _ = t5.abstract_params(cfg)
  params = tiny.params(cfg)
  batch = tiny.batch()
  predict = steps.make_predict_step(graphdef, DecodingConfig(max_decode_length=8))
  decoded = jax.jit(predict)(params, {'encoder_input_tokens': batch['encoder_input_tokens']})
  tokens, scores = np.asarray(decoded.tokens_BnL[:, 0]), decoded.scores_Bn[:, 0]
  full = {
    'encoder_input_tokens': batch['encoder_input_tokens'],
    'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
  }
  logits = np.asarray(tiny.apply(cfg, params, '__call__', full))
  for row in range(4):
    ended = np.flatnonzero(tokens[row] == 1)
    n = int(ended[0]) + 1 if len(ended) else 8
    np.testing.assert_array_equal(tokens[row, :n], logits[row, :n].argmax(-1))
    assert (tokens[row, n:] == 0).all()
  scored = dict(
    full,
    decoder_target_tokens=tokens,
    decoder_loss_weights=(np.cumsum(tokens == 1, 1) - (tokens == 1) == 0).astype(np.float32),
  )
  score = jax.jit(steps.make_score_step(graphdef))
  np.testing.assert_allclose(score(params, scored), scores, rtol=1e-4, atol=1e-4)
