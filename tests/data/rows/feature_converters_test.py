"""Model features equal SeqIO's worked examples, and its bugs are absent."""

import numpy as np
import pytest

from t5x_lite.data.rows import feature_converters, packing
from t5x_lite.errors import UsageError


def convert(kind, lengths, examples, packed, **kwargs):
  converter = feature_converters.FeatureConverter(kind=kind, lengths=lengths, **kwargs)
  examples = converter.prepare(
    {
      k: packing.Ragged.from_arrays(v, np.float32 if 'weights' in k else np.int64)
      for k, v in examples.items()
    }
  )
  if packed:
    packer = packing.Packer(converter.row_lengths, converter.aligned)
    packer.add(examples)
    rows = packer.flush()
  else:
    rows = packing.pad(examples, converter.row_lengths, converter.aligned)
  batch = converter.convert(rows)
  spec = {k: (v.shape[1], v.dtype) for k, v in batch.items()}
  assert spec == converter.spec()
  return batch


def check(batch, want):
  assert sorted(batch) == sorted(want)
  for name, rows in want.items():
    assert batch[name].tolist() == rows, name


PAIRS = {'inputs': [[7, 8, 5, 1], [8, 4, 9, 3, 1]], 'targets': [[3, 9, 1], [4, 1]]}


def test_enc_dec_packed_is_seqios_example():
  batch = convert('enc_dec', {'inputs': 10, 'targets': 7}, PAIRS, packed=True)
  check(
    batch,
    {
      'encoder_input_tokens': [[7, 8, 5, 1, 8, 4, 9, 3, 1, 0]],
      'encoder_segment_ids': [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]],
      'encoder_positions': [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]],
      'decoder_target_tokens': [[3, 9, 1, 4, 1, 0, 0]],
      'decoder_input_tokens': [[0, 3, 9, 0, 4, 0, 0]],
      'decoder_loss_weights': [[1, 1, 1, 1, 1, 0, 0]],
      'decoder_segment_ids': [[1, 1, 1, 2, 2, 0, 0]],
      'decoder_positions': [[0, 1, 2, 0, 1, 0, 0]],
    },
  )
  assert batch['decoder_loss_weights'].dtype == np.float32
  assert batch['decoder_input_tokens'].dtype == np.int32


def test_enc_dec_unpacked():
  batch = convert(
    'enc_dec',
    {'inputs': 5, 'targets': 4},
    PAIRS,
    packed=False,
    segment_ids=False,
    decoder_start_id=2,
  )
  check(
    batch,
    {
      'encoder_input_tokens': [[7, 8, 5, 1, 0], [8, 4, 9, 3, 1]],
      'decoder_target_tokens': [[3, 9, 1, 0], [4, 1, 0, 0]],
      'decoder_input_tokens': [[2, 3, 9, 0], [2, 4, 0, 0]],
      'decoder_loss_weights': [[1, 1, 1, 0], [1, 1, 0, 0]],
    },
  )


def test_id_zero_is_a_target_like_any_other():
  batch = convert(
    'enc_dec',
    {'inputs': 3, 'targets': 5},
    {'inputs': [[0, 4]], 'targets': [[3, 0, 1]]},
    packed=False,
  )
  assert batch['encoder_segment_ids'].tolist() == [[1, 1, 0]]
  assert batch['decoder_input_tokens'].tolist() == [[0, 3, 0, 0, 0]]
  assert batch['decoder_loss_weights'].tolist() == [[1, 1, 1, 0, 0]]


def test_lm_packed_is_seqios_example():
  batch = convert('lm', {'targets': 6}, {'targets': [[3, 9, 1], [4, 1]]}, packed=True)
  check(
    batch,
    {
      'decoder_target_tokens': [[3, 9, 1, 4, 1, 0]],
      'decoder_input_tokens': [[0, 3, 9, 0, 4, 0]],
      'decoder_loss_weights': [[1, 1, 1, 1, 1, 0]],
      'decoder_positions': [[0, 1, 2, 0, 1, 0]],
      'decoder_segment_ids': [[1, 1, 1, 2, 2, 0]],
    },
  )


PREFIX_LM = {
  'decoder_target_tokens': [[7, 8, 5, 1, 3, 9, 1, 8, 4, 9, 3, 1, 4, 1, 0]],
  'decoder_input_tokens': [[0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 9, 3, 1, 4, 0]],
  'decoder_loss_weights': [[0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]],
  'decoder_positions': [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]],
  'decoder_segment_ids': [[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0]],
  'decoder_causal_attention': [[1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]],
}


def test_prefix_lm_packed_is_seqios_example():
  batch = convert('prefix_lm', {'inputs': 7, 'targets': 8}, PAIRS, packed=True)
  check(batch, PREFIX_LM)


