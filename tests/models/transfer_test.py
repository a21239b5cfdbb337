"""LoRA, adapters and prompts against their formulas, in every layout."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.errors import UsageError
from t5x_lite.models import layers, t5, transfer
from t5x_lite.models.blocks import EncoderLayer
from t5x_lite.parallel import pytrees
from tests.models import tiny

LORA = {'lora_rank': 3, 'lora_alpha': 6.0, 'lora_targets': ('query', 'value', 'wi_1', 'wo', 'out')}
ADAPTERS = {'adapter_dim': 5}
PROMPT = {'prompt_length': 4}
ALL = {**LORA, **ADAPTERS, **PROMPT}


def logits(cfg, params, batch, **kwargs):
  return np.asarray(tiny.apply(cfg, params, '__call__', {**batch, **kwargs}))


def with_base(params, base):
  """Returns params with those of a plain model where it has them."""
  if not isinstance(params, dict):
    return base
  return {k: with_base(v, base[k]) if k in base else v for k, v in params.items()}


def test_lora_is_its_formula():
  cfg = tiny.config(**LORA)
  linear = layers.Linear((16, 8), ('embed', 'mlp'), cfg, name='wo', rngs=nnx.Rngs(params=0))
  rng = np.random.default_rng(0)
  x, b = rng.standard_normal((2, 3, 16)), rng.standard_normal((3, 8))
  w, a = np.asarray(linear.kernel[...]), np.asarray(linear.lora_a[...])
  assert np.abs(a).max() <= 16**-0.5 and not np.any(linear.lora_b[...])
  linear.lora_b[...] = jnp.asarray(b, jnp.float32)
  wanted = x @ w + (6.0 / 3) * ((x @ a) @ b)
  np.testing.assert_allclose(linear(jnp.asarray(x, jnp.float32)), wanted, atol=1e-5)


@pytest.mark.parametrize('places', [('attention', 'mlp'), ('mlp',)])
def test_adapters_stand_before_the_residual_is_added(places):
  cfg = tiny.config(**ADAPTERS, adapter_places=places)
  layer = EncoderLayer(cfg, rngs=nnx.Rngs(params=0))
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 7, 16)), jnp.float32)
  ups = {}
  for name in [f'{place}_adapter' for place in places]:
    ups[name] = rng.standard_normal((5, 16)).astype(np.float32)
    getattr(layer, name).up.kernel[...] = jnp.asarray(ups[name])

  def adapted(name, y):
    if name not in ups:
      return y
    down = np.asarray(getattr(layer, name).down.kernel[...])
    return y + np.maximum(y @ down, 0) @ ups[name]

  y, own = layer.pre_attention_layer_norm(x), layer.attention
  h = x + adapted('attention_adapter', np.asarray(own.attend(own.queries(y), *own.keys_values(y))))
  wanted = h + adapted('mlp_adapter', np.asarray(layer.mlp(layer.pre_mlp_layer_norm(h))))
  got = layer(x, bias=None, mask=None, key=None)
  np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_prompt_is_tokens_of_its_own():
  """As a plain model whose embedding has the prompt's rows too."""
  cfg = tiny.config(**PROMPT)
  params, batch = tiny.params(cfg), tiny.batch()
  prompt = params['encoder'].pop('prompt')
  ids = np.broadcast_to(np.arange(64, 68, dtype=np.int32), (4, 4))
  longer = jax.tree.map(lambda x: x, params)
  longer['token_embedder']['embedding'] = np.vstack([params['token_embedder']['embedding'], prompt])
  head = params['decoder']['logits_dense']['kernel']
  longer['decoder']['logits_dense']['kernel'] = np.pad(head, ((0, 0), (0, 4)))
  tokens = np.concatenate([ids, batch['encoder_input_tokens']], axis=1)
  wanted = logits(tiny.config(vocab_size=68), longer, {**batch, 'encoder_input_tokens': tokens})
  params['encoder']['prompt'] = prompt
  np.testing.assert_allclose(logits(cfg, params, batch), wanted[:, :, :64], atol=1e-5)


