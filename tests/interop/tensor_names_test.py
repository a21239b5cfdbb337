import pytest

from t5x_lite.interop import tensor_names
from t5x_lite.models.config import T5Config, named_config

SIZES = dict(
  vocab_size=64,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=24,
  num_encoder_layers=2,
  num_decoder_layers=3,
)


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'mlp_activations': ('relu',), 'logits_via_embedding': True},
    {'relpos_per_layer': True},
    {'architecture': 'encoder'},
  ],
)
def test_every_parameter_has_one_hugging_face_name(fields):
  cfg = T5Config(**{**SIZES, **fields})
  found = list(tensor_names.shapes(cfg))
  assert len({tensor_names.hf_name(name) for name in found}) == len(found)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_leaves_hold_every_tensor_once(scan_layers):
  cfg = T5Config(**SIZES, scan_layers=scan_layers)
  found = [name for _, _, some in tensor_names.leaves(cfg) for name in some]
  assert sorted(found) == sorted(tensor_names.shapes(cfg))
  assert len(found) == len(set(found))


def test_names_are_t5xs():
  cfg = T5Config(**SIZES)
  shapes = tensor_names.shapes(cfg)
  assert shapes['encoder/layers_1/attention/query/kernel'] == (16, 16)
  assert shapes['decoder/layers_2/encoder_decoder_attention/out/kernel']
  assert shapes['decoder/relpos_bias/rel_embedding'] == (2, 32)
  assert tensor_names.t5x_scanned_name('decoder/layers_2/mlp/wo/kernel') == (
    'decoder/decoder/mlp/wo/kernel',
    2,
  )
  assert tensor_names.t5x_scanned_name('decoder/logits_dense/kernel') == (
    'decoder/logits_dense/kernel',
    None,
  )


def test_a_decoder_alone_keeps_its_embedding_inside():
  cfg = T5Config(**SIZES, architecture='decoder')
  name = 'token_embedder/embedding'
  assert tensor_names.t5x_name(name, cfg) == 'decoder/token_embedder/embedding'
  assert tensor_names.t5x_name(name, T5Config(**SIZES)) == name


def test_shared_parameters_name_their_lender():
  shared = tensor_names.shapes(
    T5Config(**SIZES | {'num_decoder_layers': 2}, share_encoder_decoder=True)
  )
  full = tensor_names.shapes(T5Config(**SIZES | {'num_decoder_layers': 2}))
  for name in full.keys() - shared.keys():
    lender = tensor_names.lender(name)
    assert lender is not None
    assert full[lender] == full[name]
  # Each half has its own cross-attention, biases and final norms.
  assert tensor_names.lender('decoder/relpos_bias/rel_embedding') is None
  assert tensor_names.lender('decoder/layers_0/encoder_decoder_attention/key/kernel') is None


def test_shapes_of_the_largest_size_cost_nothing():
  shapes = tensor_names.shapes(named_config('t5_1_0_11b'))
  assert shapes['encoder/layers_23/mlp/wo/kernel'] == (65536, 1024)
