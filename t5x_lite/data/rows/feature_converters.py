"""Turns task features into model features for each architecture. numpy only.

A converter is two steps around packing: `prepare` arranges ragged task features (`inputs`,
`targets`) into those that share a row, `convert` turns packed or padded rows into the arrays that
the model takes, under SeqIO's names (seqio/feature_converters.py). Padding has segment 0.

Differences from SeqIO: decoder_input_tokens is 0 on all padding (SeqIO's unpacked form leaves the
last target one place after the end), loss weights are float32, without targets there is no loss.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from t5x_lite.data.rows import packing
from t5x_lite.errors import UsageError

CONVERTERS = ('enc_dec', 'lm', 'prefix_lm')
_PREFIX = 'targets_prefix'
# A task's own weight of every target token, a feature beside `targets`.
LOSS_WEIGHTS = 'targets_loss_weights'
# The number of an example's task, one value an example.
TASK_ID = 'task_id'


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConverter:
  """How one architecture reads `inputs` and `targets`.

  Kinds are 'enc_dec' (encoder reads inputs, decoder writes targets), 'lm' (one causal sequence:
  inputs, if the task has them, then targets) or 'prefix_lm' (the same, inputs fully visible:
  decoder_causal_attention is 1 on them and on the position that predicts the first target).
  """

  kind: str
  lengths: Mapping[str, int]  # of task features
  decoder_start_id: int = 0  # first decoder input of every example
  loss_on_targets_only: bool = True  # no loss on the inputs of 'lm' and 'prefix_lm'
  segment_ids: bool = True  # give *_segment_ids and *_positions too
  # Examples have `targets_loss_weights`; the inputs of 'lm' and 'prefix_lm' weigh 1.
  loss_weights: bool = False
  task_ids: bool = False  # examples have `task_id`; gives decoder_task_ids, 0 on padding

  @property
  def extra_features(self) -> tuple[str, ...]:
    """Features of an example besides those that have a length."""
    return (LOSS_WEIGHTS,) * self.loss_weights + (TASK_ID,) * self.task_ids

  @property
  def row_lengths(self) -> dict[str, int]:
    """Row length of each feature that `prepare` returns and packing places."""
    if self.kind == 'enc_dec':
      return {name: self.lengths[name] for name in ('inputs', 'targets')}
    return {'targets': sum(self.lengths.values())}

  @property
  def aligned(self) -> dict[str, str]:
    """Features that follow another one value by value."""
    prefix = () if self.kind == 'enc_dec' else (_PREFIX,)
    return dict.fromkeys((*prefix, *self.extra_features), 'targets')

  def prepare(self, examples: packing.Examples) -> packing.Examples:
    """Arranges ragged task features into the features of a row."""
    targets = _as(np.int32, examples['targets'])
    rows = {'targets': targets}
    if self.loss_weights:
      rows[LOSS_WEIGHTS] = self._weights(examples[LOSS_WEIGHTS], targets)
    if self.kind == 'enc_dec':
      rows['inputs'] = _as(np.int32, examples['inputs'])
    else:
      rows[_PREFIX] = targets._replace(values=np.zeros_like(targets.values))
      if 'inputs' in self.lengths:
        inputs = _as(np.int32, examples['inputs'])
        ones = inputs._replace(values=np.ones_like(inputs.values))
        before = {'targets': inputs, _PREFIX: ones, LOSS_WEIGHTS: _as(np.float32, ones)}
        rows = {name: packing.interleave(before[name], value) for name, value in rows.items()}
    if self.task_ids:
      lengths = rows['targets'].lengths
      numbers = np.repeat(examples[TASK_ID].values.astype(np.int32), lengths)
      rows[TASK_ID] = packing.Ragged(numbers, lengths)
    return rows

  def _weights(self, weights: packing.Ragged, targets: packing.Ragged) -> packing.Ragged:
    """Returns the weights cut as the targets were, which SeqIO trims alone."""
    cut = targets.lengths == self.lengths['targets']
    wrong = (weights.lengths != targets.lengths) & ~(cut & (weights.lengths > targets.lengths))
    if wrong.any():
      at = int(wrong.argmax())
      counts = f'{targets.lengths[at]} targets and {weights.lengths[at]} {LOSS_WEIGHTS}'
      fix = 'a task must give every token its weight, EOS too'
      raise UsageError(f'an example has {counts}: {fix}')
    if not np.isfinite(weights.values).all() or (weights.values < 0).any():
      raise UsageError(f'{LOSS_WEIGHTS} of a task must be numbers of 0 or more')
    keep = packing.ramp(weights.lengths) < np.repeat(targets.lengths, weights.lengths)
    return _as(np.float32, packing.Ragged(weights.values[keep], targets.lengths))

  def convert(self, rows: packing.Rows) -> packing.Rows:
    """Turns rows into model features."""
    targets, segments = rows['targets'], rows['targets_segment_ids']
    positions = rows['targets_positions']
    real = segments > 0
    batch: packing.Rows = {}
    if self.kind == 'enc_dec':
      batch['encoder_input_tokens'] = rows['inputs']
      if self.segment_ids:
        batch['encoder_segment_ids'] = rows['inputs_segment_ids']
        batch['encoder_positions'] = rows['inputs_positions']
    batch['decoder_target_tokens'] = targets
    first = real & (positions == 0)
    shifted = np.where(first, self.decoder_start_id, _shift_right(targets))
    batch['decoder_input_tokens'] = (shifted * real).astype(np.int32)
    weights = real
    if self.kind != 'enc_dec':
      prefix = rows[_PREFIX] > 0
      if self.loss_on_targets_only:
        weights = real & ~prefix
      if self.kind == 'prefix_lm':
        # One place further than the inputs (mesh_tensorflow's rule): where the
        # last input is read and the first target predicted.
        visible = real & (first | prefix | (_shift_right(prefix) > 0))
        batch['decoder_causal_attention'] = visible.astype(np.int32)
    if self.loss_weights:
      weights = weights * rows[LOSS_WEIGHTS]
    batch['decoder_loss_weights'] = weights.astype(np.float32)
    if self.task_ids:
      batch['decoder_task_ids'] = rows[TASK_ID]
    if self.segment_ids:
      batch['decoder_segment_ids'] = segments
      batch['decoder_positions'] = positions
    return batch

  def padded(self, examples: packing.Examples) -> packing.Rows:
    """Returns model features of ragged task features, one example a row."""
    return self.convert(packing.pad(self.prepare(examples), self.row_lengths, self.aligned))

  def spec(self) -> dict[str, tuple[int, np.dtype]]:
    """Returns the length and dtype of every model feature."""
    none = packing.Ragged(np.zeros(0, np.int32), np.zeros(0, np.int64))
    empty = dict.fromkeys((*self.lengths, *self.extra_features), none)
    return {k: (v.shape[1], v.dtype) for k, v in self.padded(empty).items()}


def _as(dtype: type, ragged: packing.Ragged) -> packing.Ragged:
  return packing.Ragged(ragged.values.astype(dtype), ragged.lengths)


def _shift_right(rows: np.ndarray) -> np.ndarray:
  return np.pad(rows[:, :-1], ((0, 0), (1, 0)))
