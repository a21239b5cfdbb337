"""Every variant against transformers itself, both ways."""

import json
import struct

import numpy as np
import pytest
from etils import epath

import t5x_lite
from t5x_lite import errors
from t5x_lite.interop import hf
from t5x_lite.programs import convert

pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from tests.interop import hf_models  # noqa: E402

VARIANTS = pytest.mark.parametrize('variant', hf_models.VARIANTS, ids=lambda v: v.name)
TOKENS = 10


def load(variant, folder, **changes):
  return t5x_lite.load(str(folder), scan_layers=variant.scan_layers, **changes)


def without_padding(row):
  row = list(row)
  while row and row[-1] == 0:
    row.pop()
  return row


@VARIANTS
def test_logits_of_padded_batches(variant, saved):
  model, folder = saved(variant)
  ours = load(variant, folder)
  assert ours.config.mlp_activations == variant.activations
  assert ours.config.logits_via_embedding != variant.untied
  inputs, targets = hf_models.inputs(), hf_models.targets()
  theirs = hf_models.logits(model, inputs, targets)
  assert np.abs(theirs).max() > 0.3, 'the test would pass on zeros'
  np.testing.assert_allclose(ours.logits(inputs, targets), theirs, atol=1e-4, rtol=0)


@VARIANTS
def test_greedy_outputs_of_fifty_prompts(variant, saved):
  model, folder = saved(variant)
  ours = load(variant, folder)
  prompts = hf_models.inputs(seed=2, size=50, length=20)
  theirs = hf_models.greedy(model, prompts, TOKENS)
  outputs = ours.generate(prompts, max_new_tokens=TOKENS, batch_size=50)
  assert [without_padding(row) for row in outputs] == [without_padding(row) for row in theirs]
  assert len({tuple(row) for row in outputs}) > 10, 'prompts hardly matter'


@VARIANTS
def test_exported_again_it_is_the_same_bit_for_bit(variant, saved, tmp_path):
  model, folder = saved(variant)
  out = tmp_path / 'out'
  convert.convert(source=str(folder), destination=str(out), to='hf')
  assert hf_models.tensors(out) == hf_models.tensors(folder)
  again, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  inputs, targets = hf_models.inputs(), hf_models.targets()
  scale = 1.0
  if variant.model_class is transformers.UMT5ForConditionalGeneration:
    # transformers 5 scales the logits of every umT5 that it loads; the
    # published model, like this one before it was saved, does not.
    scale = model.config.d_model**-0.5 if variant.untied else 1.0
  np.testing.assert_allclose(
    hf_models.logits(again.eval(), inputs, targets),
    hf_models.logits(model, inputs, targets) * scale,
    atol=1e-5,
    rtol=0,
  )
  assert again.generation_config.decoder_start_token_id == 0


