"""Its file reader; tests/programs/export_test.py runs the loader without this package."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

from t5x_lite.interop import load_exported


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_parameters_are_read_as_safetensors_writes_them(tmp_path, dtype):
  arrays = {'a/b': jnp.arange(6, dtype=dtype).reshape(2, 3), 'c': jnp.ones((), dtype)}
  (tmp_path / 'params').write_bytes(safetensors.flax.save(arrays))
  found = load_exported._read_safetensors(tmp_path / 'params')
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)
