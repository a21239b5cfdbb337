import pytest

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.tasks import catalog, truncation
from t5x_lite.data.tasks.from_files import register_file_task
from t5x_lite.data.vocabularies import VocabularyConfig

BYTES = VocabularyConfig(kind='byte')


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
  [cut] = truncation.measure(config(task), BYTES)
  assert cut.task == task
  assert (cut.examples, cut.cut) == (3, 2)
  # EOS counts: 22 of 16, and 11 of 8.
  tokens = (6 + 3) + (22 + 3) + (6 + 11)
  assert cut.percent_of_tokens == pytest.approx(100 * (6 + 3) / tokens)
  [cut] = truncation.measure(config(task, inputs=22, targets=11), BYTES)
  assert cut.cut == 0
  [cut] = truncation.measure(config(task), BYTES, sample=1)
  assert (cut.examples, cut.cut) == (1, 0)


def test_each_task_of_a_mixture_by_itself():
  found = truncation.measure(config('quickstart_mixture'), BYTES, sample=20)
  assert {one.task for one in found} == {
    'language_id', 'pronounce', 'syllables',
  }  # fmt: skip
  assert all(one.examples == 20 for one in found)


def test_denoising_cuts_nothing():
  assert truncation.measure(config('shakespeare_span_corruption'), BYTES) == []
