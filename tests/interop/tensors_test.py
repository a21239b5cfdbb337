import jax
import numpy as np
import pytest

from t5x_lite.interop import tensor_names, tensors
from t5x_lite.models import t5
from t5x_lite.parallel import logical_axes, partitioning
from t5x_lite.parallel.partitioning import MeshConfig
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
  config = MeshConfig(data=2, fsdp=2, model=2, parameter_dims=2)
  mesh = partitioning.make_mesh(config)
  rules = partitioning.logical_axis_rules(config)
  _, shapes, axes = t5.abstract_params(cfg)
  shardings = logical_axes.shardings(shapes, axes, mesh, rules)
  placed = tensors.place(found, cfg, shardings)
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
