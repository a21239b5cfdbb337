import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.interop import tensor_names, tensors
from t5x_lite.models import model_sharding
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import make_placement
from tests.models import tiny


def same(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


def test_parts_of_turned_and_cut_tensors():
  array = np.arange(24.0).reshape(2, 3, 4)
  tensor = tensors.of_array(array)
  layer = tensor.layer(1, 2)
  assert layer.shape == (2, 4)
  np.testing.assert_array_equal(layer.read(), array[:, 2])
  turned = layer.transposed()
  index = (slice(1, 3), slice(0, 1))
  np.testing.assert_array_equal(turned.read(index), array[:, 2].T[index])


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('to_scan_layers', [True, False])
def test_params_come_back_whole_whatever_the_form(scan_layers, to_scan_layers):
  cfg = tiny.config(scan_layers=scan_layers)
  found = tensors.of_params(tiny.params(cfg), cfg)
  other = cfg.replace(scan_layers=to_scan_layers)
  placed = tensors.place(found, other)
  again = tensors.of_params(placed, other)
  assert found.keys() == again.keys() == tensor_names.shapes(cfg).keys()
  for name, tensor in found.items():
    np.testing.assert_array_equal(tensor.read(), again[name].read())


def test_no_device_gets_more_than_its_share():
  cfg = tiny.config(num_heads=8, vocab_size=128)
  params = tiny.params(cfg)
  reads = []

  def spied(tensor):
    def fetch(index):
      part = tensor.fetch(index)
      reads.append(part.size)
      return part

    return tensors.Tensor(tensor.shape, tensor.dtype, fetch, tensor.origin)

  found = {n: spied(t) for n, t in tensors.of_params(params, cfg).items()}
  placement = make_placement(MeshConfig(data=2, fsdp=2, model=2, parameter_dims=2))
  placed = tensors.place(found, cfg, model_sharding.param_specs(cfg, placement))
  assert same(placed, params)
  for leaf in jax.tree.leaves(placed):
    cut = leaf.sharding.shard_shape(leaf.shape)
    assert all(s.data.shape == cut for s in leaf.addressable_shards)
  table = placed['token_embedder']['embedding']
  assert table.addressable_shards[0].data.size * 4 == table.size
  # The two data replicas share one read; the table is never read whole.
  assert max(reads) == table.size // 4
  assert sum(reads) == sum(t.size for t in found.values())


def test_dtypes_are_cast_on_the_way():
  cfg = tiny.config()
  found = tensors.of_params(tiny.params(cfg), cfg)
  placed = tensors.place(found, cfg.replace(param_dtype='bfloat16'))
  assert {x.dtype.name for x in jax.tree.leaves(placed)} == {'bfloat16'}


@pytest.mark.parametrize('shape', [(), (7,), (10, 3), (3, 50), (5, 4, 2)])
@pytest.mark.parametrize('limit', [1, 8, 30, 1000])
def test_blocks_cover_everything_once(shape, limit):
  seen = np.zeros(shape, int)
  for index in tensors.blocks(shape, limit):
    part = seen[index]
    assert part.size <= max(limit, int(np.prod(shape[1:])))
    seen[index] += 1
  assert (seen == 1).all()


def test_a_channel_is_off_by_half_a_step():
  for axis in (1, 2):  # of a kernel, of the embedding
    weights = np.random.default_rng(0).standard_normal((3, 8, 6)).astype(np.float32)
    weights[1] *= 1000.0
    weights[0, :, 2] = 0.0
    weights[0, 3] = 0.0
    found = tensors.quantize(jnp.asarray(weights), axis)
    step = np.abs(weights).max(axis=axis, keepdims=True) / 127
    assert found.values.dtype == jnp.int8 and found.scales.shape == step.shape
    assert np.all(np.abs(found[...] - weights) <= 0.5001 * step)
    assert np.all(np.asarray(found.values)[weights == 0] == 0)
    assert found.values.max() == 127 and found.size == weights.size


def test_logits_lose_little(tmp_path):
  # Wide enough that errors of single weights average out.
  cfg = tiny.config(emb_dim=128, mlp_dim=256, num_encoder_layers=1, num_decoder_layers=1)
  t5x_lite.new(cfg).save(f'{tmp_path}/model')
  batch = tiny.batch()
  inputs, tokens = batch['encoder_input_tokens'], batch['decoder_input_tokens']
  logits, models = {}, {}
  for weights in ('float32', 'bfloat16', 'int8'):
    models[weights] = t5x_lite.load(f'{tmp_path}/model', param_dtype=weights)
    logits[weights] = models[weights].logits(inputs, tokens)
  norm = np.linalg.norm(logits['float32'])
  lost = {name: np.linalg.norm(x - logits['float32']) / norm for name, x in logits.items()}
  assert 0 < lost['bfloat16'] < 0.01 and 0 < lost['int8'] < 0.02, lost

  eight = models['int8']
  assert '(int8)' in repr(eight)
  size = sum(x.nbytes for x in jax.tree.leaves(eight.params))
  assert size < 0.3 * sum(x.nbytes for x in jax.tree.leaves(models['float32'].params))
  outputs = eight.generate([[5, 6, 7, 1], [9, 1]], max_new_tokens=4, num_beams=2)
  assert len(outputs) == 2 and all(map(len, outputs))
  for dtype in (None, 'float32'):
    with pytest.raises(
      UsageError, match=r"param_dtype is 'int8'; it must be another: 'int8' is for load"
    ):
      eight.save(f'{tmp_path}/again', dtype=dtype)
  with pytest.raises(UsageError, match=r"param_dtype is 'int8'"):
    t5x_lite.new(eight.config)


def test_layers_read_what_the_bits_stand_for():
  cfg = tiny.config(
    num_encoder_layers=1,
    num_decoder_layers=1,
    logits_via_embedding=True,
    scan_layers=False,
    relpos_per_layer=True,
    lora_rank=2,
  )
  found = tensors.of_params(tiny.params(cfg), cfg)
  params = tensors.place(found, cfg.replace(param_dtype='int8'))
  kept = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, tensors.Int8))
  assert all(x.size <= 256 for x in kept if not isinstance(x, tensors.Int8))
  same = jax.tree.map(lambda x: x[...], params, is_leaf=lambda x: isinstance(x, tensors.Int8))
  batch = tiny.batch()
  inputs, tokens = batch['encoder_input_tokens'], batch['decoder_input_tokens']
  logits = [t5x_lite.Model(cfg, one).logits(inputs, tokens) for one in (params, same)]
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
