"""Our logits, gradients and steps against HF's PyTorch T5, 1.0 and 1.1."""

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip('torch')
pytest.importorskip('transformers')

from t5x_lite.models import t5
from t5x_lite.training import losses, optimizers, steps, train_state
from tests.models import tiny
from tests.parity import hf_reference as ref

VERSIONS = ('1.0', '1.1')


@pytest.fixture(scope='module', params=VERSIONS)
def pair(request):
  version = request.param
  model = ref.make_model(version)
  cfg = ref.our_config(version)
  return version, model, cfg, ref.to_params(dict(model.named_parameters()), cfg)


def apply(cfg, params, b):
  graphdef, _, _ = t5.abstract_params(cfg)
  return jax.jit(lambda p, b: nnx.merge(graphdef, p)(b))(params, b)


def test_tree_is_the_models_tree(pair):
  _, _, cfg, params = pair
  _, shapes, _ = t5.abstract_params(cfg)
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes)


def test_logits(pair):
  _, model, cfg, params = pair
  b = ref.batch()
  ours = np.asarray(apply(cfg, params, b))
  theirs = ref.hf_logits(model, b).detach().numpy()
  real = b['decoder_target_tokens'] != 0
  np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4, rtol=0)
  assert np.abs(theirs).max() > 0.5, 'the test would pass on zeros'


def test_cross_attention(pair):
  _, model, cfg, params = pair
  b = ref.batch()
  unrolled = cfg.replace(scan_layers=False), tiny.unstack(params, cfg)
  found = [tiny.apply(*one, 'cross_attention', b) for one in ((cfg, params), unrolled)]
  model.set_attn_implementation('eager')  # the one that gives them
  theirs = ref.hf_outputs(model, b, output_attentions=True).cross_attentions
  theirs = np.stack([one.detach().numpy() for one in theirs], axis=1)
  real = b['decoder_target_tokens'] != 0
  for ours in found:
    assert ours.shape == theirs.shape
    by_token = [x.transpose(0, 3, 1, 2, 4)[real] for x in (np.asarray(ours), theirs)]
    np.testing.assert_allclose(*by_token, atol=1e-5)


def test_gradients(pair):
  _, model, cfg, params = pair
  b = ref.batch()
  model.zero_grad()
  loss = ref.hf_loss(model, b)
  loss.backward()
  theirs = ref.to_params({k: p.grad for k, p in model.named_parameters()}, cfg)
  graphdef, _, _ = t5.abstract_params(cfg)

  def loss_fn(p):
    logits = nnx.merge(graphdef, p)(b)
    ce, _ = losses.cross_entropy_with_logits(logits, b['decoder_target_tokens'])
    w = b['decoder_loss_weights']
    return (ce * w).sum() / w.sum()

  value, ours = jax.jit(jax.value_and_grad(loss_fn))(params)
  np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
  for (path, a), e in zip(
    jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
  ):
    error = np.linalg.norm(a - e) / np.linalg.norm(e)
    assert error < 1e-3, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize('pair', ['1.1'], indirect=True)  # gradients are compared of both
def test_twenty_steps_of_adamw(pair):
  import torch

  version, _, cfg, params = pair
  model = ref.make_model(version)
  opt = torch.optim.AdamW(
    model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
  )
  theirs = []
  for i in range(20):
    opt.zero_grad()
    loss = ref.hf_loss(model, ref.batch(seed=i))
    loss.backward()
    opt.step()
    theirs.append(loss.item())

  config = optimizers.OptimizerConfig(
    name='adamw', weight_decay=0.01, weight_decay_exclude='$^', b1=0.9, b2=0.999, eps=1e-8
  )
  graphdef, shapes, axes = t5.abstract_params(cfg)
  tx = optimizers.make_optimizer(config, axes, shapes)
  step = jax.jit(steps.make_train_step(graphdef, tx, lambda step: 1e-3, losses.LossConfig()))
  params = jax.tree.map(jax.numpy.asarray, params)
  state = train_state.TrainState(jax.numpy.zeros((), 'int32'), params, tx.init(params))
  ours = []
  for i in range(20):
    state, metrics = step(state, ref.batch(seed=i), jax.random.key(0))
    ours.append(float(metrics['loss']))
  np.testing.assert_allclose(ours, theirs, rtol=1e-3)
  assert theirs[-1] < theirs[0]