@pytest.mark.parametrize('scan', [True, False])
def test_lora_and_adapters_change_nothing_at_first(scan):
  plain = tiny.config()
  base = tiny.params(plain)
  cfg = plain.replace(scan_layers=scan, **LORA, **ADAPTERS)
  init = jax.jit(t5.init_params, static_argnums=0)
  params = jax.device_get(init(cfg.replace(scan_layers=True), jax.random.key(1)))
  params = with_base(params, base)
  if not scan:
    params, base = tiny.unstack(params, cfg), tiny.unstack(base, cfg)
  batch = tiny.batch()
  wanted = logits(plain.replace(scan_layers=scan), base, batch)
  np.testing.assert_array_equal(logits(cfg, params, batch), wanted)


@pytest.mark.parametrize(
  'changes',
  [
    {**ALL, 'num_decoder_layers': 2},
    {**ALL, 'share_encoder_decoder': True, 'num_decoder_layers': 1},
  ],
)
def test_scanned_unrolled_rematerialised_and_cached_are_the_same(changes):
  cfg = tiny.config(num_encoder_layers=1, **changes)
  params, batch = tiny.params(cfg), tiny.batch()
  wanted = logits(cfg, params, batch)
  unrolled = cfg.replace(scan_layers=False)
  np.testing.assert_allclose(logits(unrolled, tiny.unstack(params, cfg), batch), wanted, atol=1e-5)
  np.testing.assert_allclose(
    logits(cfg.replace(remat_policy='save_names'), params, batch), wanted, atol=1e-5
  )

  @jax.jit
  def stepwise(params):
    model = nnx.merge(t5.abstract_params(cfg)[0], params)
    inputs = batch['encoder_input_tokens']
    encoded = model.encode(inputs)
    cache = model.init_cache(encoded, inputs, batch_size=4, max_decode_length=6)
    found = []
    for i in range(6):
      step, cache = model.decode_step(batch['decoder_input_tokens'][:, i], cache)
      found.append(step)
    return jnp.stack(found, axis=1)

  np.testing.assert_allclose(stepwise(params), wanted, atol=1e-4)


def test_packed_rows_have_no_place_for_a_prompt():
  cfg, batch = tiny.config(**PROMPT), tiny.pack(tiny.batch(), 2)
  with pytest.raises(UsageError, match='pack=False'):
    logits(cfg, tiny.params(cfg), batch)


def test_what_trains_follows_from_the_parameters():
  def trained(**fields):
    _, shapes, _ = t5.abstract_params(tiny.config(scan_layers=False, **fields))
    names = pytrees.flatten_names(shapes)
    pattern = transfer.trained_pattern(names)
    return pattern and {name for name in names if re.search(pattern, name)}

  assert trained() is None
  assert trained(**PROMPT) == {'encoder/prompt'}
  lora = trained(**LORA)
  assert lora and all(name.endswith(('/lora_a', '/lora_b')) for name in lora)
  # query, value, out, wi_1, wo: of 2 encoder layers, and 3 with two attentions.
  assert len(lora) == 2 * (2 * 5 + 3 * 8)
  adapters = trained(**ADAPTERS)
  assert adapters and {n for n in adapters if 'adapter' not in n} == {
    n
    for n in pytrees.flatten_names(t5.abstract_params(tiny.config(scan_layers=False))[1])
    if n.endswith('norm/scale')
  }


def test_fields_make_the_same_model():
  cfg = tiny.config(**ALL)
  assert tiny.config(**transfer.fields(cfg)) == cfg
  assert transfer.fields(tiny.config()) == {}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'lora_rank': 0}, 'lora_rank is 0; it must be at least 1'),
    ({'lora_rank': 4, 'lora_alpha': -1.0}, 'lora_alpha is -1.0'),
    ({'lora_rank': 4, 'lora_targets': ('queri',)}, "'queri',\\); it must be of query"),
    ({'lora_rank': 4, 'lora_targets': ('wi',)}, 'wi_0, wi_1, wo'),
    ({'lora_targets': ('wo',)}, 'lora_rank is None'),
    ({'adapter_dim': -1}, 'adapter_dim is -1'),
    ({'adapter_dim': 4, 'adapter_places': ('heads',)}, 'attention, mlp'),
    ({'adapter_places': ('mlp',)}, 'adapter_dim is None'),
    ({'prompt_length': 4, 'architecture': 'decoder'}, 'no encoder'),
  ],
)
def test_mistakes_are_one_line(fields, message):
  with pytest.raises(UsageError, match=message) as error:
    tiny.config(**fields)
  assert '\n' not in str(error.value)
