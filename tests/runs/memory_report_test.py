import jax
import optax
import pytest

from t5x_lite.models import model_sharding
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import make_placement
from t5x_lite.runs import memory_report
from t5x_lite.training import train_state
from tests.models import tiny


@pytest.fixture(scope='module')
def spec():
  config = MeshConfig(data=2, fsdp=2, model=2, parameter_dims=2)
  placement = make_placement(config)
  return train_state.make_spec(tiny.config(), optax.adam(1.0), placement)


def test_bytes_per_device_are_those_of_the_arrays(spec):
  state = train_state.init_state(tiny.config(), optax.adam(1.0), spec, jax.random.key(0))
  device = jax.devices()[3]
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(state)
    for shard in leaf.addressable_shards
    if shard.device == device
  )
  assert memory_report.bytes_per_device(spec.shapes) == held


def test_sharding_table(spec):
  lines = memory_report.sharding_table(spec).splitlines()
  assert len(lines) == 1 + len(jax.tree.leaves(spec.shapes))
  assert lines[0].split()[:3] == ['array', 'shape', 'dtype']
  [line] = [x for x in lines if x.startswith('params/token_embedder')]
  assert line.split() == [
    'params/token_embedder/embedding',
    '64x16',
    'float32',
    'vocab',
    'embed',
    'model',
    'fsdp',
    '1.00',
    'KiB',
  ]
  [line] = [x for x in lines if x.startswith('step')]
  assert 'replicated' in line


def test_summaries(spec):
  text = memory_report.parameter_summary(spec.shapes.params)
  count = model_sharding.count_params(spec.shapes.params)
  assert text.startswith(f'{count:,} parameters (')
  assert 'optimizer state' in memory_report.state_memory(spec)
  compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), 'float32')).compile()
  assert '16.00 KiB' in memory_report.compiled_memory(compiled)


@pytest.mark.parametrize('size, text', [(5, '5 Bytes'), (2048, '2.00 KiB'), (3 << 30, '3.00 GiB')])
def test_format_bytes(size, text):
  assert memory_report.format_bytes(size) == text
