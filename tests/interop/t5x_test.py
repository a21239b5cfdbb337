"""T5X's checkpoints: its own, and others built here from its documented form.

The fixtures were written by T5X (its public test data).
"""

import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import serialization

import t5x_lite
from t5x_lite import errors
from t5x_lite.interop import checkpoint_source, export, t5x, tensor_names, tensors, zarr
from t5x_lite.interop.checkpoint_source import Source
from t5x_lite.parallel import pytrees
from tests.models import tiny

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 't5x'

# ---- An independent evaluation of T5 1.1 in numpy ----


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def rms_norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def bucket(distance, bidirectional):
  """The bucket of key position minus query position, one at a time."""
  buckets, result, n = 32, 0, -distance
  if bidirectional:
    buckets = 16
    if n < 0:
      result, n = 16, -n
  else:
    n = max(n, 0)
  exact = buckets // 2
  if n < exact:
    return result + n
  large = exact + int(np.log(n / exact) / np.log(128 / exact) * exact)
  return result + min(large, buckets - 1)


def bias(table, queries, keys, bidirectional):
  return np.array(
    [
      [[table[h, bucket(k - q, bidirectional)] for k in range(keys)] for q in range(queries)]
      for h in range(table.shape[0])
    ]
  )


def attention(p, x, memory, added, heads):
  def split(y):
    return y.reshape(len(y), heads, -1).transpose(1, 0, 2)

  q, k, v = (
    split(y @ p[name]['kernel']) for name, y in (('query', x), ('key', memory), ('value', memory))
  )
  weights = softmax(q @ k.transpose(0, 2, 1) + added)
  return (weights @ v).transpose(1, 0, 2).reshape(len(x), -1) @ p['out']['kernel']


def gelu(x):
  return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def mlp(p, x):
  hidden = gelu(x @ p['wi_0']['kernel']) * (x @ p['wi_1']['kernel'])
  return hidden @ p['wo']['kernel']


