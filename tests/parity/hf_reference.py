"""HF PyTorch T5 as a reference, with a parameter mapping of its own.

The mapping is written here a second time on purpose, apart from
t5x_lite/interop: a parity test that used our converter would let the same
mistake in both cancel.
"""

import numpy as np
import torch
import transformers


def tiny_config(version: str, **overrides):
  """Returns an HF config of a tiny T5 1.0 or 1.1, genuinely (un)tied."""
  gated = version == '1.1'
  cfg = transformers.T5Config(
    vocab_size=96,
    d_model=24,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    dropout_rate=0.0,
    feed_forward_proj='gated-gelu' if gated else 'relu',
    decoder_start_token_id=0,
    **overrides,
  )
  # transformers 5 forces True in the constructor whatever is passed.
  cfg.tie_word_embeddings = not gated
  cfg.scale_decoder_outputs = not gated
  return cfg


def make_model(version: str, seed: int = 0, **overrides):
  """Returns a random model whose logits are of ordinary size."""
  torch.manual_seed(seed)
  model = transformers.T5ForConditionalGeneration(tiny_config(version, **overrides))
  # Untied, transformers 5 also unties the two stacks' input tables.
  model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
  with torch.no_grad():
    for name, p in model.named_parameters():
      # HF's initial norms are 1 and biases tiny; make each matter.
      if 'layer_norm' in name:
        p.copy_(1.0 + 0.1 * torch.randn_like(p))
      elif 'relative_attention_bias' in name:
        p.copy_(torch.randn_like(p))
      elif 'lm_head' in name:
        p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)
  return model.eval()


def our_config(version: str, **overrides):
  """The same tiny shape as a T5Config."""
  from t5x_lite.models.config import T5Config

  fields = dict(
    vocab_size=96,
    emb_dim=24,
    head_dim=8,
    mlp_dim=40,
    num_encoder_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    dtype='float32',
    mlp_activations=('gelu', 'linear') if version == '1.1' else ('relu',),
    logits_via_embedding=version == '1.0',
  )
  fields.update(overrides)
  return T5Config(**fields)


def to_params(tensors: dict, cfg) -> dict:
  """Maps HF tensors (parameters or gradients) to our scanned nested dict."""
  get = {k: np.asarray(v.detach().numpy()) for k, v in tensors.items()}

  def stack(side, n, path):
    return np.stack([get[f'{side}.block.{i}.layer.{path}'] for i in range(n)])

  def attention(side, n, where):
    return {
      ours: {'kernel': stack(side, n, f'{where}.{theirs}.weight').transpose(0, 2, 1)}
      for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o'))
    }

  def norm(side, n, layer):
    return {'scale': stack(side, n, f'{layer}.layer_norm.weight')}

  def mlp(side, n, layer):
    names = ['wi_0', 'wi_1'] if len(cfg.mlp_activations) > 1 else ['wi']
    return {
      name: {'kernel': stack(side, n, f'{layer}.DenseReluDense.{name}.weight').transpose(0, 2, 1)}
      for name in [*names, 'wo']
    }

  def bias(side):
    path = f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias'
    return {'rel_embedding': get[path + '.weight'].T}

  n, m = cfg.num_encoder_layers, cfg.num_decoder_layers
  decoder = {
    'relpos_bias': bias('decoder'),
    'layers': {
      'pre_self_attention_layer_norm': norm('decoder', m, 0),
      'self_attention': attention('decoder', m, '0.SelfAttention'),
      'pre_cross_attention_layer_norm': norm('decoder', m, 1),
      'encoder_decoder_attention': attention('decoder', m, '1.EncDecAttention'),
      'pre_mlp_layer_norm': norm('decoder', m, 2),
      'mlp': mlp('decoder', m, 2),
    },
    'decoder_norm': {'scale': get['decoder.final_layer_norm.weight']},
  }
  if not cfg.logits_via_embedding:
    decoder['logits_dense'] = {'kernel': get['lm_head.weight'].T}
  return {
    'token_embedder': {'embedding': get['shared.weight']},
    'encoder': {
      'relpos_bias': bias('encoder'),
      'layers': {
        'pre_attention_layer_norm': norm('encoder', n, 0),
        'attention': attention('encoder', n, '0.SelfAttention'),
        'pre_mlp_layer_norm': norm('encoder', n, 1),
        'mlp': mlp('encoder', n, 1),
      },
      'encoder_norm': {'scale': get['encoder.final_layer_norm.weight']},
    },
    'decoder': decoder,
  }


def batch(seed: int = 0, size: int = 4, M: int = 150, L: int = 12):
  """A padded batch long enough to reach the relative bias's last bucket."""
  rng = np.random.default_rng(seed)
  inputs = rng.integers(2, 96, (size, M)).astype(np.int32)
  targets = rng.integers(2, 96, (size, L)).astype(np.int32)
  for row in range(size):
    inputs[row, M - 7 * row :] = 0
    targets[row, L - row :] = 0
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets != 0).astype(np.float32),
  }


def hf_outputs(model, b, **options):
  """Runs HF on one of our batches."""
  inputs = torch.tensor(b['encoder_input_tokens']).long()
  return model(
    input_ids=inputs,
    attention_mask=(inputs != 0).long(),
    decoder_input_ids=torch.tensor(b['decoder_input_tokens']).long(),
    **options,
  )


def hf_logits(model, b):
  """Returns HF's logits of one of our batches."""
  return hf_outputs(model, b).logits


def hf_loss(model, b):
  """Mean cross entropy over real target tokens."""
  targets = torch.tensor(b['decoder_target_tokens']).long()
  targets = torch.where(targets == 0, -100, targets)
  logits = hf_logits(model, b)
  return torch.nn.functional.cross_entropy(
    logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
  )
