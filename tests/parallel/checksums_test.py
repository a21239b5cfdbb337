import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite.errors import DamagedError
from t5x_lite.parallel import checksums

DTYPES = ('float32', 'bfloat16', 'float16', 'int32', 'uint8', 'bool')


def draw(shape, dtype, seed=0):
  values = np.random.default_rng(seed).normal(size=shape) * 100
  return np.asarray(jnp.asarray(values).astype(dtype))


def by_hand(array):
  """The definition, one element at a time."""
  if array.dtype == bool:
    array = array.astype(np.uint8)
  bits = array.reshape(-1).view(f'u{array.dtype.itemsize}')
  return sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32


def of_rows(array, start=None, stop=None):
  """What rows from start to stop, all by default, add."""
  index = (slice(start, stop), *[slice(None)] * (array.ndim - 1))[: array.ndim]
  return checksums.of_part(array[index], array.shape, index)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(), (7,), (3, 5), (2, 3, 4)])
def test_device_host_and_definition_agree(shape, dtype):
  array = draw(shape, dtype)
  wanted = by_hand(array)
  [found] = checksums.of_tree({'x': jnp.asarray(array)}).values()
  assert found == wanted
  assert of_rows(array) == wanted


def test_blocks_add_up():
  array = draw((6, 8), 'float32')
  total = sum(of_rows(array, a, a + 2) for a in (0, 2, 4))
  assert total % 2**32 == by_hand(array)
  # Rows of a layer, as of a stack that is written layer by layer.
  array = draw((2, 6, 4), 'float32')
  parts = itertools.product((0, 1), (0, 2, 4))
  blocks = [(slice(i, i + 1), slice(a, a + 2), slice(None)) for i, a in parts]
  total = sum(checksums.of_part(array[index], array.shape, index) for index in blocks)
  assert total % 2**32 == by_hand(array)


def test_it_does_not_depend_on_the_mesh():
  array = draw((16, 8), 'bfloat16')
  mesh = jax.make_mesh((4, 2), ('a', 'b'))
  found = set()
  for spec in (PartitionSpec(), PartitionSpec('a'), PartitionSpec('b', 'a')):
    placed = jax.device_put(array, NamedSharding(mesh, spec))
    found |= set(checksums.of_tree({'x': placed}).values())
  assert found == {by_hand(array)}


def test_names_are_those_on_disk():
  tree = {'params': {'a': {'b': jnp.ones(2)}}, 'step': jnp.asarray(3)}
  assert set(checksums.of_tree(tree)) == {'params.a.b', 'step'}


def test_every_bit_and_every_place_counts():
  array = draw((4, 4), 'float32')
  whole = by_hand(array)
  for i, bit in itertools.product(range(16), range(32)):
    changed = array.copy()
    changed.reshape(-1).view(np.uint32)[i] ^= np.uint32(1 << bit)
    assert of_rows(changed) != whole
  assert of_rows(array[::-1]) != whole


def test_large_arrays_wrap_alike():
  # Places beyond 2**32 count modulo it.
  shape = (1 << 20, 1 << 16)
  part = draw((1, 3), 'float32')
  place = ((1 << 19) * shape[1] + 5) % 2**32
  pairs = enumerate(part.view(np.uint32)[0], start=place)
  total = sum(int(bits) * (2 * at + 1) for at, bits in pairs)
  index = slice(1 << 19, (1 << 19) + 1), slice(5, 8)
  assert checksums.of_part(part, shape, index) == total % 2**32


def test_signed_json(tmp_path):
  path = epath.Path(tmp_path) / 'x'
  entry = checksums.signed({'a': 1, 'b': {'c': [1.5, None]}})
  path.write_text(json.dumps(entry))
  assert checksums.read_signed(path) == entry
  for changed in ({**entry, 'a': 2}, {'a': 1}, [1]):
    path.write_text(json.dumps(changed))
    with pytest.raises(DamagedError, match='x is not as it was written'):
      checksums.read_signed(path)
  path.write_text('{')
  with pytest.raises(DamagedError, match='x is missing or damaged'):
    checksums.read_signed(path)


def test_files(tmp_path):
  root = epath.Path(tmp_path)
  (root / 'p.one').write_text('one')
  (root / 'p.two').write_text('two')
  (root / 'other').write_text('three')
  digests = checksums.of_files(root, 'p.')
  assert set(digests) == {'p.one', 'p.two'}
  checksums.check_files(root, digests)
  (root / 'p.one').write_text('onf')
  with pytest.raises(DamagedError, match=r'p\.one is not as it was written'):
    checksums.check_files(root, digests)
  (root / 'p.one').unlink()
  with pytest.raises(DamagedError, match=r'p\.one is missing'):
    checksums.check_files(root, digests)
