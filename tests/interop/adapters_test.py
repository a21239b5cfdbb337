"""Adapters by themselves: PEFT reads and writes the same, any base takes them."""

import json

import jax
import numpy as np
import pytest

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.interop import adapters, checkpoint_source
from tests.models import tiny

LORA = {'lora_rank': 3, 'lora_alpha': 7.0, 'lora_targets': ('query', 'value', 'wi_0', 'wo')}
OTHERS = {'adapter_dim': 5, 'prompt_length': 4}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A folder of transformers; dropout is 0 in ours, and inference has none."""
  path = tmp_path_factory.mktemp('base') / 'model'
  t5x_lite.new(tiny.config()).save(str(path), format='hf')
  return str(path)


def load(base, **arguments):
  """Returns the base with parts that do something."""
  model = t5x_lite.load(base, dtype='float32', **arguments)
  rng = np.random.default_rng(0)
  model.params = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x + rng.standard_normal(x.shape).astype(np.float32) * 0.3
      if any('lora_b' in str(k) or 'adapter' in str(k) for k in path)
      else x
    ),
    model.params,
  )
  return model


def logits(model):
  batch = tiny.batch()
  return model.logits(batch['encoder_input_tokens'], batch['decoder_input_tokens'])


def torch_logits(model):
  import torch

  batch = {k: torch.from_numpy(v).long() for k, v in tiny.batch().items() if k.endswith('tokens')}
  inputs = batch['encoder_input_tokens']
  with torch.no_grad():
    return model.eval()(
      input_ids=inputs,
      attention_mask=(inputs != 0).long(),
      decoder_input_ids=batch['decoder_input_tokens'],
    ).logits.numpy()


def test_a_base_keeps_its_bits(base):
  plain = t5x_lite.load(base, dtype='float32')
  model = t5x_lite.load(base, dtype='float32', **LORA, adapter_dim=5)
  np.testing.assert_array_equal(logits(model), logits(plain))
  jax.tree.map(
    np.testing.assert_array_equal, plain.params['token_embedder'], model.params['token_embedder']
  )
  with_prompt = t5x_lite.load(base, prompt_length=4)
  table = np.asarray(plain.params['token_embedder']['embedding'])
  for row in np.asarray(with_prompt.params['encoder']['prompt']):
    assert (table == row).all(1).any()


def test_peft_reads_what_is_written_here(base, tmp_path):
  peft = pytest.importorskip('peft')
  import transformers

  model = load(base, **LORA)
  wanted = logits(model)
  model.save(str(tmp_path / 'lora'), format='peft')
  theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
  theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / 'lora'))
  np.testing.assert_allclose(torch_logits(theirs), wanted, atol=1e-4)
  # Merged here and read by transformers alone; merged and read back.
  model.save(str(tmp_path / 'merged'), format='hf')
  merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'merged')
  np.testing.assert_allclose(torch_logits(merged), wanted, atol=1e-4)
  again = t5x_lite.load(str(tmp_path / 'merged'), dtype='float32')
  np.testing.assert_allclose(logits(again), wanted, atol=1e-5)
  assert again.config.lora_rank is None


def test_what_peft_writes_is_read_here(base, tmp_path):
  peft = pytest.importorskip('peft')
  import transformers

  theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
  config = peft.LoraConfig(
    task_type='SEQ_2_SEQ_LM',
    r=4,
    lora_alpha=10,
    use_rslora=True,
    target_modules=['q', 'o', 'wi_1'],
    init_lora_weights=False,
  )
  theirs = peft.get_peft_model(theirs, config)
  theirs.save_pretrained(tmp_path)
  ours = t5x_lite.load(base, adapter=str(tmp_path), dtype='float32')
  assert ours.config.lora_alpha == 20.0 and ours.config.lora_targets == ('query', 'out', 'wi_1')
  np.testing.assert_allclose(logits(ours), torch_logits(theirs), atol=1e-4)


@pytest.mark.parametrize('changes', [LORA, {**LORA, **OTHERS}, {'adapter_dim': 5}])
def test_alone_and_back_on_the_base(base, tmp_path, changes):
  model = load(base, **changes)
  model.save(str(tmp_path / 'alone'), format='adapter')
  again = t5x_lite.load(base, adapter=str(tmp_path / 'alone'), dtype='float32')
  assert again.config == model.config
  np.testing.assert_array_equal(logits(again), logits(model))
  size = sum(file.stat().st_size for file in (tmp_path / 'alone').iterdir())
  assert size < 40_000


def test_shared_layers_are_written_twice_for_peft(tmp_path):
  config = tiny.config(num_decoder_layers=2, share_encoder_decoder=True, **LORA)
  model = t5x_lite.new(config)
  model.save(str(tmp_path / 'lora'), format='peft')
  from safetensors import numpy

  found = numpy.load_file(tmp_path / 'lora' / 'adapter_model.safetensors')
  stem = 'base_model.model.{}.block.1.layer.0.SelfAttention.q.lora_A.weight'
  np.testing.assert_array_equal(found[stem.format('encoder')], found[stem.format('decoder')])


def test_other_bases_and_formats_are_refused(base, tmp_path):
  model = load(base, **OTHERS)
  for to, message in (
    ('hf', 'adapter_dim=5 cannot be written'),
    ('t5x', "write it as 't5x_lite'"),
    ('peft', 'is for LoRA'),
  ):
    with pytest.raises(UsageError, match=message):
      model.save(str(tmp_path / to), format=to)
    assert not (tmp_path / to).exists()
  with pytest.raises(UsageError, match='no LoRA, no adapters and no prompt'):
    t5x_lite.load(base).save(str(tmp_path / 'none'), format='adapter')
  model.save(str(tmp_path / 'alone'), format='adapter')
  wide, deep = (
    t5x_lite.new(tiny.config(**change)) for change in ({'emb_dim': 8}, {'num_encoder_layers': 3})
  )
  for name, other in (('wide', wide), ('deep', deep)):
    other.save(str(tmp_path / name))
    with pytest.raises(UsageError, match='is for another model'):
      t5x_lite.load(str(tmp_path / name), adapter=str(tmp_path / 'alone'))
  with pytest.raises(UsageError, match='holds no adapter'):
    t5x_lite.load(base, adapter=base)
  model.save(str(tmp_path / 'whole'))
  with pytest.raises(UsageError, match='name its base'):
    t5x_lite.load(str(tmp_path / 'whole'), adapter=str(tmp_path / 'alone'))


@pytest.mark.parametrize(
  ('entry', 'message'),
  [
    ({'peft_type': 'IA3'}, "'IA3'; of PEFT only LORA"),
    ({'peft_type': 'LORA', 'use_dora': True}, 'use_dora is True'),
    ({'peft_type': 'LORA', 'target_modules': 'all-linear'}, "'all-linear'"),
    ({'peft_type': 'LORA', 'target_modules': ['q']}, 'describes no adapter'),
    ({}, 'describes no adapter'),
  ],
)
def test_pefts_other_settings_are_refused(base, tmp_path, entry, message):
  load(base, **LORA).save(str(tmp_path / 'lora'), format='peft')
  (tmp_path / 'lora' / 'adapter_config.json').write_text(json.dumps(entry))
  with pytest.raises(UsageError, match=message):
    adapters.put_on(checkpoint_source.open_source(base), str(tmp_path / 'lora'))


def test_what_peft_trained_beside_lora_is_not_dropped(base, tmp_path):
  from safetensors import numpy

  load(base, **LORA).save(str(tmp_path / 'lora'), format='peft')
  file = tmp_path / 'lora' / 'adapter_model.safetensors'
  embedding = {'base_model.model.shared.weight': np.ones((3, 2), np.float32)}
  numpy.save_file(numpy.load_file(file) | embedding, file)
  with pytest.raises(UsageError, match='which is no LoRA'):
    adapters.put_on(checkpoint_source.open_source(base), str(tmp_path / 'lora'))