def test_the_scaling_of_transformers_umt5_can_be_had(saved):
  variant = next(v for v in hf_models.VARIANTS if v.name == 'umt5_untied')
  _, folder = saved(variant)
  loaded = variant.model_class.from_pretrained(folder).eval()
  inputs, targets = hf_models.inputs(), hf_models.targets()
  ours = load(variant, folder, scale_logits=True)
  np.testing.assert_allclose(
    ours.logits(inputs, targets), hf_models.logits(loaded, inputs, targets), atol=1e-4, rtol=0
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_files(dtype, tmp_path):
  import torch

  variant = hf_models.VARIANTS[2]
  half = hf_models.make(variant).to(getattr(torch, dtype))
  half.save_pretrained(tmp_path / 'half')
  out = tmp_path / 'out'
  convert.convert(source=str(tmp_path / 'half'), destination=str(out), to='hf')
  found = hf_models.tensors(out)
  assert found == hf_models.tensors(tmp_path / 'half')
  assert {kind for _, kind, _ in found.values()} == {f'torch.{dtype}'}
  # Read into float32, the numbers are those of the rounded model.
  ours = load(variant, out)
  inputs, targets = hf_models.inputs(), hf_models.targets()
  np.testing.assert_allclose(
    ours.logits(inputs, targets), hf_models.logits(half.float(), inputs, targets), atol=1e-4, rtol=0
  )


def test_several_files_with_an_index(saved, tmp_path):
  variant = hf_models.VARIANTS[2]
  model, folder = saved(variant)
  model.save_pretrained(tmp_path / 'theirs', max_shard_size='20KB')
  assert (tmp_path / 'theirs' / hf.WEIGHTS_INDEX).is_file()
  out = tmp_path / 'ours'
  convert.convert(
    source=str(tmp_path / 'theirs'), destination=str(out), to='hf', shard_bytes=30_000
  )
  assert (out / hf.WEIGHTS_INDEX).is_file()
  files = sorted(out.glob('*.safetensors'))
  assert len(files) > 2
  assert max(f.stat().st_size for f in files) < 40_000
  assert hf_models.tensors(out) == hf_models.tensors(folder)
  transformers.AutoModelForSeq2SeqLM.from_pretrained(out)


def test_copies_of_the_embedding_and_of_a_tied_head_are_read_over(saved, tmp_path):
  from safetensors.numpy import load_file, save_file

  _, folder = saved(hf_models.VARIANTS[0])
  tensors = load_file(folder / hf.WEIGHTS)
  for name in ('lm_head', 'encoder.embed_tokens', 'decoder.embed_tokens'):
    tensors[f'{name}.weight'] = tensors['shared.weight']
  copy = tmp_path / 'copy'
  copy.mkdir()
  save_file(tensors, copy / hf.WEIGHTS)
  (copy / hf.CONFIG).write_text((folder / hf.CONFIG).read_text())
  ours = load(hf_models.VARIANTS[0], copy)
  assert ours.config.logits_via_embedding
  tensors['encoder.embed_tokens.weight'] = tensors['shared.weight'] + 1
  save_file(tensors, copy / hf.WEIGHTS)
  with pytest.raises(errors.UsageError, match=r'embed_tokens.*differs'):
    load(hf_models.VARIANTS[0], copy)


def test_an_encoder_alone(saved, tmp_path):
  import torch

  variant = hf_models.VARIANTS[2]
  _, folder = saved(variant)
  encoder = transformers.T5EncoderModel.from_pretrained(folder).eval()
  encoder.save_pretrained(tmp_path / 'encoder')
  ids = hf_models.inputs(length=30)
  with torch.no_grad():
    theirs = encoder(
      input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(ids != 0).long()
    ).last_hidden_state.numpy()
  for ours in (load(variant, tmp_path / 'encoder'), load(variant, folder, architecture='encoder')):
    assert not ours.config.has_decoder
    real = ids != 0
    encoded = ours.encode(ids)
    np.testing.assert_allclose(encoded[real], theirs[real], atol=1e-4)
    mean = (theirs * real[..., None]).sum(1) / real.sum(1)[:, None]
    np.testing.assert_allclose(ours.encode(ids, pooling='mean'), mean, atol=1e-4)
    np.testing.assert_allclose(ours.encode(ids, pooling='first'), theirs[:, 0], atol=1e-4)
  ours.save(str(tmp_path / 'again'), format='hf')
  again, info = transformers.T5EncoderModel.from_pretrained(
    tmp_path / 'again', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  with torch.no_grad():
    out = again.eval()(
      input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(ids != 0).long()
    )
  np.testing.assert_array_equal(out.last_hidden_state.numpy(), theirs)


# ---- Damaged and foreign files ----


@pytest.fixture
def damaged(saved, tmp_path):
  """Returns a function that writes a folder with changed tensors or config."""
  from safetensors.numpy import load_file, save_file

  _, folder = saved(hf_models.VARIANTS[0])

  def make(change=lambda tensors: None, **config):
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    out = tmp_path / 'damaged'
    out.mkdir()
    save_file(tensors, out / hf.WEIGHTS)
    entry = json.loads((folder / hf.CONFIG).read_text())
    (out / hf.CONFIG).write_text(json.dumps({**entry, **config}))
    return out

  return make


def refused(folder, tmp_path, match):
  """Checks that a conversion stops with one line and leaves nothing behind."""
  before = sorted(tmp_path.iterdir())
  with pytest.raises(errors.UsageError, match=match) as caught:
    convert.convert(source=str(folder), destination=str(tmp_path / 'to'), to='t5x_lite')
  assert '\n' not in str(caught.value)
  assert sorted(tmp_path.iterdir()) == before


def test_a_missing_tensor(damaged, tmp_path):
  name = 'encoder.block.1.layer.1.DenseReluDense.wo.weight'
  folder = damaged(lambda tensors: tensors.pop(name))
  refused(folder, tmp_path, r'encoder/layers_1/mlp/wo/kernel.*\(40, 24\)')


def test_an_unknown_tensor(damaged, tmp_path):
  folder = damaged(lambda tensors: tensors.update(surprise=np.zeros(3, np.float32)))
  refused(folder, tmp_path, 'surprise')


def test_a_wrong_shape(damaged, tmp_path):
  def cut(tensors):
    name = 'decoder.block.0.layer.1.EncDecAttention.k.weight'
    tensors[name] = tensors[name][:, :20].copy()

  refused(damaged(cut), tmp_path, r'EncDecAttention\.k.*\(20, 24\).*\(24, 24\)')


def test_a_config_that_does_not_fit(damaged, tmp_path):
  refused(damaged(num_layers=4), tmp_path, 'no tensor for encoder/layers_3')


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ({'model_type': 'llama'}, "model_type is 'llama'; allowed: mt5, t5, umt5"),
    ({'feed_forward_proj': 'gated-tanh', 'dense_act_fn': None}, 'gated-tanh'),
    ({'feed_forward_proj': 'gelu', 'dense_act_fn': 'gelu'}, "'gelu'"),
    ({'d_ff': 'many'}, "d_ff='many'"),
  ],
)
def test_a_config_that_is_not_understood(change, match, damaged, tmp_path):
  refused(damaged(**change), tmp_path, match)


