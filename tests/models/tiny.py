"""Tiny models and batches for tests."""

import functools

import jax
import numpy as np
from flax import nnx

from t5x_lite.models import t5
from t5x_lite.models.config import T5Config


def config(**overrides) -> T5Config:
  fields = dict(
    vocab_size=64,
    emb_dim=16,
    num_heads=4,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=3,
    dtype='float32',
  )
  return T5Config(**{**fields, **overrides})


def params(cfg: T5Config, seed: int = 0):
  """Random parameters in which no norm is 1 and no bias is negligible."""
  # Without what shapes no parameter, so that tests share them.
  cfg = cfg.replace(dtype='float32', dropout_rate=0.0, remat_policy='none', attention='auto')
  return jax.tree.map(np.array, _drawn(cfg, seed))


@functools.lru_cache(maxsize=64)
def _drawn(cfg, seed):
  # One program, not one a parameter: compiling is what takes time here.
  tree = jax.jit(t5.init_params, static_argnums=0)(cfg, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (x + 0.1 * rng.standard_normal(x.shape)).astype(x.dtype), jax.device_get(tree)
  )


def apply(cfg: T5Config, tree, method, *args, **kwargs):
  """Calls a method of the merged model, jitted."""
  return _jitted(cfg, method)(tree, args, kwargs)


@functools.lru_cache(maxsize=32)
def _jitted(cfg, method):
  graphdef, _, _ = t5.abstract_params(cfg)

  @jax.jit
  def run(tree, args, kwargs):
    return getattr(nnx.merge(graphdef, tree), method)(*args, **kwargs)

  return run


def batch(B: int = 4, M: int = 9, L: int = 6, seed: int = 0, vocab: int = 64):
  """A padded, unpacked batch; row i is i tokens shorter than the row."""
  rng = np.random.default_rng(seed)
  inputs = rng.integers(2, vocab, (B, M)).astype(np.int32)
  targets = rng.integers(2, vocab, (B, L)).astype(np.int32)
  for i in range(B):
    inputs[i, M - i % 4 :] = 0
    targets[i, L - i % 4 :] = 0
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets != 0).astype(np.float32),
  }


def pack(b, rows: int):
  """Packs the rows of an unpacked batch, B / rows of them into each row."""
  B = b['encoder_input_tokens'].shape[0]
  per_row = B // rows
  out = {}
  for side, tokens in (('encoder', 'encoder_input_tokens'), ('decoder', 'decoder_target_tokens')):
    real = b[tokens] != 0
    length = max(real[r * per_row : (r + 1) * per_row].sum() for r in range(rows))
    length += 2
    names = [n for n in b if n.startswith(side)]
    new = {n: np.zeros((rows, length), b[n].dtype) for n in names}
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for r in range(rows):
      start = 0
      for s in range(per_row):
        i = r * per_row + s
        n = int(real[i].sum())
        for name in names:
          new[name][r, start : start + n] = b[name][i, :n]
        segments[r, start : start + n] = s + 1
        positions[r, start : start + n] = np.arange(n)
        start += n
    out.update(new)
    out[f'{side}_segment_ids'] = segments
    out[f'{side}_positions'] = positions
  return out


def unstack(tree, cfg: T5Config):
  """The same parameters in the layout of scan_layers=False."""
  out = jax.tree.map(lambda x: x, tree)
  for side, n in (('encoder', cfg.num_encoder_layers), ('decoder', cfg.num_decoder_layers)):
    if side not in out:
      continue
    layers = out[side]['layers']
    out[side]['layers'] = {i: jax.tree.map(lambda x, i=i: x[i], layers) for i in range(n)}
  return out
