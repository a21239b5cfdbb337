"""Folders of transformers with damaged files: right tensors, or one UsageError.

Headers of safetensors, config.json, the index of shards and tokenizer files are
what somebody else wrote. None may cost more memory or time than the folder is
worth.
"""

import json
import os
import shutil
import struct
import tracemalloc

import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import hf, tensors, trained_model
from tests import tiny_run
from tests.integration import fuzz_readers_test as fuzz

# Larger than anything in these folders, smaller than what a lying header asks.
MAX_BYTES = 64 << 20
ARRAYS = {
  'a': np.arange(12, dtype=np.float32).reshape(3, 4),
  'b': np.arange(5, dtype=np.float16),
  'c': np.float64(3.0) * np.ones((2, 1, 2)),
}


class Bounded:
  """Fails if more memory is asked for meanwhile than such a folder needs."""

  def __enter__(self):
    tracemalloc.start()

  def __exit__(self, *raised):
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_BYTES


def unsigned(bits):
  return st.one_of(
    st.integers(0, 2**bits - 1),
    st.integers(0, 300),
    st.sampled_from([2**k - d for k in (31, 32, 40, 63) for d in (0, 1)]),
  ).filter(lambda n: n < 2**bits)


# ---- safetensors -------------------------------------------------------------


def check_folder(folder, good):
  """Reads every tensor; what is named as before is as before, or refused."""
  with Bounded():
    found = fuzz.refused_or(lambda: hf.read_tensors(folder))
    for name, tensor in (found or {}).items():
      array = fuzz.refused_or(tensor.read)
      if array is None:
        continue
      assert array.shape == tensor.shape and array.nbytes < MAX_BYTES
      assert array.nbytes <= sum(x.stat().st_size for x in folder.iterdir())
      corner = tuple(slice(0, 1) for _ in tensor.shape)
      np.testing.assert_array_equal(tensor.read(corner), array[corner])
      if good is not None:
        np.testing.assert_array_equal(array, good[name])


def split(data):
  """Returns (the header's object, the numbers) of a file."""
  (size,) = struct.unpack('<Q', data[:8])
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, numbers, size=None):
  text = json.dumps(header).encode()
  return struct.pack('<Q', len(text) if size is None else size) + text + numbers


def test_any_bytes_as_safetensors(tmp_path):
  path = tmp_path / 'model.safetensors'
  data = safetensors.numpy.save(ARRAYS)

  @hypothesis.settings(fuzz.settings, max_examples=80 * fuzz.SCALE)
  @hypothesis.given(st.one_of(st.binary(max_size=40), fuzz.mutated(data), fuzz.mutated(data[:9])))
  def check(changed):
    path.write_bytes(changed)
    check_folder(tmp_path, None)

  path.write_bytes(data)
  check_folder(tmp_path, ARRAYS)
  check()


def test_any_header_of_safetensors(tmp_path):
  path = tmp_path / 'model.safetensors'
  header, numbers = split(safetensors.numpy.save(ARRAYS))
  kinds = st.sampled_from('F64 F32 F16 BF16 I64 I8 BOOL U8 F8_E4M3 F8_E5M2 F4 C64 f32 X'.split())
  number = st.one_of(unsigned(64), st.just(-1), st.floats(), st.none())
  entry = st.fixed_dictionaries(
    {},
    optional={
      'dtype': st.one_of(kinds, fuzz.json_values(1)),
      'shape': st.lists(number, max_size=4),
      'data_offsets': st.lists(number, min_size=1, max_size=3),
      'more': st.none(),
    },
  )

  @hypothesis.settings(fuzz.settings, max_examples=120 * fuzz.SCALE)
  @hypothesis.given(
    st.sampled_from(sorted(ARRAYS)),
    entry,
    st.one_of(st.none(), st.none(), unsigned(64)),
    st.one_of(st.none(), st.integers(0, len(numbers))),
    st.dictionaries(
      st.sampled_from(['__metadata__', 'd']), st.one_of(entry, fuzz.json_values('pt'))
    ),
  )
  def check(name, change, size, cut, more):
    changed = {**header, name: {**header[name], **change}, **more}
    path.write_bytes(join(changed, numbers[:cut], size))
    check_folder(tmp_path, None)

  check()


