import json

import numpy as np
import pytest
from etils import epath

from t5x_lite import errors, main
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import checkpoint_source, export, hf, tensors
from t5x_lite.programs import convert
from tests.models import tiny


@pytest.fixture(scope='module')
def cfg():
  return tiny.config(vocab_size=384, num_encoder_layers=3)


@pytest.fixture(scope='module')
def found(cfg):
  return tensors.of_params(tiny.params(cfg), cfg)


@pytest.fixture(scope='module')
def run(cfg, found, tmp_path_factory):
  path = tmp_path_factory.mktemp('convert') / 'run'
  known = {'vocabulary': VocabularyConfig(kind='byte'), 'lengths': {'inputs': 9}}
  source = checkpoint_source.Source('', 't5x_lite', cfg, found, step=4, **known)
  export.write(epath.Path(path), source, to='t5x_lite')
  return path


def test_the_whole_round_is_bit_identical(run, found, tmp_path):
  places = [run, tmp_path / 'hf', tmp_path / 't5x', tmp_path / 'run']
  formats = ['t5x_lite', 'hf', 't5x', 't5x_lite']
  for i, to in enumerate(formats[1:]):
    code = main.main([
      'convert', str(places[i]), str(places[i + 1]), '--to', to,
    ])  # fmt: skip
    assert code == 0
    opened = checkpoint_source.open_source(str(places[i + 1]))
    assert opened.format == to
    assert opened.vocabulary == VocabularyConfig(kind='byte')
    assert opened.tensors.keys() == found.keys()
    for name, tensor in found.items():
      np.testing.assert_array_equal(opened.tensors[name].read(), tensor.read())
  # transformers has no steps, T5X no lengths.
  assert checkpoint_source.open_source(str(run)).step == 4
  assert checkpoint_source.open_source(str(run)).lengths == {'inputs': 9}


@pytest.mark.parametrize('scan_layers', [True, False])
def test_layers_stacked_or_not(run, found, scan_layers, tmp_path):
  out = str(tmp_path / 'out')
  convert.convert(source=str(run), destination=out, scan_layers=scan_layers)
  opened = checkpoint_source.open_source(out)
  assert opened.config.scan_layers == scan_layers
  for name, tensor in found.items():
    np.testing.assert_array_equal(opened.tensors[name].read(), tensor.read())


def test_dry_run_lists_the_mapping(run, tmp_path, capsys):
  code = main.main([
    'convert', str(run), str(tmp_path / 'out'), '--to', 'hf', '--dry_run',
  ])  # fmt: skip
  out = capsys.readouterr().out
  assert code == 0
  assert not (tmp_path / 'out').exists()
  assert 'wo.kernel -> encoder.block.2.layer.1.DenseReluDense.wo.weight [' in (out)
  assert 't5x_lite -> hf' in out
  assert 'parameters as float32' in out


def test_dtype_and_vocabulary_can_be_said(run, tmp_path, capsys):
  code = main.main([
    'convert', str(run), str(tmp_path / 'out'), '--to', 'hf',
    '--dtype', 'bfloat16', '--vocabulary', 'none',
  ])  # fmt: skip
  assert code == 0
  opened = checkpoint_source.open_source(str(tmp_path / 'out'))
  assert {t.dtype.name for t in opened.tensors.values()} == {'bfloat16'}
  assert opened.vocabulary is None
  entry = json.loads((tmp_path / 'out' / hf.CONFIG).read_text())
  assert entry['torch_dtype'] == 'bfloat16'


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    (['--vocabulary', 't5'], '32100 ids.*384 rows'),
    (['--vocabulary', '/no/file'], 'Cannot read the vocabulary'),
    (['--dtype', 'float16', '--to', 't5x'], 'float32 or bfloat16'),
  ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, arguments, match, tmp_path, capsys):
  import re

  code = main.main(['convert', str(run), str(tmp_path / 'out'), *arguments])
  message = capsys.readouterr().err
  assert code == 2
  assert re.search(match, message), message
  assert message.count('\n') == 1
  assert list(tmp_path.iterdir()) == []


def test_a_destination_is_never_overwritten(run, tmp_path):
  (tmp_path / 'precious').write_text('x')
  with pytest.raises(errors.UsageError, match='already there'):
    convert.convert(source=str(run), destination=str(tmp_path))
  assert (tmp_path / 'precious').read_text() == 'x'


def test_partial_loads_are_reported(run, tmp_path, caplog):
  with caplog.at_level('INFO'):
    convert.convert(
      source=str(run),
      destination=str(tmp_path / 'out'),
      assignment_map=[('decoder/logits_dense/kernel', None)],
    )
  assert '1 newly initialised (decoder/logits_dense/kernel)' in caplog.text
