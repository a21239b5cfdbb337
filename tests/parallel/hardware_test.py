import os

import pytest

from t5x_lite.errors import UsageError
from t5x_lite.parallel import hardware


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('TPU v4', 'v4'),
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6 lite', 'v6e'),
    ('TPU v5e', 'v5e'),
    ('NVIDIA H100 80GB HBM3', ''),
  ],
)
def test_chips_are_found_by_what_jax_calls_them(kind, name):
  chip = hardware.find_chip(kind)
  assert chip is not None and chip.name == name
  assert chip.peak_flops > 1e14
  assert 1e10 < chip.hbm_bytes < 1e12


def test_an_unknown_device_has_no_chip():
  assert hardware.find_chip('cpu') is None
  assert hardware.peak_flops('cpu') is None


def test_an_l40_is_no_l4():
  kinds = ('NVIDIA L4', 'NVIDIA L40', 'NVIDIA L40S')
  assert [hardware.find_chip(kind).hbm_bytes // 10**9 for kind in kinds] == [24, 48, 48]


def test_every_chip_has_a_peak():
  for chip in hardware.CHIPS:
    assert chip.peak_flops > 0
    # A chip that computes faster than 1000 FLOPs a byte does not exist yet.
    assert 50 < chip.peak_flops / chip.hbm_bandwidth < 1000


def test_topologies_by_name():
  assert hardware.parse_topology('v5p:8x8x16').name == 'v5p'


@pytest.mark.parametrize(
  'text', ['v5p-1024', 'v5e:16', 'v7x:4x4', 'v5e:4x4x4', 'v4:2x2', 'v5e:0x4']
)
def test_a_wrong_topology_says_what_is_right(text):
  with pytest.raises(UsageError, match='example'):
    hardware.parse_topology(text)


def test_libtpu_gets_larger_stacks_once(monkeypatch):
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_other=1')
  hardware.prepare_libtpu()
  hardware.prepare_libtpu()
  found = os.environ['LIBTPU_INIT_ARGS']
  assert found.startswith('--xla_other=1 --fibers_default_thread_stack_size=')
  assert found.count('fibers') == 1
