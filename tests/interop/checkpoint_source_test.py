import sys

import numpy as np
import pytest
from etils import epath

from t5x_lite import errors
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import checkpoint_source, export, tensors
from t5x_lite.interop.checkpoint_source import Source
from tests.models import tiny


@pytest.mark.parametrize('to', checkpoint_source.FORMATS)
def test_formats_are_told_apart(to, tmp_path):
  cfg = tiny.config(relpos_num_buckets=16)
  found = tensors.of_params(tiny.params(cfg), cfg)
  export.write(epath.Path(tmp_path / 'out'), Source('', to, cfg, found, step=3), to=to)
  opened = checkpoint_source.open_source(str(tmp_path / 'out'))
  assert opened.format == to
  assert opened.tensors.keys() == found.keys()
  assert opened.config.relpos_num_buckets == 16
  places = {
    't5x': ['checkpoint_3', 'checkpoint_3/checkpoint'],
    't5x_lite': ['checkpoints', 'checkpoints/3'],
    'hf': [],
  }
  for place in places[to]:
    again = checkpoint_source.open_source(str(tmp_path / 'out' / place))
    assert (again.format, again.step) == (to, 3)


def test_published_vocabularies_by_size():
  for rows, expected in (
    (32128, VocabularyConfig()),
    (384, VocabularyConfig(kind='byte')),
    (250112, None),
  ):
    cfg = tiny.config(vocab_size=rows)
    assert checkpoint_source.default_vocabulary(cfg) == expected


def test_nothing_there(tmp_path, monkeypatch):
  with pytest.raises(errors.UsageError, match=f'{tmp_path}/x does not exist'):
    checkpoint_source.open_source(str(tmp_path / 'x'))
  with pytest.raises(errors.UsageError, match=r'holds no checkpoint: no'):
    checkpoint_source.open_source(str(tmp_path))
  (tmp_path / 'model.safetensors').write_bytes(b'')
  with pytest.raises(errors.UsageError, match=r'weights but no config\.json'):
    checkpoint_source.open_source(str(tmp_path))


def test_names_of_the_hub(monkeypatch, tmp_path):
  # The tests run offline.
  with pytest.raises(errors.UsageError, match='no/model is no local folder'):
    checkpoint_source.open_source('no/model')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(errors.UsageError, match='huggingface_hub is not install'):
    checkpoint_source.open_source('no/model')


def test_a_name_of_the_hub_is_fetched(monkeypatch, tmp_path):
  huggingface_hub = pytest.importorskip('huggingface_hub')
  cfg = tiny.config()
  found = tensors.of_params(tiny.params(cfg), cfg)
  export.write(epath.Path(tmp_path / 'out'), Source('', 'hf', cfg, found), to='hf')
  asked = []

  def download(name, **kwargs):
    asked.append((name, kwargs))
    return str(tmp_path / 'out')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  opened = checkpoint_source.open_source('someone/tiny-t5')
  assert asked[0][0] == 'someone/tiny-t5' and asked[0][1]['revision'] is None
  assert not any('bin' in p for p in asked[0][1]['allow_patterns'])
  np.testing.assert_array_equal(
    opened.tensors['decoder/decoder_norm/scale'].read(), found['decoder/decoder_norm/scale'].read()
  )


def test_a_revision_of_the_hub_and_https_alone(monkeypatch, tmp_path):
  huggingface_hub = pytest.importorskip('huggingface_hub')
  asked = []

  def download(name, *, revision, **_):
    asked.append((name, revision))
    raise OSError('not here')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  monkeypatch.chdir(tmp_path)
  for revision in ('main', 'v1.0', 'refs/pr/3', 'a' * 40):
    with pytest.raises(errors.UsageError, match='not here'):
      checkpoint_source.open_source(f'someone/tiny@{revision}')
  assert asked == [('someone/tiny', r) for r in ('main', 'v1.0', 'refs/pr/3', 'a' * 40)]
  for name in ('someone/tiny@', 'tiny@main', 'http://x/y', 'https://x.org/a/b', 'a/b/c@main'):
    with pytest.raises(errors.UsageError, match='does not exist'):
      checkpoint_source.open_source(name)
  monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://mirror.example')
  with pytest.raises(errors.UsageError, match=r'HF_ENDPOINT is http://mirror\.example, not https'):
    checkpoint_source.open_source('someone/tiny')
  assert len(asked) == 4