def t5_1_1(p, inputs, decoder_inputs):
  """Logits of one unpadded example, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  table = p['token_embedder']['embedding']
  heads = p['encoder']['relpos_bias']['rel_embedding'].shape[0]
  x = table[inputs]
  added = bias(p['encoder']['relpos_bias']['rel_embedding'], len(x), len(x), True)
  for i in range(2):
    layer = p['encoder'][f'layers_{i}']
    y = rms_norm(x, layer['pre_attention_layer_norm']['scale'])
    x = x + attention(layer['attention'], y, y, added, heads)
    y = rms_norm(x, layer['pre_mlp_layer_norm']['scale'])
    x = x + mlp(layer['mlp'], y)
  memory = rms_norm(x, p['encoder']['encoder_norm']['scale'])
  x = table[decoder_inputs]
  added = bias(p['decoder']['relpos_bias']['rel_embedding'], len(x), len(x), False)
  added = np.where(np.tril(np.ones(added.shape[1:])), added, -np.inf)
  for i in range(2):
    layer = p['decoder'][f'layers_{i}']
    y = rms_norm(x, layer['pre_self_attention_layer_norm']['scale'])
    x = x + attention(layer['self_attention'], y, y, added, heads)
    y = rms_norm(x, layer['pre_cross_attention_layer_norm']['scale'])
    x = x + attention(layer['encoder_decoder_attention'], y, memory, 0, heads)
    y = rms_norm(x, layer['pre_mlp_layer_norm']['scale'])
    x = x + mlp(layer['mlp'], y)
  x = rms_norm(x, p['decoder']['decoder_norm']['scale'])
  return x @ p['decoder']['logits_dense']['kernel']


def test_t5xs_tiny_t5_gives_the_logits_of_its_arrays():
  file = FIXTURES / 'test_t5_tiny.checkpoint_0'
  model = t5x_lite.load(str(file))
  assert model.config.mlp_activations == ('gelu', 'linear')
  assert not model.config.logits_via_embedding
  assert model.step == 0
  target = serialization.msgpack_restore(file.read_bytes())['optimizer']['target']
  rng = np.random.default_rng(0)
  for length, decoder_length in ((150, 9), (17, 33)):
    inputs = rng.integers(2, 32100, length)
    decoder_inputs = np.concatenate([[0], rng.integers(2, 32100, decoder_length)])
    expected = t5_1_1(target, inputs, decoder_inputs)
    padded = np.pad(inputs, (0, 160 - length))[None]
    ours = model.logits(padded, decoder_inputs[None])[0]
    assert np.abs(expected).max() > 0.5, 'the test would pass on zeros'
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
  # It runs: its vocabulary is the official one, by its size.
  assert isinstance(model.generate('Hello', max_new_tokens=3), str)


def test_t5xs_arrays_are_read_bit_for_bit():
  file = FIXTURES / 'test_t5_tiny.checkpoint_0'
  target = serialization.msgpack_restore(file.read_bytes())['optimizer']['target']
  opened = checkpoint_source.open_source(str(file))
  assert opened.unknown == []
  leaves = jax.tree_util.tree_leaves_with_path(target)
  assert len(leaves) == len(opened.tensors)
  for keys, array in leaves:
    tensor = opened.tensors[pytrees.path_name(keys)]
    np.testing.assert_array_equal(tensor.read(), array)


def test_t5xs_zarr_arrays_are_read_bit_for_bit():
  # The .zarray files are missing there, as T5X's repository leaves them out:
  # the specs in the msgpack file have what they say.
  found = t5x.read_tensors(t5x.find(epath.Path(FIXTURES / 'tiny_t5')))
  assert found['state/param_states/bias'].read().tolist() == [1.0] * 5
  kernel = found['state/param_states/kernel'].read()
  assert (kernel.shape, kernel.dtype) == ((10, 5), np.float64)
  import gzip

  raw = FIXTURES / 'tiny_t5/checkpoint_1/state.param_states.kernel/0.0'
  assert kernel.tobytes() == gzip.decompress(raw.read_bytes())
  assert found['state/param_states/step'].read() == 1
  assert int(found['state/step'].read()) == 1


def test_t5xs_early_orbax_checkpoint(tmp_path):
  folder = FIXTURES / 'tiny_orbax' / '1'
  with pytest.raises(errors.UsageError, match=r'no \.zarray'):
    t5x.read_tensors(t5x.find(epath.Path(folder)))
  # Constructed: the .zarray files that the fixture lacks.
  copy = tmp_path / '1'
  shutil.copytree(folder, copy)
  copy.chmod(0o755)
  for name, shape, dtype in (
    ('state.param_states.bias', [5], '<f4'),
    ('state.param_states.kernel', [10, 5], '<f8'),
    ('state.param_states.step', [], '<i4'),
    ('state.step', [], '<i4'),
  ):
    place = copy / f'_optimizer.{name}'
    place.chmod(0o755)
    entry = {
      'zarr_format': 2, 'shape': shape, 'chunks': shape, 'dtype': dtype,
      'compressor': {'id': 'zstd', 'level': 1}, 'fill_value': None,
      'order': 'C', 'filters': None,
    }  # fmt: skip
    import json

    (place / '.zarray').write_text(json.dumps(entry))
  found = t5x.read_tensors(t5x.find(epath.Path(copy)))
  assert found['state/param_states/bias'].read().tolist() == [1.0] * 5
  assert found['state/param_states/kernel'].read().shape == (10, 5)
  assert int(found['state/step'].read()) == 1


# ---- Constructed here from the documented layout ----


def scanned_tree(cfg, found):
  """The tree that scalable_t5 keeps: layers stacked on axis 1."""
  flat = {}
  for name in tensor_names.shapes(cfg):
    place, layer = tensor_names.t5x_scanned_name(name)
    if layer is None:
      flat[place] = found[name].read()
    else:
      flat.setdefault(place, []).append(found[name].read())
  return {name: np.stack(x, 1) if isinstance(x, list) else x for name, x in flat.items()}


def nested(flat):
  tree = {}
  for name, value in flat.items():
    *parents, last = name.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


@pytest.fixture(scope='module')
def umt5():
  cfg = tiny.config(relpos_per_layer=True)
  return cfg, tensors.of_params(tiny.params(cfg), cfg)


def check_same(path, cfg, found):
  opened = checkpoint_source.open_source(str(path))
  fields = {
    'emb_dim',
    'head_dim',
    'num_heads',
    'mlp_dim',
    'vocab_size',
    'num_encoder_layers',
    'num_decoder_layers',
    'architecture',
    'relpos_per_layer',
    'logits_via_embedding',
  }
  if not cfg.has_encoder:
    fields.remove('num_encoder_layers')
  for field in fields:
    assert getattr(opened.config, field) == getattr(cfg, field), field
  assert not opened.unknown
  for name, tensor in found.items():
    np.testing.assert_array_equal(opened.tensors[name].read(), tensor.read())
  return opened


def test_constructed_scanned_msgpack(umt5, tmp_path):
  cfg, found = umt5
  contents = {
    'version': 3,
    'optimizer': {
      'state': {'step': np.int32(7), 'param_states': {}},
      'target': nested(scanned_tree(cfg, found)),
    },
  }
  (tmp_path / 'checkpoint_7').mkdir()
  (tmp_path / 'checkpoint_7' / 'checkpoint').write_bytes(serialization.msgpack_serialize(contents))
  assert check_same(tmp_path, cfg, found).step == 7


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('use_ocdbt', [True, False])
def test_constructed_orbax(umt5, dtype, use_ocdbt, tmp_path):
  cfg, found = umt5
  kind = np.dtype(ml_dtypes.bfloat16) if dtype == 'bfloat16' else np.float32
  flat = {k: v.astype(kind) for k, v in scanned_tree(cfg, found).items()}
  state = {
    'target': nested(flat),
    'state': {'step': np.int32(3), 'param_states': {'x': np.zeros(1)}},
  }
  folder = tmp_path / 'checkpoint_3'
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
    checkpointer.save(folder / 'state', args=ocp.args.PyTreeSave(state))
  rounded = {name: tensors.of_array(tensor.read().astype(kind)) for name, tensor in found.items()}
  assert check_same(tmp_path, cfg, rounded).step == 3


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'mlp_activations': ('relu',), 'logits_via_embedding': True},
    {'relpos_per_layer': True},
    {'architecture': 'decoder'},
    {'relpos_per_layer': True, 'num_encoder_layers': 1},
  ],
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trips_are_bit_identical(fields, dtype, tmp_path):
  cfg = tiny.config(param_dtype=dtype, **fields)
  found = tensors.of_params(tiny.params(cfg), cfg)
  export.write(epath.Path(tmp_path / 'out'), Source('', 't5x', cfg, found, step=11), to='t5x')
  opened = check_same(tmp_path / 'out', cfg, found)
  assert opened.step == 11
  assert opened.config.mlp_activations == cfg.mlp_activations
  assert {t.dtype.name for t in opened.tensors.values()} == {dtype}
  assert opened.path.endswith('checkpoint_11')
  for name, tensor in opened.tensors.items():
    part = tuple(slice(0, 1 + n // 2) for n in tensor.shape)
    np.testing.assert_array_equal(tensor.read(part), found[name].read()[part])


def test_the_newest_step_is_meant(umt5, tmp_path):
  cfg, found = umt5
  for step in (2, 10, 9):
    source = Source('', 't5x', cfg, found, step=step)
    export.write(epath.Path(tmp_path / f'{step}'), source, to='t5x')
    (tmp_path / f'{step}' / f'checkpoint_{step}').rename(tmp_path / f'checkpoint_{step}')
  (tmp_path / 'checkpoint_20.tmp-123').mkdir()
  assert checkpoint_source.open_source(str(tmp_path)).step == 10
  assert checkpoint_source.open_source(str(tmp_path / 'checkpoint_9')).step == 9


def test_activations_of_a_gin_file_beside_it(umt5, tmp_path):
  cfg, found = umt5
  export.write(epath.Path(tmp_path / 'out'), Source('', 't5x', cfg, found), to='t5x')
  (tmp_path / 'out' / 'config.gin').write_text(
    "network.T5Config:\n  mlp_activations = ('swish', 'linear')\n"
  )
  opened = checkpoint_source.open_source(str(tmp_path / 'out'))
  assert opened.config.mlp_activations == ('swish', 'linear')


def write_msgpack(folder, contents):
  (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(contents))


def test_damaged_checkpoints(umt5, tmp_path):
  spec = {
    'driver': 'zarr', 'dtype': 'float32',
    'kvstore': {'driver': 'file', 'path': '../elsewhere/'},
    'metadata': {'shape': [2], 'chunks': [2], 'compressor': None},
  }  # fmt: skip
  for version, target, match in (
    (1, {}, 'version 1'),
    (3, {'a': spec}, 'elsewhere'),
    (3, {'a': {**spec, 'dtype': 'uint16', 'kvstore': {'driver': 'file', 'path': 'a'}}}, 'uint16'),
    (3, {'a': np.zeros(3)}, 'not a T5 model'),
  ):
    write_msgpack(tmp_path, {'version': version, 'optimizer': {'target': target}})
    with pytest.raises(errors.UsageError, match=match):
      checkpoint_source.open_source(str(tmp_path))
  for place in ('../elsewhere', '/etc', 'a/../../b', '', 'gs://b/a'):
    write_msgpack(tmp_path, {'optimizer': {'target': {'a': f'PLACEHOLDER://{place}'}}})
    with pytest.raises(errors.UsageError, match=f"is stored at '{place}', not in"):
      checkpoint_source.open_source(str(tmp_path))
  (tmp_path / 'checkpoint').write_bytes(b'\x82\xa7version')
  with pytest.raises(errors.UsageError, match='cut short'):
    checkpoint_source.open_source(str(tmp_path))


def test_a_missing_array_is_no_zero(umt5, tmp_path):
  cfg, found = umt5
  export.write(epath.Path(tmp_path / 'out'), Source('', 't5x', cfg, found), to='t5x')
  place = tmp_path / 'out/checkpoint_0/target.decoder.decoder_norm.scale'
  shutil.rmtree(place)
  with pytest.raises(errors.UsageError, match='decoder_norm'):
    checkpoint_source.open_source(str(tmp_path / 'out'))


def test_a_scanned_array_is_decoded_once(tmp_path):
  array = np.arange(60.0).reshape(3, 4, 5)
  store = zarr.create(
    str(tmp_path / 'a'), array.shape, array.dtype, array.shape,
    zarr.ORBAX_COMPRESSOR,
  )  # fmt: skip
  store.write(array).result()
  tensor = zarr.file_tensor(epath.Path(tmp_path / 'a'), 'a', zarr.Reader())
  first = tensor.layer(1, 0)
  np.testing.assert_array_equal(first.read(), array[:, 0])
  shutil.rmtree(tmp_path / 'a')  # the rest comes from memory
  np.testing.assert_array_equal(tensor.layer(1, 3).read(), array[:, 3])
