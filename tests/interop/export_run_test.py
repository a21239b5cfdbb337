import jax
import numpy as np
import pytest
from etils import epath

from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.interop import checkpoint_source, export, tensors
from t5x_lite.models import model_sharding
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import make_placement
from t5x_lite.runs import checkpoints
from tests.models import tiny


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_orbax_restores_it_onto_a_mesh(scan_layers, dtype, tmp_path):
  cfg = tiny.config(scan_layers=scan_layers, param_dtype=dtype)
  params = tiny.params(cfg)
  known = {'vocabulary': VocabularyConfig(kind='passthrough', size=64), 'lengths': {'inputs': 7}}
  source = checkpoint_source.Source(
    '', 't5x_lite', cfg, tensors.of_params(params, cfg), step=12, **known
  )
  export.write(epath.Path(tmp_path), source, to='t5x_lite', origin='somewhere')
  run = checkpoint_source.open_source(str(tmp_path))
  assert (run.step, run.config, run.lengths) == (12, cfg, {'inputs': 7})
  assert run.vocabulary is not None
  assert run.vocabulary.size == 64
  placement = make_placement(MeshConfig(data=2, fsdp=2, model=2, parameter_dims=2))
  wanted = model_sharding.param_specs(cfg, placement)
  restored = checkpoints.load_state(str(tmp_path), {'params': wanted})['params']
  jax.tree.map(np.testing.assert_array_equal, restored, params)
