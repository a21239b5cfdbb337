import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from flax import serialization

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import export, tensors
from t5x_lite.interop.checkpoint_source import Source
from tests.models import tiny

CFG = tiny.config(vocab_size=384)


def write(path, to):
  found, vocabulary = tensors.of_params(tiny.params(CFG), CFG), VocabularyConfig(kind='byte')
  export.write(epath.Path(path), Source('', to, CFG, found, vocabulary=vocabulary), to=to)


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise OSError('disk full')

  monkeypatch.setattr(export.hf_export, 'generation_config', fail)
  with pytest.raises(OSError, match='disk full'):
    write(tmp_path / 'o', to='hf')
  assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(tmp_path):
  (tmp_path / 'precious').write_text('x')
  with pytest.raises(UsageError, match='already there'):
    export.check_destination(epath.Path(tmp_path))


def test_what_a_format_lacks_is_said_before_anything_is_written():
  with pytest.raises(UsageError, match='no decoder-only T5'):
    export.check_target(tiny.config(architecture='decoder'), 'hf')
  with pytest.raises(UsageError, match='no such network'):
    export.check_target(tiny.config(architecture='encoder'), 't5x')


def test_specs_of_t5x_are_tensorstores_and_relative(tmp_path):
  """The form of what is written; that it is read back is t5x_test's business.

  T5X's own reader has been run on such checkpoints (docs/lab_notes.md); its needs, as far as they
  go beyond zarr's, are what is checked here.
  """
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
  with pytest.raises(UsageError, match=match):
    export.check_target(tiny.config(num_encoder_layers=3, **fields), 't5x')
