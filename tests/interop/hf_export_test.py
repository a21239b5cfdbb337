import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from t5x_lite import errors
from t5x_lite.interop import hf, hf_export, tensors
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config, named_config
from tests.models import tiny


def array(*shape, dtype=np.float32):
  return tensors.of_array(np.arange(np.prod(shape)).reshape(shape).astype(dtype))


def zeros(cfg):
  """Tensors of which only names and shapes matter."""
  _, shapes, _ = t5.abstract_params(cfg)
  return tensors.of_params(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), cfg)


def test_shards_keep_the_order_and_the_limit():
  found = {name: array(size) for name, size in (('a', 3), ('b', 3), ('c', 9), ('d', 1), ('e', 2))}
  shards = hf_export.plan_shards(found, itemsize=4, limit=24)
  assert [list(shard) for shard in shards.values()] == [
    ['a', 'b'], ['c'], ['d', 'e'],
  ]  # fmt: skip
  assert next(iter(shards)) == 'model-00001-of-00003.safetensors'
  assert list(hf_export.plan_shards(found, itemsize=2)) == [hf.WEIGHTS]


@pytest.mark.parametrize('dtype', list(hf.DTYPES.values()), ids=str)
def test_files_are_safetensors(dtype, tmp_path, monkeypatch):
  import safetensors

  monkeypatch.setattr(hf_export, '_PART', 5)  # several parts a tensor
  found = {'x.weight': array(7, 3), 'turned': array(4, 6).transposed()}
  (shard,) = hf_export.plan_shards(found, dtype.itemsize).values()
  written = []
  path = epath.Path(tmp_path / 'm.safetensors')
  hf_export.write_shard(path, shard, dtype, written.append)
  assert written == list(found)
  length = struct.unpack('<Q', path.read_bytes()[:8])[0]
  assert length % 8 == 0
  assert dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
  with safetensors.safe_open(path, framework='numpy') as file:
    assert file.metadata() == {'format': 'pt'}
    for name, tensor in found.items():
      got = file.get_tensor(name)
      assert got.dtype == dtype
      np.testing.assert_array_equal(got, tensor.read().astype(dtype))


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('t5_1_0_small', {'feed_forward_proj': 'relu', 'tie_word_embeddings': True,
                      'model_type': 't5', 'dense_act_fn': 'relu'}),
    ('flan_t5_xl', {'feed_forward_proj': 'gated-gelu', 'is_gated_act': True,
                    'dense_act_fn': 'gelu_new', 'tie_word_embeddings': False}),
    ('byt5_small', {'num_layers': 12, 'num_decoder_layers': 4}),
    ('umt5_base', {'model_type': 'umt5', 'vocab_size': 256384,
                   'architectures': ['UMT5ForConditionalGeneration']}),
    ('ul2_20b', {'feed_forward_proj': 'gated-silu', 'dense_act_fn': 'silu'}),
  ],
)  # fmt: skip
def test_config_json(name, expected):
  entry = hf_export.model_config(named_config(name), 'float32')
  assert expected.items() <= entry.items()


@pytest.mark.parametrize('kind', ['t5', 'umt5'])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('scale', [None, True, False])
def test_config_json_is_read_as_it_was_written(kind, tied, scale):
  if kind == 'umt5' and scale is not None:
    pytest.skip('umT5 has no key for it')
  cfg = tiny.config(
    logits_via_embedding=tied,
    scale_logits=None if scale == tied else scale,
    relpos_per_layer=kind == 'umt5',
    mlp_activations=('silu', 'linear'),
    dropout_rate=0.1,
    relpos_num_buckets=16,
    relpos_max_distance=64,
    layer_norm_epsilon=1e-5,
    decoder_start_id=3,
  )
  found = zeros(cfg)
  entry = hf_export.model_config(cfg, 'float32')
  assert hf.model_config(entry, found) == cfg


def test_shared_parameters_are_written_twice():
  cfg = tiny.config(num_encoder_layers=3, share_encoder_decoder=True)
  found = tensors.of_params(tiny.params(cfg), cfg)
  turned = hf_export.by_hf_name(found, cfg)
  a = turned['encoder.block.1.layer.1.DenseReluDense.wo.weight'].read()
  b = turned['decoder.block.1.layer.2.DenseReluDense.wo.weight'].read()
  np.testing.assert_array_equal(a, b)
  full = zeros(cfg.replace(share_encoder_decoder=False))
  assert len(turned) == len(full)


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'architecture': 'decoder'}, 'no decoder-only T5'),
    ({'mlp_activations': ('gelu', 'relu')}, 'has no name in transformers'),
  ],
)
def test_what_transformers_cannot_hold(fields, match):
  with pytest.raises(errors.UsageError, match=match):
    hf_export.model_config(T5Config(**fields), 'float32')
