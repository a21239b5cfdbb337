"""Every task of the tables on TFDS's mock data, and t5's names and rates."""

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_lite.data.tasks import benchmarks, catalog, mixing, tfds_source
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

BYTES = VocabularyConfig(kind='byte')
LENGTHS = {'inputs': 64, 'targets': 64}
TASKS = [
  name
  for name in benchmarks._tables()['tasks']
  if not name.startswith('xnli_dev_test.') or name.endswith('.de')
]
TEXTS = [
  'c4_v220_prefix_lm',
  'c4_noclean_v020_unsupervised',
  'wiki40b.en_deshuffling',
  'mc4.bg_Latn',
]


def wsc(builder, split, decoders=None, read_config=None, **unused):
  """Random numbers are no places in a text."""
  del builder, split, decoders, read_config, unused
  row = {'text': 'Tom said he ran', 'span1_text': 'Tom', 'span2_text': 'he', 'span2_index': 2}
  return tf.data.Dataset.from_tensors({**row, 'label': 1}).repeat(3)


@pytest.mark.parametrize('name', [*TASKS, *TEXTS])
def test_every_task_on_mock_data(name, monkeypatch):
  catalog.import_modules()
  full_name = catalog.resolve(name, BYTES)
  task = seqio.get_mixture_or_task(full_name)
  source = benchmarks.find(name).make_source()
  monkeypatch.setattr(tfds_source._Loader, 'size', lambda self, split: 3)  # of no folder
  key = source.tfds_dataset._get_builder_key(source.tfds_dataset.name, None)
  with tfds.testing.mock_data(3, as_dataset_fn=wsc if 'wsc' in name else None):
    builder = tfds.builder(key[0].partition(':')[0])
    # A prepared folder has the features that the builder's code has.
    monkeypatch.setitem(seqio.utils.LazyTfdsLoader._MEMOIZED_BUILDERS, key, builder)
    split = next(iter(task.splits))
    dataset = task.get_dataset(LENGTHS, split=split, shuffle=False, num_epochs=1)
    examples = list(dataset.take(2).as_numpy_iterator())
  assert examples
  for example in examples:
    for feature in task.output_features:
      assert example[feature].size and example[feature].dtype == np.int32
    text = task.output_features['targets'].vocabulary.decode(example['targets'].tolist())
    if benchmarks.find(name).postprocess_fn:
      target = task.postprocess_fn(text, example=example, is_target=True)
      prediction = task.postprocess_fn('x', example=example, is_target=False)
      assert type(target) is not str and prediction is not None
  if task.metric_fns and not name.startswith(('glue_cola', 'glue_stsb')):
    # Correlations of so few are not numbers.
    wanted, got = [], []
    for example in examples:
      text = example['targets_pretokenized'].decode()
      for values, is_target in ((wanted, True), (got, False)):
        values.append(task.postprocess_fn(text, example=example, is_target=is_target))
    for metric_fn in task.metric_fns:
      assert all(np.isfinite(value) for value in metric_fn(wanted, got).values())


def test_names_are_t5s():
  catalog.import_modules()
  for name in (
    'c4_v220_span_corruption',
    'wikipedia_20190301.en_v003_unsupervised',
    'glue_v002_proportional',
    'all_mix',
    'leave_one_out_wmt16_enro_v003',
    'super_glue_wsc_v102_simple_eval',
  ):
    assert name in benchmarks.names() or benchmarks.find(name) is not None
    # With T5's vocabulary under the name that T5X users have it cached by.
    full_name = catalog.resolve(name, VocabularyConfig())
    assert full_name == name
    assert catalog.resolve(name, VocabularyConfig()) == name
    assert catalog.resolve(name, BYTES) == f'{name}_byte'
    assert catalog.short_name(f'{name}_byte', BYTES) == name
  assert benchmarks.find('c4_v220_mlm') is None
  with pytest.raises(UsageError, match=r'noise_density is 1\.5'):
    catalog.resolve('c4_v220_span_corruption_rate1.5', BYTES)


def test_a_users_task_goes_before_ours():
  catalog.import_modules()
  vocabulary = seqio.ByteVocabulary(extra_ids=7)
  source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=['train'])
  name = 'c4_v220_iid_denoising_rate0.2'
  feature = seqio.Feature(vocabulary)
  seqio.TaskRegistry.add(
    name, source=source, preprocessors=[], output_features={'targets': feature}
  )
  assert catalog.resolve(name, VocabularyConfig(kind='byte', extra_ids=7)) == name
  with pytest.raises(UsageError, match='has the vocabulary'):
    catalog.resolve(name, VocabularyConfig())
  seqio.TaskRegistry.remove(name)


def test_rates_are_t5s():
  catalog.import_modules()
  glue = seqio.get_mixture_or_task(catalog.resolve('glue_v002_proportional', BYTES))
  shares = mixing.shares(glue, 'train')
  assert shares['glue_qqp_v002_byte'] / shares['glue_rte_v002_byte'] == pytest.approx(363849 / 2490)
  assert set(shares) == {
    f'glue_{name}_v002_byte' for name in 'cola sst2 mrpc qqp stsb mnli qnli rte'.split()
  }
  everything = benchmarks.find('all_mix').rates
  assert everything['glue_rte_v002'] == everything['super_glue_rte_v102'] == 1245
  assert (
    benchmarks.find('leave_one_out_super_glue_v102_proportional').rates['glue_rte_v002'] == 2490
  )
  assert (
    'super_glue_cb_v102' not in benchmarks.find('leave_one_out_super_glue_v102_proportional').rates
  )


def test_what_is_not_prepared_is_one_line(tmp_path, monkeypatch):
  """At once: nothing is looked for on the network."""
  catalog.import_modules()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  task = seqio.get_mixture_or_task(catalog.resolve('glue_mrpc_v002', BYTES))
  assert 'train' in task.splits  # known without it
  with pytest.raises(UsageError, match='tfds build glue/mrpc --data_dir') as error:
    task.get_dataset(LENGTHS, split='train')
  assert len(str(error.value).splitlines()) == 1
  with pytest.raises(UsageError, match='is not prepared'):
    tfds_source.find_prepared('glue/mrpc:1.0.0', str(tmp_path))
