"""The architectures of the T5 paper's table 2, with both objectives."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from t5x_lite.compiler import flops
from t5x_lite.interop import checkpoint_source
from t5x_lite.models import t5
from t5x_lite.models.config import named_config
from t5x_lite.programs.train import train
from tests import tiny_run

# Row: changes to the model, how it reads examples, what it costs beside the
# paper's: parameters in P (a stack of Base), FLOPs in M (those of two stacks).
ROWS = {
  'encoder-decoder': ({}, 'enc_dec', 2, 1),
  'encoder-decoder shared': ({'share_encoder_decoder': True}, 'enc_dec', 1, 1),
  'half the layers': ({'num_encoder_layers': 6, 'num_decoder_layers': 6}, 'enc_dec', 1, 0.5),
  'language model': ({'architecture': 'decoder'}, 'lm', 1, 1),
  'prefix LM': ({'architecture': 'decoder'}, 'prefix_lm', 1, 1),
}


def cost(changes):
  """Returns parameters and FLOPs of Base on 512 + 512 tokens, without the vocabulary's."""
  config = named_config('t5_1_0_base').replace(**changes)
  _, params, _ = t5.abstract_params(config)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  inputs, targets = (512, 512) if config.has_encoder else (0, 1024)
  found = flops.forward_flops(config, batch_size=1, inputs=inputs, targets=targets)
  head = 2 * targets * config.emb_dim * config.vocab_size
  return count - config.vocab_size * config.emb_dim, found - head


@pytest.mark.parametrize('row', ROWS)
def test_parameters_and_flops_are_the_papers(row):
  """P, 2P, M and M/2 hold but for cross-attention, which the paper does not count.

  It adds a third to the parameters of a decoder's layer. So 2P is 2.34 P, a
  shared stack or two of half the layers 1.33 and 1.17 P.
  """
  changes, _, parameters, compute = ROWS[row]
  stack, _ = cost({'architecture': 'decoder'})
  _, whole = cost({})
  count, found = cost(changes)
  assert 1 <= count / (parameters * stack) < 1.35
  assert 0.8 < found / (compute * whole) < 1.05


@pytest.mark.slow
@pytest.mark.parametrize(
  ('row', 'objective'),
  [
    ('encoder-decoder', 'denoising'),
    ('encoder-decoder', 'LM'),
    # The rows below are read as the one above, by another model.
    ('encoder-decoder shared', 'denoising'),
    ('language model', 'denoising'),
    ('language model', 'LM'),
    ('prefix LM', 'denoising'),
    ('prefix LM', 'LM'),
  ],
)
def test_every_architecture_trains_with_both_objectives(row, objective, tmp_path):
  changes, converter, _, _ = ROWS[row]
  task = 'shakespeare_iid_denoising' if objective == 'denoising' else 'shakespeare_prefix_lm'
  lengths = {'inputs': 32, 'targets': 32}
  if (row, objective) == ('language model', 'LM'):
    task, lengths = 'shakespeare_full_lm', {'targets': 32}
  data = dict(feature_converter=converter, task_feature_lengths=lengths)
  decoded = tiny_run.dataset('language_id', pack=False, split='validation')
  state = train(
    **tiny_run.arguments(
      tmp_path,
      model=tiny_run.model(**changes),
      dataset=tiny_run.dataset(task, **data),
      infer_eval=[dataclasses.replace(decoded, feature_converter=converter)],
      infer_eval_examples=3,
      total_steps=2,
    )
  )
  saved = checkpoint_source.open_source(str(tmp_path)).config
  assert saved.bidirectional_prefix == (converter == 'prefix_lm')
  assert (tmp_path / 'infer_eval/language_id/2.jsonl').exists()
  assert state is not None and int(state.step) == 2
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