def test_lm_over_inputs_and_targets_has_no_visible_prefix():
  batch = convert('lm', {'inputs': 7, 'targets': 8}, PAIRS, packed=True)
  want = dict(PREFIX_LM)
  del want['decoder_causal_attention']
  check(batch, want)


def test_prefix_lm_unpacked_is_seqios_example():
  batch = convert(
    'prefix_lm',
    {'inputs': 10, 'targets': 4},
    {'inputs': [[9, 4, 6, 1]], 'targets': [[3, 9, 1]]},
    packed=False,
    segment_ids=False,
  )
  zeros = [0] * 7
  check(
    batch,
    {
      'decoder_target_tokens': [[9, 4, 6, 1, 3, 9, 1, *zeros]],
      'decoder_input_tokens': [[0, 9, 4, 6, 1, 3, 9, *zeros]],
      'decoder_loss_weights': [[0, 0, 0, 0, 1, 1, 1, *zeros]],
      'decoder_causal_attention': [[1, 1, 1, 1, 1, 0, 0, *zeros]],
    },
  )


def test_loss_on_the_prefix_too():
  batch = convert(
    'prefix_lm', {'inputs': 7, 'targets': 8}, PAIRS, packed=True, loss_on_targets_only=False
  )
  assert batch['decoder_loss_weights'].sum() == 14


@pytest.mark.parametrize('kind', ['lm', 'prefix_lm'])
def test_an_example_without_targets_leaves_its_neighbour_alone(kind):
  batch = convert(
    kind, {'inputs': 4, 'targets': 4}, {'inputs': [[5, 6], [7]], 'targets': [[], [8]]}, packed=True
  )
  assert batch['decoder_segment_ids'][0, :5].tolist() == [1, 1, 2, 2, 0]
  assert batch['decoder_loss_weights'][0, :5].tolist() == [0, 0, 0, 1, 0]
  if kind == 'prefix_lm':
    assert batch['decoder_causal_attention'][0, :5].tolist() == [1, 1, 1, 1, 0]


WEIGHED = PAIRS | {'targets_loss_weights': [[0.5, 2.0, 0.0], [1.0, 0.25]]}


@pytest.mark.parametrize('packed', [True, False])
def test_a_tasks_own_weights_follow_its_tokens(packed):
  lengths = {'inputs': 10, 'targets': 7}
  batch = convert('enc_dec', lengths, WEIGHED, packed, loss_weights=True)
  want = [[0.5, 2, 0, 1, 0.25, 0, 0]] if packed else [[0.5, 2, 0, 0, 0, 0, 0], [1, 0.25] + [0] * 5]
  assert batch['decoder_loss_weights'].tolist() == want
  plain = convert('enc_dec', lengths, PAIRS, packed)
  for name in plain.keys() - {'decoder_loss_weights'}:
    np.testing.assert_array_equal(plain[name], batch[name])


@pytest.mark.parametrize(('targets_only', 'before'), [(True, [0] * 4), (False, [1] * 4)])
def test_weights_of_a_decoder_are_of_its_targets(targets_only, before):
  batch = convert(
    'lm',
    {'inputs': 5, 'targets': 4},
    {name: values[:1] for name, values in WEIGHED.items()},
    packed=True,
    loss_weights=True,
    loss_on_targets_only=targets_only,
  )
  assert batch['decoder_loss_weights'].tolist() == [[*before, 0.5, 2, 0, 0, 0]]


def test_weights_are_cut_as_the_targets_were():
  examples = {'inputs': [[5]], 'targets': [[3, 9]], 'targets_loss_weights': [[0.5, 2.0, 7.0]]}
  batch = convert('enc_dec', {'inputs': 2, 'targets': 2}, examples, False, loss_weights=True)
  assert batch['decoder_loss_weights'].tolist() == [[0.5, 2]]
  for weights, message in (
    ([0.5], '2 targets and 1 targets_loss_weights'),
    ([1.0, -1.0], 'must be numbers of 0 or more'),
  ):
    examples['targets_loss_weights'] = [weights]
    with pytest.raises(UsageError, match=message):
      convert('enc_dec', {'inputs': 2, 'targets': 2}, examples, False, loss_weights=True)
  with pytest.raises(UsageError, match='2 targets and 3'):
    examples['targets_loss_weights'] = [[1.0, 1.0, 1.0]]
    convert('enc_dec', {'inputs': 2, 'targets': 5}, examples, False, loss_weights=True)


@pytest.mark.parametrize('kind', ['enc_dec', 'prefix_lm'])
def test_task_numbers_are_of_every_token(kind):
  examples = PAIRS | {'task_id': [[2], [0]]}
  batch = convert(kind, {'inputs': 10, 'targets': 7}, examples, packed=True, task_ids=True)
  segments = batch['decoder_segment_ids']
  np.testing.assert_array_equal(batch['decoder_task_ids'], np.where(segments == 1, 2, 0))
