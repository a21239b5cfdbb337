import numpy as np
import pytest
from etils import epath

from t5x_lite import api, errors, main
from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import checkpoint_source, export, tensors
from t5x_lite.programs import grow_vocabulary
from tests.models import tiny

TOKENS = ('{', '}', '\n', '<mask token>')


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  """A small SentencePiece vocabulary: 60 pieces and 5 sentinels."""
  whole = vocabularies.parse_model(
    epath.Path(vocabularies.model_path(VocabularyConfig())).read_bytes()
  )
  path = tmp_path_factory.mktemp('grow') / 'small.model'
  path.write_bytes(
    vocabularies.make_model(whole.pieces[:60], whole.normalizer_spec.precompiled_charsmap)
  )
  return VocabularyConfig(path=str(path), extra_ids=5)


def model(vocabulary, **fields):
  cfg = tiny.config(vocab_size=70, **fields)
  return api.Model(cfg, tiny.params(cfg), vocabulary)


def rows(params, name):
  if name == 'embedding':
    return np.asarray(params['token_embedder']['embedding'])
  return np.asarray(params['decoder']['logits_dense']['kernel']).T


@pytest.mark.parametrize('tied', [True, False])
def test_old_rows_are_kept_bit_for_bit(vocabulary, tied):
  old = model(vocabulary, logits_via_embedding=tied)
  new = old.grow_vocabulary(TOKENS, extra_ids=8)
  assert new.vocabulary.vocab_size == 60 + 4 + 8
  assert new.config.vocab_size == 128  # the next multiple
  for table in ('embedding',) if tied else ('embedding', 'head'):
    before, after = rows(old.params, table), rows(new.params, table)
    assert after.shape == (128, 16)
    mean = before[:65].astype(np.float64).mean(0).astype(np.float32)
    for i in range(65):
      piece = old.vocabulary.piece(i)
      j = next(k for k in range(72) if new.vocabulary.piece(k) == piece)
      assert (j == i) == (i < 60), 'only sentinels move'
      np.testing.assert_array_equal(after[j], before[i])
    for token in TOKENS:
      (j,) = (
        k for k in range(72)
        if new.vocabulary.piece(k) == token.replace(' ', '▁')
      )  # fmt: skip
      np.testing.assert_array_equal(after[j], mean)
    assert new.vocabulary.piece(71) == '▁<extra_id_0>'
  # What has no row of its own is left alone.
  a = old.params['decoder']['layers']['mlp']['wo']['kernel']
  b = new.params['decoder']['layers']['mlp']['wo']['kernel']
  np.testing.assert_array_equal(a, b)


def test_logits_of_old_ids_are_those_of_before(vocabulary):
  old = model(vocabulary)
  new = old.grow_vocabulary(TOKENS)
  rng = np.random.default_rng(0)
  inputs, targets = rng.integers(2, 60, (2, 3, 7))
  a, b = (m.logits(inputs, targets) for m in (old, new))
  np.testing.assert_allclose(a[..., :60], b[..., :60], atol=1e-6)


def test_new_tokens_are_found_in_text(vocabulary):
  new = model(vocabulary).grow_vocabulary(TOKENS)
  ids = new.vocabulary.encode('a{b}\nc')
  assert {60, 61, 62} <= set(ids)
  assert '{' in new.vocabulary.decode(ids)


def test_a_multiple_of_128_is_filled_before_it_grows(vocabulary):
  cfg = tiny.config(vocab_size=128)
  found = tensors.of_params(tiny.params(cfg), cfg)
  source = checkpoint_source.Source('', 't5x_lite', cfg, found, vocabulary=vocabulary)
  grown, changes = grow_vocabulary.grow(source, tokens=['{'])
  assert grown.config.vocab_size == 128
  assert 'become 66, ' in changes
  before = found['token_embedder/embedding'].read()
  after = grown.tensors['token_embedder/embedding'].read()
  np.testing.assert_array_equal(after[66:], before[66:])  # spare rows
  np.testing.assert_array_equal(after[61:66], before[60:65])  # sentinels
  np.testing.assert_array_equal(after[:60], before[:60])


def test_bytes_can_have_more_sentinels():
  cfg = tiny.config(vocab_size=384)
  found = tensors.of_params(tiny.params(cfg), cfg)
  vocabulary = VocabularyConfig(kind='byte')
  source = checkpoint_source.Source('', 't5x_lite', cfg, found, vocabulary=vocabulary)
  grown, _ = grow_vocabulary.grow(source, extra_ids=200)
  assert grown.config.vocab_size == 512
  assert grown.vocabulary == VocabularyConfig(kind='byte', extra_ids=200)
  assert grown.tensors['token_embedder/embedding'].read().shape == (512, 16)


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    ({}, 'name new tokens'),
    ({'extra_ids': 4}, 'not taken away'),
    ({'tokens': ['{', '{']}, 'in the vocabulary already'),
    ({'tokens': ['▁the']}, 'in the vocabulary already'),
    ({'extra_ids': 99_999_999_999}, 'up to 1,000,000'),
    ({'tokens': ['']}, 'is empty'),
    ({'tokens': ['<extra_id_0>']}, 'T5 defines itself'),
  ],
)
def test_mistakes(vocabulary, arguments, match):
  with pytest.raises(errors.UsageError, match=match):
    model(vocabulary).grow_vocabulary(**arguments)


def test_bytes_have_no_pieces():
  cfg = tiny.config(vocab_size=384)
  with pytest.raises(errors.UsageError, match="kind 'byte'"):
    api.Model(cfg, tiny.params(cfg), VocabularyConfig(kind='byte')).grow_vocabulary(['{'])


def test_from_the_command_line_to_transformers(vocabulary, tmp_path, capsys):
  transformers = pytest.importorskip('transformers')
  old = model(vocabulary)
  old.save(str(tmp_path / 'run'))
  (tmp_path / 'tokens').write_bytes(b'\xef\xbb\xbf{\r\n\n}\n')
  arguments = [
    'grow_vocab', str(tmp_path / 'run'), str(tmp_path / 'hf'),
    '--tokens_file', str(tmp_path / 'tokens'), '--to', 'hf',
  ]  # fmt: skip
  assert main.main([*arguments, '--dry_run']) == 0
  assert '65 ids become 67, 70 rows 128' in capsys.readouterr().out
  assert not (tmp_path / 'hf').exists()
  assert main.main(arguments) == 0
  opened = checkpoint_source.open_source(str(tmp_path / 'hf'))
  assert opened.config.vocab_size == 128
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
  ours = vocabularies.make_vocabulary(opened.vocabulary)
  assert len(tokenizer) == ours.vocab_size == 67
  assert tokenizer.convert_tokens_to_ids('<extra_id_0>') == 66
  assert tokenizer.convert_tokens_to_ids('}') == 61
  assert 60 in tokenizer('the{').input_ids
  found = tensors.of_params(old.params, old.config)
  export.check_target(opened.config, 'hf')
  np.testing.assert_array_equal(
    opened.tensors['token_embedder/embedding'].read()[:60],
    found['token_embedder/embedding'].read()[:60],
  )
