import jax
import pytest

from t5x_lite.parallel import logical_axes, partitioning
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import make_placement, single_device


def test_it_is_the_mesh_and_the_rules_of_its_config():
  config = MeshConfig(data=2, fsdp=2, model=2)
  placement = make_placement(config)
  assert placement.mesh == partitioning.make_mesh(config)
  assert placement.rules == partitioning.logical_axis_rules(config)
  assert placement == make_placement(placement.config)
  assert hash(placement) == hash(make_placement(config))
  assert placement != make_placement(MeshConfig(data=4, model=2))


def test_specs_have_the_shardings():
  placement = make_placement(MeshConfig(data=1, fsdp=4, model=2))
  shapes = {'w': jax.ShapeDtypeStruct((16, 8), 'float32')}
  axes = {'w': ('embed', 'mlp')}
  [spec] = jax.tree.leaves(placement.specs(shapes, axes))
  assert (spec.shape, spec.dtype) == ((16, 8), 'float32')
  assert spec.sharding == placement.shardings(shapes, axes)['w']
  assert spec.sharding.shard_shape((16, 8)) == (4, 4)


@pytest.mark.parametrize('size, whole', [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_batches_are_cut_over_data_and_fsdp(size, whole):
  placement = make_placement(MeshConfig(data=2, fsdp=2, model=2))
  assert placement.batch_ways == 4
  assert placement.whole_batch(size) == whole


def test_active_only_inside():
  placement = single_device()
  assert placement.mesh.size == 1
  with placement.active():
    assert logical_axes.active_mesh() == placement.mesh
  assert logical_axes.active_mesh() is None
