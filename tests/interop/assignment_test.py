import numpy as np
import pytest

from t5x_lite import errors
from t5x_lite.interop import assignment, checkpoint_source, tensors
from tests.models import tiny

CFG = tiny.config()
WO = r'encoder/layers_(\d)/mlp/wo/kernel'


@pytest.fixture(scope='module')
def opened():
  found = tensors.of_params(tiny.params(CFG), CFG)
  return checkpoint_source.Source(
    path='DIR', format='t5x', config=CFG, tensors=found, unknown=['stranger']
  )


def known(opened, **changes):
  import dataclasses

  return dataclasses.replace(opened, unknown=[], **changes)


def test_equal_names_by_default(opened):
  result, report = assignment.assign(known(opened), CFG)
  assert set(result) == set(opened.tensors)
  assert len(report.loaded) == len(result)
  assert not report.skipped and not report.initialised
  assert report.summary() == f'{len(result)} tensors loaded'


def test_patterns_map_names(opened):
  result, report = assignment.assign(
    known(opened), CFG, assignment_map=[(WO, r'decoder/layers_\1/mlp/wo/kernel')], strict=False
  )
  for i in range(2):
    np.testing.assert_array_equal(
      result[f'encoder/layers_{i}/mlp/wo/kernel'].read(),
      opened.tensors[f'decoder/layers_{i}/mlp/wo/kernel'].read(),
    )
  assert report.skipped == [f'encoder/layers_{i}/mlp/wo/kernel' for i in (0, 1)]


def test_none_draws_anew_and_drops(opened):
  result, report = assignment.assign(
    opened, CFG, assignment_map=[(WO, None), ('strange.*', None)], seed=3
  )
  assert report.initialised == [f'encoder/layers_{i}/mlp/wo/kernel' for i in range(2)]
  assert 'stranger' in report.skipped
  import jax

  from t5x_lite.models import t5

  fresh = t5.init_params(CFG, jax.random.key(3))
  drawn = fresh['encoder']['layers']['mlp']['wo']['kernel']
  for i in range(2):
    tensor = result[f'encoder/layers_{i}/mlp/wo/kernel']
    np.testing.assert_allclose(tensor.read(), drawn[i], rtol=1e-6)
  placed = tensors.place(result, CFG)
  np.testing.assert_allclose(placed['encoder']['layers']['mlp']['wo']['kernel'], drawn, rtol=1e-6)
  assert '2 newly initialised (encoder/layers_0' in report.summary()


def test_strict_speaks_of_what_is_left_over(opened):
  with pytest.raises(errors.UsageError, match=r'stranger.*no place'):
    assignment.assign(opened, CFG)
  _, report = assignment.assign(opened, CFG, strict=False)
  assert report.skipped == ['stranger']


def test_strict_speaks_of_what_is_missing(opened):
  deeper = CFG.replace(num_encoder_layers=3)
  with pytest.raises(errors.UsageError, match=r'no tensor for encoder/layers_2'):
    assignment.assign(known(opened), deeper)
  result, report = assignment.assign(known(opened), deeper, strict=False)
  assert len(report.initialised) == 9
  placed = tensors.place(result, deeper)
  kernel = placed['encoder']['layers']['mlp']['wo']['kernel']
  np.testing.assert_array_equal(kernel[1], opened.tensors['encoder/layers_1/mlp/wo/kernel'].read())
  assert np.abs(kernel[2]).max() > 0


def test_shapes_are_never_forced(opened):
  wider = CFG.replace(mlp_dim=40)
  with pytest.raises(errors.UsageError, match=r'\(16, 32\).*\(16, 40\)'):
    assignment.assign(known(opened), wider, strict=False)


@pytest.mark.parametrize(
  ('rule', 'match'),
  [
    (('nothing', None), 'matches nothing'),
    (('(', None), 'no regular expression'),
    ((WO, 'nowhere'), 'nowhere.*does not have'),
  ],
)
def test_rules_that_cannot_work(opened, rule, match):
  with pytest.raises(errors.UsageError, match=match):
    assignment.assign(known(opened), CFG, assignment_map=[rule])


def test_an_architecture_can_leave_a_stack_out(opened):
  encoder = CFG.replace(architecture='encoder')
  result, report = assignment.assign(known(opened), encoder)
  assert all(not name.startswith('decoder') for name in result)
  assert report.skipped and all(n.startswith('decoder') for n in report.skipped)


@pytest.mark.parametrize(
  'change',
  [
    {'mlp_activations': ('silu', 'linear')},
    {'scale_logits': True},
    {'decoder_start_id': 2},
    {'num_heads': 2, 'head_dim': 16},
  ],
)
def test_other_numerics_than_the_checkpoints(opened, change):
  run = known(opened, format='t5x_lite')
  assignment.check_numerics(run, CFG.replace(dropout_rate=0.1, vocab_size=99))
  with pytest.raises(errors.UsageError, match=f'has {next(iter(change))}='):
    assignment.check_numerics(run, CFG.replace(**change))
  # T5X's checkpoints hold no configuration to compare with.
  assignment.check_numerics(known(opened), CFG.replace(**change))
