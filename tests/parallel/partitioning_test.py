"""Meshes, and that the numbers do not depend on them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import make_placement
from t5x_lite.training import losses, optimizers, schedules, steps, train_state
from tests.models import tiny


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a jax.Device as choosing sizes needs."""

  id: int
  device_kind: str = 'cpu'
  platform: str = 'cpu'
  process_index: int = 0
  slice_index: int | None = None


def tpus(count, kind='TPU v5', slices=1):
  return [Device(i, kind, 'tpu', i // 4, i * slices // count) for i in range(count)]


def gpus(count, per_node=8):
  kind = 'NVIDIA H100 80GB HBM3'
  return [Device(i, kind, 'gpu', i // per_node) for i in range(count)]


def gpus_of_slurm(count, per_node):
  """One process a GPU; JAX then gives the node as slice_index."""
  kind = 'NVIDIA H100 80GB HBM3'
  return [Device(i, kind, 'gpu', i, i // per_node) for i in range(count)]


def sizes(config, devices, **hints):
  config = partitioning.resolve(config, devices, **hints)
  return tuple(getattr(config, name) for name in partitioning.MESH_AXES)


@pytest.mark.parametrize(
  ('config', 'devices', 'hints', 'expected'),
  [
    (MeshConfig(), [Device(0)], {}, (1, 1, 1)),
    (MeshConfig(), [Device(i) for i in range(8)], {}, (8, 1, 1)),
    (MeshConfig(preset='dp'), tpus(8), {}, (8, 1, 1)),
    (MeshConfig(preset='fsdp'), tpus(8), {}, (1, 8, 1)),
    (MeshConfig(preset='fsdp'), tpus(8, slices=2), {}, (2, 4, 1)),
    (MeshConfig(preset='fsdp_tp'), tpus(8), {}, (1, 2, 4)),
    (MeshConfig(preset='fsdp_tp'), tpus(8), {'num_heads': 6}, (1, 4, 2)),
    (MeshConfig(preset='fsdp_tp', model=8), tpus(16), {}, (1, 2, 8)),
    # The model axis stays inside NVLink.
    (MeshConfig(preset='fsdp_tp'), gpus(16), {}, (1, 2, 8)),
    (MeshConfig(preset='fsdp_tp'), gpus(16, per_node=4), {}, (1, 4, 4)),
    (MeshConfig(preset='fsdp_tp'), gpus_of_slurm(16, 8), {}, (1, 2, 8)),
    (MeshConfig(preset='fsdp'), gpus_of_slurm(16, 8), {}, (1, 16, 1)),
    (MeshConfig(num_partitions=2), tpus(8), {}, (4, 1, 2)),
    (MeshConfig(num_partitions=2, parameter_dims=2), tpus(8), {}, (1, 4, 2)),
    (MeshConfig(data=2, fsdp=-1, model=2), tpus(8), {}, (2, 2, 2)),
    (MeshConfig(fsdp=4), tpus(8), {}, (2, 4, 1)),
    (MeshConfig(data=-1), tpus(8), {}, (8, 1, 1)),
    # auto: a small model is replicated, a large one cut, and a batch of fewer
    # rows than devices leaves some of them for the matrices.
    (MeshConfig(), tpus(256), {'num_params': 10**8}, (256, 1, 1)),
    (MeshConfig(), tpus(512), {'num_params': 11 * 10**9}, (1, 512, 1)),
    (MeshConfig(), tpus(512), {'num_params': 11 * 10**9, 'batch_size': 128}, (1, 128, 4)),
    (
      MeshConfig(),
      tpus(512, slices=2),
      {'num_params': 11 * 10**9, 'batch_size': 2048},
      (2, 256, 1),
    ),
    (MeshConfig(), gpus(8), {'num_params': 8 * 10**8}, (8, 1, 1)),
    (MeshConfig(), gpus(8), {'num_params': 3 * 10**9}, (1, 8, 1)),
    (MeshConfig(), tpus(8), {'batch_size': 6}, (2, 1, 4)),
    (MeshConfig(), tpus(8), {'batch_size': 1}, (1, 1, 8)),
  ],
)
def test_sizes(config, devices, hints, expected):
  assert sizes(config, devices, **hints) == expected


def test_a_resolved_config_resolves_to_itself():
  for config in (MeshConfig(preset='fsdp_tp'), MeshConfig(num_partitions=4), MeshConfig()):
    once = partitioning.resolve(config, tpus(16))
    assert partitioning.resolve(once, tpus(16)) == once
    rules = partitioning.logical_axis_rules
    assert rules(once) == rules(config)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: MeshConfig(preset='zero'), 'allowed: auto, dp'),
    (lambda: MeshConfig(preset='dp', fsdp=4), 'sizes or a preset'),
    (lambda: MeshConfig(num_partitions=2, model=2), 'one or the other'),
    (lambda: MeshConfig(data=0), 'must be positive'),
    (lambda: MeshConfig(data=-1, fsdp=-1), 'At most one'),
    (lambda: MeshConfig(parameter_dims=3), 'must be 1 or 2'),
    (lambda: MeshConfig(additional_rules=('embed', 'model')), 'a rule is'),
    (lambda: MeshConfig(additional_rules=[('mlp', ('model', 'model'))]), 'different'),
    (lambda: MeshConfig(parameter_rules=['wo']), 'regular expression'),
    (lambda: sizes(MeshConfig(model=3), tpus(8)), 'does not multiply'),
    (lambda: sizes(MeshConfig(num_slices=3), tpus(8)), 'does not divide'),
    (lambda: sizes(MeshConfig(num_slices=4), tpus(8, slices=2)), 'come from 2 slices'),
    (lambda: sizes(MeshConfig(fsdp=8), tpus(8, slices=2)), 'only the data axis can span slices'),
    (lambda: partitioning.make_mesh(MeshConfig(model=3), gpus(24)), 'factor nor a multiple'),
  ],
)
def test_mistakes_are_told(make, message):
  with pytest.raises(UsageError, match=message):
    make()


def test_slices_lie_along_the_data_axis():
  mesh = partitioning.make_mesh(MeshConfig(fsdp=2, model=2, num_slices=2))
  ids = np.vectorize(lambda d: d.id)(mesh.devices)
  assert ids.shape == (2, 2, 2)
  assert set(ids[0].flat) == {0, 1, 2, 3}


def test_batches_are_cut_over_all_data_axes():
  mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, model=2))
  partitioning.check_batch_size(8, mesh)
  with pytest.raises(UsageError, match='multiple of 4'):
    partitioning.check_batch_size(6, mesh)
  rows = np.arange(16).reshape(8, 2)
  batch = partitioning.global_batch({'x': rows}, mesh)
  assert batch['x'].addressable_shards[0].data.shape == (2, 2)
  np.testing.assert_array_equal(batch['x'], rows)


# ---- The numbers do not depend on the mesh ----

MESHES = {
  'dp': MeshConfig(preset='dp'),
  'fsdp': MeshConfig(preset='fsdp'),
  'fsdp_tp': MeshConfig(preset='fsdp_tp'),
  'num_partitions_2d': MeshConfig(num_partitions=2, parameter_dims=2, activation_dims=2),
  'data_fsdp_model': MeshConfig(data=2, fsdp=2, model=2),
  'model': MeshConfig(data=1, model=8),
  'two_slices': MeshConfig(fsdp=4, num_slices=2),
  'own_rules': MeshConfig(
    fsdp=4,
    model=2,
    parameter_rules=[('token_embedder', [('vocab', ('fsdp', 'model')), ('embed', None)])],
  ),
}
NUM_STEPS = 20


@functools.cache
def train(mesh_config, dropout_rate, num_microbatches=1, optimizer='adafactor'):
  """Returns the losses of 20 steps on random tokens, on the first devices."""
  cfg = tiny.config(
    num_encoder_layers=1,
    num_decoder_layers=1,
    emb_dim=64,
    mlp_dim=128,
    vocab_size=128,
    dropout_rate=dropout_rate,
  )
  devices = jax.devices()[: 8 if mesh_config is not None else 1]
  placement = make_placement(mesh_config or MeshConfig(), devices)
  mesh = placement.mesh
  _, shapes, axes = t5.abstract_params(cfg)
  config = optimizers.OptimizerConfig(
    name=optimizer,
    schedule=schedules.ScheduleConfig(shape='constant', warmup_steps=0, base_learning_rate=0.01),
  )
  tx = optimizers.make_optimizer(config, axes, shapes)
  spec = train_state.make_spec(cfg, tx, placement)
  step = jax.jit(
    steps.make_train_step(
      spec.graphdef,
      tx,
      schedules.make_schedule(config.schedule),
      losses.LossConfig(z_loss=1e-4),
      num_microbatches=num_microbatches,
    ),
    donate_argnums=0,
    out_shardings=(spec.shardings, partitioning.replicated(mesh)),
  )
  key = jax.jit(lambda: jax.random.key(0), out_shardings=partitioning.replicated(mesh))()
  state = train_state.init_state(cfg, tx, spec, key)
  rng = np.random.default_rng(0)
  result = []
  with placement.active():
    for _ in range(NUM_STEPS):
      tokens = rng.integers(2, 20, (8, 12), dtype=np.int32)
      batch = {
        'encoder_input_tokens': tokens,
        'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :9],
        'decoder_target_tokens': tokens[:, :9],
        'decoder_loss_weights': np.ones((8, 9), np.float32),
      }
      state, metrics = step(state, partitioning.global_batch(batch, mesh), key)
      result.append(float(metrics['loss']))
  return np.array(result), state


@pytest.mark.parametrize('name', MESHES)
def test_every_mesh_gives_the_losses_of_one_device(name):
  """What dropout drops is the same too."""
  one, _ = train(None, 0.1)
  losses_, state = train(MESHES[name], 0.1)
  # float32, sums in another order.
  np.testing.assert_allclose(losses_, one, rtol=2e-4)
  assert one[-1] < 0.9 * one[0]
  sharded = [x for x in jax.tree.leaves(state.params) if len(x.devices()) > 1]
  assert sharded


def test_dropout_does_something():
  assert not np.allclose(train(None, 0.0)[0], train(None, 0.1)[0])


def test_microbatches_give_the_losses_of_one_batch():
  one, _ = train(None, 0.0)  # each microbatch has dropout of its own
  several, _ = train(MESHES['data_fsdp_model'], 0.0, num_microbatches=2)
  np.testing.assert_allclose(several, one, rtol=2e-4)


@pytest.mark.parametrize('settings', [{}, {'optimizer': 'adamw'}])
def test_no_device_holds_more_than_its_part_of_the_state(settings):
  _, state = train(MESHES['fsdp_tp'], 0.1, **settings)
  per_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  total = sum(x.nbytes for x in jax.tree.leaves(state))
  assert per_device < 1.2 * total / 8


def test_axes_are_cut_in_every_order():
  for axes in itertools.permutations((1, 2, 4)):
    config = MeshConfig(**dict(zip(partitioning.MESH_AXES, axes, strict=True)))
    mesh = partitioning.make_mesh(config)
    x = jax.device_put(jnp.ones((8, 2)), partitioning.batch_sharding(mesh))
    rows = 8 // (axes[0] * axes[1])
    assert x.addressable_shards[0].data.shape[0] == rows
