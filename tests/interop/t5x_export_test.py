"""The form of what is written; that it is read back is t5x_test's business.

T5X's own reader has been run on such checkpoints (docs/lab_notes.md); its
needs, as far as they go beyond zarr's, are what is checked here.
"""

import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from flax import serialization

from t5x_lite import errors
from t5x_lite.interop import export, t5x_export, tensors
from t5x_lite.interop.checkpoint_source import Source
from tests.models import tiny


def test_specs_are_tensorstores_and_relative(tmp_path):
  cfg = tiny.config(relpos_per_layer=True)
  params = tiny.params(cfg)
  source = Source('', 't5x', cfg, tensors.of_params(params, cfg), step=5)
  export.write(epath.Path(tmp_path / 'out'), source, to='t5x')
  root = tmp_path / 'out' / 'checkpoint_5'
  contents = serialization.msgpack_restore((root / 'checkpoint').read_bytes())
  assert contents['version'] == 3
  optimizer = contents['optimizer']
  assert set(optimizer) == {'state', 'target'}
  assert optimizer['state']['step'] == 5
  spec = optimizer['target']['encoder']['encoder']['mlp']['wo']['kernel']
  # t5x/checkpoints.py _read_ts drops these two and resolves the path.
  assert {'chunks', 'compressor', 'shape'} <= spec['metadata'].keys()
  assert spec['metadata']['shape'] == [32, 2, 16]
  assert not spec['kvstore']['path'].startswith('/')
  spec['kvstore']['path'] = str(root / spec['kvstore']['path'])
  array = ts.open(ts.Spec(spec), open=True).result().read().result()
  kernel = params['encoder']['layers']['mlp']['wo']['kernel']
  np.testing.assert_array_equal(array, kernel.transpose(1, 0, 2))
  # T5X restores every parameter together with its optimizer's state.
  state = optimizer['state']['param_states']['encoder']['encoder']['mlp']
  assert set(state['wo']['kernel']) == {'m', 'v', 'v_col', 'v_row'}


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'architecture': 'encoder'}, "architecture='encoder'"),
    ({'share_encoder_decoder': True}, 'share_encoder_decoder=True'),
    ({'relpos_max_distance': 40}, 'relpos_max_distance is 40: T5X has 128 alone'),
    ({'scale_logits': True}, 'scale_logits is True'),
    ({'eos_id': 5}, 'eos_id is 5'),
  ],
)
def test_models_that_t5x_does_not_have(fields, match):
  with pytest.raises(errors.UsageError, match=match):
    t5x_export.check(tiny.config(num_encoder_layers=3, **fields), 'float32')