@pytest.mark.parametrize('end', ['"a":{}', '"a":' + '[' * 200_000])
def test_headers_that_lie_about_their_size(tmp_path, end):
  for size in (2**63, 2**40, 100_000_000, 99_999_999):
    (tmp_path / 'model.safetensors').write_bytes(struct.pack('<Q', size) + b'{' + end.encode())
    check_folder(tmp_path, None)


# ---- The other files of a folder ---------------------------------------------


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """A small model with a SentencePiece vocabulary in tokenizer.json."""
  import t5x_lite

  path = tmp_path_factory.mktemp('good') / 'model'
  vocabulary = VocabularyConfig(path='package:quickstart')
  config = tiny_run.model(
    vocab_size=vocabularies.make_vocabulary(vocabulary).vocab_size, scan_layers=False
  )
  t5x_lite.new(config, vocabulary).save(str(path), format='hf')
  return path


@pytest.fixture
def folder(good, tmp_path):
  shutil.copytree(good, tmp_path / 'model')
  return tmp_path / 'model'


def open_all(folder):
  """Opens a folder and what it says of its vocabulary, as programs do."""

  def opened():
    model = trained_model.open_model(str(folder))
    return model, vocabularies.make_vocabulary(model.vocabulary)

  with Bounded():
    found = fuzz.refused_or(opened)
  if found is not None:
    model, vocabulary = found
    assert vocabulary.vocab_size <= model.config.vocab_size
    assert isinstance(vocabulary.encode('a b'), list)
    array = model.tensors['token_embedder/embedding']
    assert array.shape == (model.config.vocab_size, model.config.emb_dim)
  return found


@pytest.mark.parametrize('name', ['config.json', 'tokenizer_config.json', 'tokenizer.json'])
def test_damaged_json(folder, name):
  assert open_all(folder) is not None
  path = folder / name
  data = path.read_bytes()
  if name == 'tokenizer.json':
    os.remove(folder / 'spiece.model')  # else hardly read

  @hypothesis.settings(fuzz.settings, max_examples=30 * fuzz.SCALE)
  @hypothesis.example(b'\xff')
  @hypothesis.example(b'[' * 100_000)
  @hypothesis.example(b'{"model_type": ' + b'1' * 5000 + b'}')
  @hypothesis.given(
    st.one_of(
      st.binary(max_size=20),
      fuzz.mutated(data),
      fuzz.mutated(data[:400]),
      fuzz.json_values('model_type').map(lambda v: json.dumps(v).encode()),
    )
  )
  def check(changed):
    path.write_bytes(changed)
    open_all(folder)

  check()


LARGE = [0, -1, 1.5, 2**31, 2**63, 10**30, 1e300, float('inf'), float('nan')]


def any_value(*special):
  return st.one_of(st.sampled_from([*LARGE, *special]), fuzz.json_values('t5'))


def test_any_setting_in_config_json(folder):
  path = folder / 'config.json'
  entry = json.loads(path.read_text())
  keys = sorted({*entry, 'dense_act_fn', 'scale_decoder_outputs', 'num_heads'})

  @hypothesis.settings(fuzz.settings, max_examples=120 * fuzz.SCALE)
  @hypothesis.given(
    st.dictionaries(
      st.sampled_from(keys), any_value('umt5', 'mt5', 'gated-', 'gated-gelu', 'relu', 4), max_size=3
    )
  )
  def check(changes):
    path.write_text(json.dumps({**entry, **changes}))
    open_all(folder)

  check()


def test_any_setting_of_the_tokenizer(good, folder):
  path = folder / 'tokenizer_config.json'
  entry = json.loads(path.read_text())
  os.remove(folder / 'spiece.model')
  keys = ['extra_ids', 'tokenizer_class', 'additional_special_tokens']

  @hypothesis.settings(fuzz.settings, max_examples=60 * fuzz.SCALE)
  @hypothesis.given(
    st.booleans(),
    st.dictionaries(st.sampled_from(keys), any_value('ByT5Tokenizer', ['<extra_id_0>'])),
  )
  def check(spiece, changes):
    path.write_text(json.dumps({**entry, **changes}))
    if spiece:
      shutil.copy(
        vocabularies.model_path(VocabularyConfig(path='package:quickstart')),
        folder / 'spiece.model',
      )
    else:
      (folder / 'spiece.model').unlink(missing_ok=True)
    open_all(folder)

  check()


