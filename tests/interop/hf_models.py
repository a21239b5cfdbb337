"""Random models of every variant, made and saved by transformers itself."""

import dataclasses

import numpy as np
import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Variant:
  """A public member of the family, tiny.

  Attributes:
    name: for the test's id.
    model_class: of transformers.
    config_class: of transformers.
    fields: of its config, beside the common sizes.
    untied: give it a head of its own (transformers 5 ties whatever it is told).
    scan_layers: how it is loaded here.
    activations: mlp_activations that are expected.
  """

  name: str
  model_class: type = transformers.T5ForConditionalGeneration
  config_class: type = transformers.T5Config
  fields: tuple = ()
  untied: bool = True
  scan_layers: bool = True
  activations: tuple = ('gelu', 'linear')


_T5_1_0 = {'untied': False, 'activations': ('relu',)}
_GATED = (('feed_forward_proj', 'gated-gelu'),)
_MT5 = {
  'model_class': transformers.MT5ForConditionalGeneration,
  'config_class': transformers.MT5Config,
  'fields': _GATED,
}
_UMT5 = {
  'model_class': transformers.UMT5ForConditionalGeneration,
  'config_class': transformers.UMT5Config,
  'fields': _GATED,
}

VARIANTS = (
  Variant('t5_1_0_scanned', **_T5_1_0),
  Variant('t5_1_0_unrolled', scan_layers=False, **_T5_1_0),
  Variant('t5_1_1_lm_flan', fields=_GATED),
  Variant('t5_1_1_tied', fields=_GATED, untied=False),
  Variant('mt5', **_MT5),
  Variant('mt5_tied_unrolled', untied=False, scan_layers=False, **_MT5),
  Variant('byt5', fields=(*_GATED, ('num_layers', 4), ('num_decoder_layers', 1))),
  Variant('umt5_untied', **_UMT5),
  Variant('umt5_tied', untied=False, **_UMT5),
  Variant('umt5_unrolled', scan_layers=False, **_UMT5),
  Variant(
    'ul2',
    fields=(('feed_forward_proj', 'gated-silu'), ('d_kv', 16)),
    activations=('silu', 'linear'),
  ),
)

SIZES = {
  'vocab_size': 96,
  'd_model': 24,
  'd_kv': 8,
  'd_ff': 40,
  # transformers 5 cannot generate with a decoder deeper than its encoder.
  'num_layers': 3,
  'num_decoder_layers': 2,
  'num_heads': 3,
  'dropout_rate': 0.0,
  'decoder_start_token_id': 0,
}


def make(variant: Variant, seed: int = 0):
  """Returns a random model with logits of ordinary size."""
  config = variant.config_class(**{**SIZES, **dict(variant.fields)})
  if variant.untied:
    config.tie_word_embeddings = False
    config.scale_decoder_outputs = False
  torch.manual_seed(seed)
  model = variant.model_class(config)
  # With the head transformers 5 also unties the stacks' embeddings.
  model.set_input_embeddings(model.shared)
  randomize(model)
  return model.eval()


def randomize(model):
  """Makes every parameter matter: HF's norms start at 1, its biases tiny."""
  tied = model.lm_head.weight is model.shared.weight
  with torch.no_grad():
    if tied:
      # Else each token predicts itself, whatever the layers do.
      model.shared.weight.mul_(0.3)
    for name, p in model.named_parameters():
      if 'layer_norm' in name:
        p.copy_(1.0 + 0.1 * torch.randn_like(p))
      elif 'relative_attention_bias' in name:
        p.copy_(torch.randn_like(p))
      elif 'lm_head' in name:
        p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)


def inputs(seed: int = 0, size: int = 4, length: int = 140, vocab: int = 96):
  """Returns rows padded on the right, long enough for the last bucket."""
  rng = np.random.default_rng(seed)
  rows = rng.integers(2, vocab, (size, length)).astype(np.int32)
  for row in range(1, size):
    rows[row, -int(rng.integers(1, length - 2)) :] = 0
  return rows


def targets(seed: int = 1, size: int = 4, length: int = 11, vocab: int = 96):
  """Returns decoder inputs: a start token, then random ids."""
  rng = np.random.default_rng(seed)
  rows = rng.integers(2, vocab, (size, length)).astype(np.int32)
  rows[:, 0] = 0
  return rows


def logits(model, encoder_inputs, decoder_inputs):
  """Runs transformers on padded rows."""
  ids = torch.tensor(encoder_inputs).long()
  with torch.no_grad():
    out = model(
      input_ids=ids,
      attention_mask=(ids != 0).long(),
      decoder_input_ids=torch.tensor(decoder_inputs).long(),
    )
  return out.logits.numpy()


def greedy(model, encoder_inputs, max_new_tokens):
  """Returns generate's ids up to EOS, without the start token."""
  ids = torch.tensor(encoder_inputs).long()
  with torch.no_grad():
    out = model.generate(
      input_ids=ids,
      attention_mask=(ids != 0).long(),
      max_new_tokens=max_new_tokens,
      do_sample=False,
      num_beams=1,
    )
  rows = []
  for row in out[:, 1:].tolist():
    rows.append(row[: row.index(1)] if 1 in row else row)
  return rows


def tensors(folder):
  """Returns every tensor of a folder as raw bytes."""
  import safetensors

  found = {}
  for path in sorted(folder.glob('*.safetensors')):
    with safetensors.safe_open(path, framework='pt') as file:
      for name in file.keys():
        tensor = file.get_tensor(name)
        found[name] = (
          tuple(tensor.shape),
          str(tensor.dtype),
          tensor.contiguous().view(torch.uint8).numpy().tobytes(),
        )
  return found
