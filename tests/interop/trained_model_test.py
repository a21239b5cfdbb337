import dataclasses

import numpy as np
import pytest

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.interop import trained_model
from t5x_lite.models import model_sharding
from t5x_lite.parallel import pytrees
from t5x_lite.parallel.partitioning import MeshConfig
from tests import tiny_run


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """One model in every format, and its parameters."""
  root = tmp_path_factory.mktemp('formats')
  vocabulary = t5x_lite.VocabularyConfig()
  config = tiny_run.model(vocab_size=32128, scan_layers=False)
  model = t5x_lite.new(config, vocabulary)
  for format_ in ('t5x_lite', 'hf', 't5x'):
    model.save(str(root / format_), format=format_)
  return root, model


@pytest.mark.parametrize('format_', ['t5x_lite', 'hf', 't5x'])
@pytest.mark.parametrize('preset', ['dp', 'fsdp'])
def test_every_format_gives_the_same_parameters(folders, format_, preset):
  root, model = folders
  opened = trained_model.open_model(str(root / format_), scan_layers=False)
  assert opened.format == format_
  placement = model_sharding.place_model(opened.config, MeshConfig(preset=preset))
  params = opened.load_params(model_sharding.inference_params(opened.config, placement))
  wanted = pytrees.flatten_names(model.params)
  for name, leaf in pytrees.flatten_names(params).items():
    np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


def test_what_is_computed_in_bfloat16_is_loaded_so(folders):
  root, _ = folders
  opened = trained_model.open_model(str(root / 'hf'), dtype='bfloat16')
  placement = model_sharding.place_model(opened.config, None)
  specs = model_sharding.inference_params(opened.config, placement)
  params = pytrees.flatten_names(opened.load_params(specs))
  assert {str(leaf.dtype) for leaf in params.values()} == {
    'bfloat16', 'float32',
  }  # fmt: skip


def test_unknown_fields_and_no_vocabulary(folders, tmp_path):
  root, model = folders
  with pytest.raises(UsageError, match='no field of T5Config'):
    trained_model.open_model(str(root / 'hf'), depth=3)
  t5x_lite.new(tiny_run.model(vocab_size=999)).save(str(tmp_path / 'ids'), format='t5x')
  with pytest.raises(UsageError, match='does not say what its vocabulary is'):
    trained_model.open_model(str(tmp_path / 'ids'))
  del model


def test_the_embedding_must_have_a_row_for_every_id():
  trained_model.check_vocabulary(tiny_run.model(vocab_size=384), tiny_run.VOCABULARY)
  official = t5x_lite.VocabularyConfig()
  with pytest.raises(UsageError, match='raise vocab_size to 32128'):
    trained_model.check_vocabulary(tiny_run.model(vocab_size=32000), official)


def test_what_only_training_reads_makes_no_other_model(folders):
  root, _ = folders
  opened = trained_model.open_model(str(root / 'hf'))
  change = lambda **to: dataclasses.replace(opened, config=opened.config.replace(**to))  # noqa: E731
  trained_model.check_alike([opened, change(dropout_rate=0.3, remat_policy='full')])
  with pytest.raises(UsageError, match='another architecture'):
    trained_model.check_alike([opened, change(mlp_dim=8)])
