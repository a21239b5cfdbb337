"""The model of memory and time moves the right way; compiles are its truth."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from t5x_lite.compiler import cost_model, flops
from t5x_lite.compiler.hlo import Collective
from t5x_lite.models import t5
from t5x_lite.models.config import named_config
from t5x_lite.parallel.hardware import find_chip
from tests.models import tiny

V5P = find_chip('TPU v5')
V5E = find_chip('TPU v5 lite')
GIB = 2**30


def setup(**overrides):
  model = named_config('t5_1_1_xxl', remat_policy='full')
  shapes = {'encoder_input_tokens': 512, 'decoder_target_tokens': 114}
  params = 44.5e9 / 512
  fields = dict(
    model=model,
    batch={name: ((2048, n), np.int32) for name, n in shapes.items()},
    sizes={'data': 1, 'fsdp': 64, 'model': 8},
    num_microbatches=1,
    chunk=None,
    params_bytes=int(params),
    state_bytes=int(1.01 * params),
  )
  return cost_model.Setup(**{**fields, **overrides})


def with_policy(policy):
  return setup(model=setup().model.replace(remat_policy=policy))


def test_recomputing_more_saves_more():
  policies = ('none', 'minimal', 'save_names', 'full')
  peaks = [cost_model.memory(with_policy(p))['peak'] for p in policies]
  assert peaks == sorted(peaks, reverse=True)
  work = [cost_model.hardware_flops(with_policy(p)) for p in policies]
  assert work == sorted(work)
  # A whole forward pass of the layers again, at most.
  assert 1.2 < work[-1] / work[0] < 4 / 3


@pytest.mark.parametrize('policy', ['none', 'minimal', 'save_names', 'full'])
@pytest.mark.parametrize(
  'fields', [{}, {'mlp_activations': ('relu',)}, {'architecture': 'decoder'}]
)
def test_what_is_saved_is_what_jax_saves(policy, fields):
  """JAX's residuals of the scans over layers, which have no TPU's fusion in them."""
  sizes = {'emb_dim': 24, 'mlp_dim': 56, 'num_heads': 4, 'head_dim': 8}
  depth = {'num_encoder_layers': 3, 'num_decoder_layers': 3, 'dtype': 'bfloat16'}
  cfg = tiny.config(**sizes, **depth, remat_policy=policy, dropout_rate=0.0, **fields)
  lengths = {'encoder_input_tokens': 40, 'decoder_target_tokens': 20, 'decoder_input_tokens': 20}
  batch = {name: ((5, n), np.int32) for name, n in lengths.items()}
  graphdef, shapes, _ = t5.abstract_params(cfg)

  def residuals(params, batch):
    return jax.vjp(lambda p: nnx.merge(graphdef, p).hidden(batch), params)[1]

  arrays = {name: jax.ShapeDtypeStruct(*entry) for name, entry in batch.items()}
  kept = jax.tree.leaves(jax.eval_shape(residuals, shapes, arrays))
  found = sum(x.size * x.dtype.itemsize for x in kept if x.shape[:2] == (3, 5))
  one = {name: 1 for name in ('data', 'fsdp', 'model')}
  predicted = cost_model.memory(setup(model=cfg, batch=batch, sizes=one))['saved']
  np.testing.assert_allclose(found, predicted, rtol=0.1)


# Peaks of XLA:TPU (docs/lab_notes.md), in GiB: Adafactor, dropout 0, loss in chunks of 64 in XXL.
@pytest.mark.parametrize(
  ('name', 'policy', 'rows', 'lengths', 'mesh', 'parts', 'compiled'),
  [
    ('t5_1_1_xxl', 'minimal', 2048, (512, 114), (1, 64, 8), 1, 13.61),
    ('t5_1_1_xxl', 'none', 2048, (512, 114), (4, 32, 4), 1, 18.86),
    ('t5_1_1_xxl', 'minimal', 64, (512, 114), (1, 2, 8), 1, 21.24),
    ('mt5_xxl', 'full', 1024, (1024, 229), (1, 32, 8), 2, 5.93),
    ('t5_1_1_large', 'minimal', 2048, (512, 114), (32, 16, 1), 1, 2.01),
  ],
)
def test_peaks_are_the_compilers_within_a_fifth(name, policy, rows, lengths, mesh, parts, compiled):
  model = named_config(name, remat_policy=policy)
  names = ('encoder_input_tokens', 'decoder_target_tokens')
  shapes = t5.abstract_params(model)[1]
  params = sum(4 * x.size for x in jax.tree.leaves(shapes)) / mesh[1] / mesh[2]
  given = setup(
    model=model,
    batch={name: ((rows, n), np.int32) for name, n in zip(names, lengths, strict=True)},
    sizes=dict(zip(('data', 'fsdp', 'model'), mesh, strict=True)),
    num_microbatches=parts,
    chunk=64 if 'xxl' in name else None,
    params_bytes=int(params),
    state_bytes=int(1.01 * params),
  )
  assert abs(cost_model.memory(given)['peak'] / GIB / compiled - 1) < 0.2


@pytest.mark.parametrize('name', ['blocked', 'pallas_tpu', 'pallas_gpu'])
def test_blocked_attention_keeps_no_pairs(name):
  """And is named as what would help where pairs fill the memory."""
  batch = {'encoder_input_tokens': ((64, 16384), None), 'decoder_target_tokens': ((64, 512), None)}
  dense, blocked = (
    setup(batch=batch, model=setup().model.replace(attention=name)) for name in ('dense', name)
  )
  assert cost_model.memory(dense)['working'] > 10 * cost_model.memory(blocked)['working']
  lever = "models.T5Config.attention = 'blocked'"
  assert lever in cost_model.levers(dense) and lever not in cost_model.levers(blocked)


def test_hardware_flops_without_recomputation_are_the_models():
  plain = with_policy('none')
  expected = 3 * flops.forward_flops(plain.model, batch_size=2048, inputs=512, targets=114)
  np.testing.assert_allclose(cost_model.hardware_flops(plain), expected)


def test_microbatches_trade_activations_for_gradients_and_gathers():
  one, four = setup(), setup(num_microbatches=4)
  assert cost_model.memory(four)['saved'] < cost_model.memory(one)['saved'] / 3.9
  assert cost_model.memory(four)['gradients'] > cost_model.memory(one)['gradients']
  assert cost_model.collective_bytes(four) > cost_model.collective_bytes(one)


def test_replicas_receive_no_weights():
  alone = setup(sizes={'data': 1, 'fsdp': 1, 'model': 1})
  assert cost_model.collective_bytes(alone) == 0


def test_slices_meet_over_the_data_center_network():
  two = setup(sizes={'data': 2, 'fsdp': 64, 'model': 8}, num_slices=2)
  assert cost_model.seconds(two, V5P)['DCN'] > 0
  assert 'DCN' not in cost_model.seconds(setup(), V5P)


def test_levers_only_name_what_helps():
  levers = cost_model.levers(with_policy('none'))
  peak = cost_model.memory(with_policy('none'))['peak']
  assert levers and all(size < peak for size in levers.values())
  texts = ' '.join(levers)
  assert "remat_policy = 'full'" in texts
  assert 'chunk' in texts and 'num_microbatches = 2' in texts
  # Nothing is left of recomputation to recommend.
  assert 'T5Config.remat' not in ' '.join(cost_model.levers(setup()))


@dataclasses.dataclass(frozen=True)
class Device:
  coords: tuple[int, ...]
  slice_index: int = 0
  process_index: int = 0


def grid(*shape, slices=1):
  return [
    Device(tuple(int(i) for i in index), s) for s in range(slices) for index in np.ndindex(*shape)
  ]


@pytest.mark.parametrize(
  ('chip', 'devices', 'group', 'links'),
  [
    # A whole closed dim is a ring: both directions.
    (V5P, grid(4, 4, 4), range(4), 2),
    # Half of it is a line.
    (V5P, grid(8, 4, 4), range(0, 64, 16), 1),
    # v5e closes at 16 only.
    (V5E, grid(8, 8), range(8), 1),
    (V5E, grid(16, 16), range(16), 2),
    # All of a cube: three rings.
    (V5P, grid(4, 4, 4), range(64), 6),
  ],
)
def test_collectives_use_the_links_of_the_dims_they_span(chip, devices, group, links):
  one = Collective('all-gather', 1e9, tuple(group), 3)
  seconds = cost_model.network_seconds(chip, devices, [one])
  expected = 3e9 / chip.link_bandwidth / links
  np.testing.assert_allclose(seconds['ICI'], expected)


def test_collectives_over_different_dims_share_no_link():
  found = [
    Collective('all-reduce', 3e9, tuple(range(4)), 1),  # along the last dim
    Collective('all-gather', 8e9, tuple(range(0, 64, 4)), 1),  # over the other two
  ]
  seconds = cost_model.network_seconds(V5P, grid(4, 4, 4), found)
  np.testing.assert_allclose(seconds['ICI'], 8e9 / V5P.link_bandwidth / 4)
  seconds = cost_model.network_seconds(V5P, grid(4, 4, 4), [found[0]] * 2)
  np.testing.assert_allclose(seconds['ICI'], 2 * 3e9 / V5P.link_bandwidth / 2)


def test_a_group_over_slices_uses_the_slow_network():
  devices = grid(4, 4, slices=2)
  one = Collective('all-reduce', 1e9, (0, 16), 1)
  seconds = cost_model.network_seconds(V5E, devices, [one])
  assert seconds['ICI'] == 0
  np.testing.assert_allclose(seconds['DCN'], 1e9 / V5E.dcn_bandwidth)


def test_what_is_sent_to_other_slices_is_each_devices_own():
  devices = grid(4, 4, slices=2)
  one = Collective('send', 1e6, tuple(range(32)), 3)
  seconds = cost_model.network_seconds(V5E, devices, [one])
  np.testing.assert_allclose(seconds['DCN'], 3e6 / V5E.dcn_bandwidth)