def test_a_pickle_is_not_opened(damaged, tmp_path):
  folder = damaged()
  (folder / hf.WEIGHTS).rename(folder / 'pytorch_model.bin')
  refused(folder, tmp_path, r'pytorch_model\.bin is a pickle.*save_pretrained')


@pytest.mark.parametrize(
  'data',
  [
    b'',
    b'\x00' * 7,
    struct.pack('<Q', 1 << 40) + b'{}',
    struct.pack('<Q', 2) + b'{]',
    struct.pack('<Q', 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     ',
  ],
)
def test_a_bad_header(data, damaged, tmp_path):
  folder = damaged()
  (folder / hf.WEIGHTS).write_bytes(data)
  refused(folder, tmp_path, 'not a safetensors file, or is cut short')


def test_a_file_that_is_cut_short(damaged, tmp_path):
  folder = damaged()
  data = (folder / hf.WEIGHTS).read_bytes()
  (folder / hf.WEIGHTS).write_bytes(data[:-100])
  refused(folder, tmp_path, 'cut short')


def test_an_index_with_a_missing_file(damaged, tmp_path):
  folder = damaged()
  (folder / hf.WEIGHTS_INDEX).write_text(
    json.dumps({'weight_map': {'shared.weight': '../x.safetensors'}})
  )
  refused(folder, tmp_path, r'\.\./x\.safetensors')


def test_another_type_of_numbers(damaged, tmp_path):
  folder = damaged(
    lambda tensors: tensors.update({'shared.weight': tensors['shared.weight'].astype(np.int8)})
  )
  refused(folder, tmp_path, 'shared.weight.*I8.*known are')


def test_what_a_folder_is(damaged, tmp_path):
  assert hf.is_hf(epath.Path(damaged()))
  (tmp_path / 'plain').mkdir()
  (tmp_path / 'plain' / hf.CONFIG).write_text('[1]')
  assert not hf.is_hf(epath.Path(tmp_path / 'plain'))


def test_links_are_followed_and_what_they_lead_to_is_not_shown(damaged, tmp_path):
  """The hub's own cache is made of links."""
  folder = damaged()
  weights = folder / hf.WEIGHTS
  stored = tmp_path / 'blob'
  weights.rename(stored)
  weights.symlink_to(stored)
  found = hf.read_tensors(epath.Path(folder))
  assert found['shared.weight'].read().size
  data = stored.read_bytes()
  secret = tmp_path / 'secret'
  secret.write_text('the password is 1234, and then some more text')
  for name in (hf.WEIGHTS, hf.CONFIG):
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(errors.UsageError) as caught:
      convert.convert(source=str(folder), destination=str(tmp_path / 'to'), to='t5x_lite')
    assert 'password' not in str(caught.value) and not (tmp_path / 'to').exists()
  assert secret.read_text().startswith('the password') and stored.read_bytes() == data
