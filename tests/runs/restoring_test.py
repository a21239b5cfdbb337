import numpy as np

from t5x_lite.parallel import pytrees
from t5x_lite.runs import restoring
from tests import tiny_run


def test_arrays_by_name_are_what_was_saved(tmp_path):
  params = tiny_run.save_untrained(tmp_path / 'run')
  arrays = restoring.load_arrays(str(tmp_path / 'run'))
  wanted = pytrees.flatten_names({'params': params})
  assert arrays.keys() == {*wanted, 'step'} and arrays['step'] == 1
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(arrays[name], leaf)
