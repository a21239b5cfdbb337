import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.tasks import catalog, step_by_step
from t5x_lite.data.tasks.from_files import register_file_task
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

BYTES = VocabularyConfig(kind='byte')

CONFIG = DatasetConfig(
  mixture_or_task_name='pronounce_byte',
  task_feature_lengths={'inputs': 8, 'targets': 8},
  batch_size=1,
)


def test_steps_follow_each_other():
  task = catalog.task_provider(CONFIG)
  found = dict(step_by_step.examples_of(task, CONFIG, 3))
  names = [name.partition('(')[0] for name in found]
  assert names[0] == 'source' and names[-1] == 'split_rows'
  assert names.index('prefix_inputs') < names.index('tokenize_rows')
  rows = list(found.values())
  assert all(1 <= len(examples) <= 3 for examples in rows)
  # Rows of text until they are tokenized, then one word an example.
  assert len(rows[-1]) == 3 and rows[-1][0]['inputs'].ndim == 1


def test_lengths_are_those_before_the_cut():
  counts = step_by_step.measure(CONFIG, catalog.task_provider(CONFIG), 20)
  assert set(counts) == {'inputs', 'targets'} and len(counts['inputs']) == 20
  assert min(counts['inputs']) > len('pronounce: ')


@pytest.mark.parametrize(
  ('step', 'message'),
  [
    (lambda dataset: dataset.filter(lambda row: False), 'no examples in train'),
    (
      seqio.map_over_dataset(lambda row: {'targets': row['answer']}),
      "asks for the column 'answer'",
    ),
  ],
)
def test_what_cannot_be_measured_is_one_line(step, message):
  cfg = DatasetConfig(
    mixture_or_task_name='step_by_step_test',
    task_feature_lengths={'targets': 8},
    feature_converter='lm',
    batch_size=1,
    num_epochs=1,
  )

  def rows(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensors({'targets': 'a'})

  task = seqio.Task(
    'step_by_step_test',
    seqio.FunctionDataSource(rows, splits=['train']),
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary())},
    preprocessors=[step, seqio.preprocessors.tokenize_and_append_eos],
  )
  with pytest.raises(UsageError, match=message):
    step_by_step.measure(cfg, task, 5)


def config(name, **lengths):
  catalog.import_modules()
  return DatasetConfig(
    mixture_or_task_name=catalog.resolve(name, BYTES),
    task_feature_lengths={'inputs': 16, 'targets': 8, **lengths},
    batch_size=2,
  )


@pytest.fixture(scope='module')
def task(tmp_path_factory):
  path = tmp_path_factory.mktemp('truncation') / 'x.tsv'
  rows = ['short\tok', 'x' * 21 + '\tok', 'short\t' + 'y' * 10]
  path.write_text('\n'.join(rows))
  register_file_task('truncation_task', train_file=str(path), input_field=0, target_field=1)
  return 'truncation_task'


def test_what_is_cut_is_counted(task):
  found = step_by_step.truncated(config(task))
  [(tokens, lost)] = found.values()
  assert list(found) == [f'{task}_byte']
  # EOS counts: 22 of 16, and 11 of 8.
  np.testing.assert_array_equal(tokens, [6 + 3, 22 + 3, 6 + 11])
  np.testing.assert_array_equal(lost, [0, 6, 3])
  [(_, lost)] = step_by_step.truncated(config(task, inputs=22, targets=11)).values()
  assert not lost.any()
  [(_, lost)] = step_by_step.truncated(config(task), sample=1).values()
  assert lost.tolist() == [0]


def test_each_task_of_a_mixture_by_itself():
  found = step_by_step.truncated(config('quickstart_mixture'), sample=20)
  assert set(found) == {f'{name}_byte' for name in ('language_id', 'pronounce', 'syllables')}
  assert all(len(lost) == 20 for _, lost in found.values())


def test_denoising_cuts_nothing():
  assert step_by_step.truncated(config('shakespeare_span_corruption')) == {}
