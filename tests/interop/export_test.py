import pytest
from etils import epath

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import export, tensors
from t5x_lite.interop.checkpoint_source import Source
from tests.models import tiny

CFG = tiny.config(vocab_size=384)


def write(path, to):
  found, vocabulary = tensors.of_params(tiny.params(CFG), CFG), VocabularyConfig(kind='byte')
  export.write(epath.Path(path), Source('', to, CFG, found, vocabulary=vocabulary), to=to)


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise OSError('disk full')

  monkeypatch.setattr(export.hf_export, 'generation_config', fail)
  with pytest.raises(OSError, match='disk full'):
    write(tmp_path / 'o', to='hf')
  assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(tmp_path):
  (tmp_path / 'precious').write_text('x')
  with pytest.raises(UsageError, match='already there'):
    export.check_destination(epath.Path(tmp_path))


def test_what_a_format_lacks_is_said_before_anything_is_written():
  with pytest.raises(UsageError, match='no decoder-only T5'):
    export.check_target(tiny.config(architecture='decoder'), 'hf')
  with pytest.raises(UsageError, match='no such network'):
    export.check_target(tiny.config(architecture='encoder'), 't5x')
