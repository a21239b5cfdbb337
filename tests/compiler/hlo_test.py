"""Reading HLO text; the fixture is shortened from what XLA:TPU prints."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.compiler import hlo
from t5x_lite.parallel import partitioning
from t5x_lite.parallel.partitioning import MeshConfig

TPU_LOOP = pathlib.Path(__file__).parents[1] / 'fixtures' / 'tpu_loop.hlo'


@pytest.fixture(scope='module')
def tpu_loop():
  return hlo.HloModule(TPU_LOOP.read_text(), 8)


def test_collectives_in_loops_count_as_often_as_they_run(tpu_loop):
  found = {c.kind: c for c in tpu_loop.collectives()}
  # Two pieces of one overlapped all-gather are one.
  gather = found['all-gather']
  assert (gather.count, gather.group) == (24, (0, 2, 4, 6))
  assert gather.bytes == 2 * 256 * 2 * 3 / 4
  scatter = found['reduce-scatter']
  assert (scatter.count, scatter.group) == (24, (0, 1))
  assert scatter.bytes == 1024 * 4 / 2
  permute = found['collective-permute']
  assert (permute.count, permute.bytes) == (1, 2 * 64 * 2)


def test_a_slice_of_a_stack_is_not_the_stack(tpu_loop):
  # A row read and written, the gathers (one has an operand that it does not
  # read) and the scatter. Indices are not counted.
  row = 128 * 4 * 2
  gathers = 2 * (2 * 256 * 2 + 2 * 64 * 2)
  scatter = 1024 * 4 + 512 * 4
  permute = 2 * 64 * 2 + (4 + 2 * 64 * 2 + 1024 * 4 + 24 * 128 * 4)
  expected = 24 * (row + gathers + scatter) + permute
  assert tpu_loop.hbm_bytes() == expected


# An all-gather that begins before a loop and is carried through it, in the form
# of XLA:TPU's; its buffers pass through the loop's fusion.
CARRIED = TPU_LOOP.parent / 'tpu_carried.hlo'


def test_a_collective_carried_through_a_loop_is_one():
  [gather] = hlo.HloModule(CARRIED.read_text(), 2).collectives()
  assert (gather.kind, gather.count) == ('all-gather', 1)
  assert gather.bytes == 8 * 8 * 4 / 2


def test_what_passes_through_a_fusion_is_not_traffic():
  # Each of 3 iterations reads a row of the stack (inside a nested fusion) and
  # writes a row; the start reads its operand and writes its results.
  loop = 3 * (16 * 4 + 16 * 4)
  start = 4 * 8 * 4 + (4 * 8 * 4 + 8 * 8 * 4)
  assert hlo.HloModule(CARRIED.read_text(), 2).hbm_bytes() == loop + start


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('replica_groups={{0,2},{4,6},{1,3},{5,7}}', (0, 2)),
    ('replica_groups=[4,2]<=[8]', (0, 1)),
    ('replica_groups=[4,2]<=[4,2]T(1,0)', (0, 2)),
    ('replica_groups=[2,4]<=[2,2,2]T(1,0,2)', (0, 1, 4, 5)),
    (
      "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}, dims",
      (0, 2),
    ),
    (
      "replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2,'axis_3'=2], "
      "device_ids=([2,4]T(1,0)) {'axis_1','axis_2'}, use",
      (0, 1, 2, 3),
    ),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, use", (0, 1, 2, 3)),
    ('replica_groups={}', tuple(range(8))),
    ('source_target_pairs={{3,4},{4,3}}', (3, 4)),
  ],
)
def test_groups_in_every_spelling(text, expected):
  found = hlo.first_group(text, 8)
  # Mesh axes are listed outermost first.
  assert sorted(found) == sorted(expected)


def test_a_program_of_this_machine():
  mesh = partitioning.make_mesh(MeshConfig(fsdp=8))
  cut = partitioning.batch_sharding(mesh)
  whole = partitioning.replicated(mesh)

  def step(x, stack):
    def body(x, w):
      y = jax.lax.with_sharding_constraint(x @ w, whole)
      return jax.lax.with_sharding_constraint(y, cut), None

    return jax.lax.scan(body, x, stack)[0]

  x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=cut)
  stack = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=whole)
  text = jax.jit(step, out_shardings=cut).lower(x, stack).compile().as_text()
  gathers = [c for c in hlo.HloModule(text, 8).collectives() if c.kind == 'all-gather']
  assert sum(c.count for c in gathers) == 5
  total = sum(c.count * c.bytes for c in gathers)
  np.testing.assert_allclose(total, 5 * 16 * 32 * 4 * 7 / 8)
