import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from t5x_lite import errors
from t5x_lite.interop import zarr


@pytest.mark.parametrize('use_ocdbt', [True, False])
def test_orbax_items_are_read(use_ocdbt, tmp_path):
  rng = np.random.default_rng(0)
  tree = {
    'a': {'b': rng.random((5, 3)), '0': np.float32(2.5)},
    'c': jax.numpy.ones((4,), 'bfloat16'),
  }
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
    checkpointer.save(tmp_path / 'x', args=ocp.args.PyTreeSave(tree))
  found = zarr.orbax_tensors(epath.Path(tmp_path / 'x'), zarr.Reader())
  assert sorted(found) == ['a.0', 'a.b', 'c']
  np.testing.assert_array_equal(found['a.b'].read(), tree['a']['b'])
  part = (slice(1, 3), slice(2, 3))
  np.testing.assert_array_equal(found['a.b'].read(part), tree['a']['b'][part])
  np.testing.assert_array_equal(found['c'].read(), tree['c'])
  assert found['a.0'].read() == 2.5


def test_chunks_stay_below_their_size(monkeypatch):
  assert zarr.chunk_shape((10, 10), 4) == [10, 10]
  assert zarr.chunk_shape((24, 100, 10), 4, whole_dims=1) == [1, 100, 10]
  assert zarr.chunk_shape((), 4) == []
  monkeypatch.setattr(zarr, 'CHUNK_BYTES', 400)
  assert zarr.chunk_shape((50, 10), 4) == [10, 10]
  assert zarr.chunk_shape((3, 5, 1000), 4) == [1, 1, 100]


def test_arrays_that_are_not_there(tmp_path):
  with pytest.raises(errors.UsageError, match=r'cannot read x: .*no \.zarray'):
    zarr.file_tensor(epath.Path(tmp_path), 'x', zarr.Reader())
  (tmp_path / '.zarray').write_text('{}')
  with pytest.raises(errors.UsageError, match='cannot read x') as caught:
    zarr.file_tensor(epath.Path(tmp_path), 'x', zarr.Reader())
  assert '\n' not in str(caught.value)


def test_urls():
  assert zarr.url('/a/b/') == 'file:///a/b'
  assert zarr.url('gs://bucket/a') == 'gs://bucket/a'


def test_a_lost_chunk_is_no_zero(tmp_path):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
    tree = {'a': np.zeros((2, 3)), 'b': np.ones(4)}
    checkpointer.save(tmp_path / 'x', args=ocp.args.PyTreeSave(tree))
  found = zarr.orbax_tensors(epath.Path(tmp_path / 'x'), zarr.Reader())
  np.testing.assert_array_equal(found['a'].read(), tree['a'])
  (tmp_path / 'x' / 'b' / '0').unlink()
  with pytest.raises(errors.UsageError, match='cannot read b'):
    found['b'].read()
