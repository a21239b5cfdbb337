"""Every named size has as many parameters as transformers' own model."""

import math

import pytest

from t5x_lite.interop import tensor_names
from t5x_lite.models import model_sharding, t5
from t5x_lite.models.config import NAMED_CONFIGS

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

# The same object under several names is counted once.
DISTINCT = {id(config): name for name, config in NAMED_CONFIGS.items()}


@pytest.mark.parametrize('name', sorted(DISTINCT.values()))
def test_parameter_counts(name):
  cfg = NAMED_CONFIGS[name]
  kind = 'umt5' if cfg.relpos_per_layer else 't5'
  gate = {('relu',): 'relu', ('gelu', 'linear'): 'gated-gelu', ('silu', 'linear'): 'gated-silu'}[
    cfg.mlp_activations
  ]
  entry = transformers.AutoConfig.for_model(
    kind,
    vocab_size=cfg.vocab_size,
    d_model=cfg.emb_dim,
    d_kv=cfg.head_dim,
    d_ff=cfg.mlp_dim,
    num_layers=cfg.num_encoder_layers,
    num_decoder_layers=cfg.num_decoder_layers,
    num_heads=cfg.num_heads,
    feed_forward_proj=gate,
  )
  # transformers 5 forces True in the constructor, whatever it is given; and
  # untied it also unties the input tables of the two stacks.
  entry.tie_word_embeddings = cfg.logits_via_embedding
  with torch.device('meta'):
    model = transformers.AutoModelForSeq2SeqLM.from_config(entry)
  model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
  expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
  assert ('lm_head.weight' in expected) != cfg.logits_via_embedding
  ours = {
    tensor_names.hf_name(n): s[::-1] if tensor_names.is_transposed(n) else s
    for n, s in tensor_names.shapes(cfg).items()
  }
  assert ours == expected
  _, shapes, _ = t5.abstract_params(cfg)
  expected_count = sum(p.numel() for p in model.parameters())
  assert model_sharding.count_params(shapes) == expected_count


@pytest.mark.parametrize(
  ('name', 'billions'),
  [
    # Raffel et al. 2020, section 3.7.
    ('t5_1_0_small', 0.060),
    ('t5_1_0_base', 0.220),
    ('t5_1_0_large', 0.770),
    ('t5_1_0_3b', 2.8),
    ('t5_1_0_11b', 11),
    # Xue et al. 2021 (mT5), table 1 and 2022 (ByT5), table 1.
    ('mt5_small', 0.300),
    ('mt5_base', 0.580),
    ('mt5_large', 1.2),
    ('mt5_xl', 3.7),
    ('mt5_xxl', 13),
    ('byt5_small', 0.300),
    ('byt5_base', 0.582),
    ('byt5_large', 1.23),
    ('byt5_xl', 3.74),
    ('byt5_xxl', 12.9),
    # Tay et al. 2022, section 5.
    ('ul2_20b', 20),
  ],
)
def test_counts_are_the_papers(name, billions):
  shapes = tensor_names.shapes(NAMED_CONFIGS[name])
  count = sum(math.prod(shape) for shape in shapes.values()) / 1e9
  assert count == pytest.approx(billions, rel=0.05)