def test_any_entry_of_tokenizer_json(folder):
  path = folder / 'tokenizer.json'
  entry = json.loads(path.read_text())
  os.remove(folder / 'spiece.model')
  places = [
    ('model',),
    ('model', 'vocab'),
    ('model', 'vocab', 5),
    ('model', 'vocab', -1),
    ('model', 'vocab', 2, 0),
    ('model', 'vocab', 7, 1),
    ('model', 'type'),
    ('model', 'byte_fallback'),
    ('added_tokens',),
    ('added_tokens', 0),
    ('added_tokens', 0, 'content'),
    ('normalizer',),
    ('normalizer', 'type'),
    ('normalizer', 'normalizers'),
    ('normalizer', 'precompiled_charsmap'),
  ]

  @hypothesis.settings(fuzz.settings, max_examples=80 * fuzz.SCALE)
  @hypothesis.given(st.sampled_from(places), any_value('Unigram', 'Precompiled', 'AAAA'))
  def check(place, value):
    changed = json.loads(json.dumps(entry))
    inside = changed
    for key in place[:-1]:
      inside = inside[key]
      if not isinstance(inside, (dict, list)):
        return
    inside[place[-1]] = value
    path.write_text(json.dumps(changed))
    open_all(folder)

  check()


def test_any_index_of_shards(folder):
  path = folder / hf.WEIGHTS_INDEX
  names = st.one_of(
    st.sampled_from(['model.safetensors', '../x', '', '.', 'a\0b']),
    fuzz.json_values('model.safetensors'),
  )
  maps = st.dictionaries(st.text(max_size=3), names, max_size=3)

  @hypothesis.settings(fuzz.settings, max_examples=60 * fuzz.SCALE)
  @hypothesis.given(st.one_of(st.fixed_dictionaries({'weight_map': st.one_of(maps, names)}), names))
  def check(value):
    path.write_text(json.dumps(value))
    open_all(folder)

  check()


def test_any_names_and_shapes_of_tensors(folder):
  path = folder / hf.WEIGHTS
  arrays = {name: tensor.read() for name, tensor in hf.read_tensors(folder).items()}
  names = st.one_of(
    st.sampled_from(
      [
        'shared.weight',
        'lm_head.weight',
        'encoder.embed_tokens.weight',
        'encoder.block.999999999.layer.0.SelfAttention.q.weight',
        'encoder.block.²',
        'encoder.block.' + '9' * 5000,
        'decoder.final_layer_norm.weight',
        'x',
      ]
    ),
    st.sampled_from(sorted(arrays)),
  )
  shapes = st.lists(st.integers(0, 4), max_size=3)

  @hypothesis.settings(fuzz.settings, max_examples=80 * fuzz.SCALE)
  @hypothesis.given(st.dictionaries(names, shapes, max_size=2), st.lists(names, max_size=1))
  def check(added, removed):
    made = {name: np.zeros(shape, np.float32) for name, shape in added.items()}
    kept = {k: v for k, v in arrays.items() if k not in removed}
    safetensors.numpy.save_file({**kept, **made}, path)
    open_all(folder)

  check()


def test_a_damaged_sentencepiece_model(folder):
  path = folder / 'spiece.model'
  data = path.read_bytes()

  @hypothesis.settings(fuzz.settings, max_examples=40 * fuzz.SCALE)
  @hypothesis.given(st.one_of(fuzz.mutated(data), fuzz.mutated(data[:300])))
  def check(changed):
    path.write_bytes(changed)
    open_all(folder)

  check()


def test_what_blocks_of_a_tensor_cost():
  """Shapes with zeros and ones, as a header may name them."""

  @hypothesis.settings(fuzz.settings, max_examples=80 * fuzz.SCALE)
  @hypothesis.given(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 40))
  def check(shape, limit):
    seen = np.zeros(shape, int)
    for index in tensors.blocks(shape, limit):
      seen[index] += 1
    assert (seen == 1).all()

  check()
