"""Three real TFDS datasets, built here from files and read back offline."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import dataset_iterator
from t5x_lite.data.tasks import catalog, tfds_source
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

BYTES = VocabularyConfig(kind='byte')
ROWS = 20


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
  """Adds nothing."""


# TFDS has datasets of these names already.
with tfds.core.registered.skip_registration():

  class _Base(tfds.core.GeneratorBasedBuilder):
    """Reads text files, one a split."""

    VERSION = tfds.core.Version('9.0.0')
    FILES = ''

    def _split_generators(self, dl_manager):
      del dl_manager
      return {split: self._generate_examples(split) for split in ('train', 'validation')}

    def _generate_examples(self, split):
      with open(f'{self.FILES}/{self.name}.{split}.txt') as file:
        for i, line in enumerate(file):
          yield i, self.row(i, line.rstrip('\n').split('\t'))

    def row(self, number, fields):
      raise NotImplementedError

  def _info(builder, features):
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=builder, features=features)

  class C4(_Base):
    """Text."""

    BUILDER_CONFIGS = (Config(name='en', version=tfds.core.Version('9.0.0')),)

    def _info(self):
      return _info(self, {'text': tfds.features.Text(), 'url': tfds.features.Text()})

    def row(self, number, fields):
      return {'text': fields[0], 'url': str(number)}

  class Glue(_Base):
    """Classification."""

    BUILDER_CONFIGS = (Config(name='cola', version=tfds.core.Version('1.0.0')),)

    def _info(self):
      label = tfds.features.ClassLabel(names=['unacceptable', 'acceptable'])
      return _info(self, {'sentence': tfds.features.Text(), 'label': label, 'idx': np.int32})

    def row(self, number, fields):
      return {'sentence': fields[0], 'label': int(fields[1]), 'idx': number}

  class Wmt16Translate(_Base):
    """Translation."""

    BUILDER_CONFIGS = (Config(name='ro-en', version=tfds.core.Version('1.0.0')),)

    def _info(self):
      return _info(self, tfds.features.Translation(languages=('ro', 'en')))

    def row(self, number, fields):
      return {'en': fields[0], 'ro': fields[1]}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Returns a data directory with the three."""
  files, directory = tmp_path_factory.mktemp('files'), tmp_path_factory.mktemp('tfds')
  _Base.FILES = str(files)
  for builder, config in ((C4, 'en'), (Glue, 'cola'), (Wmt16Translate, 'ro-en')):
    for split in ('train', 'validation'):
      rows = {
        'c4': [f'document {split} {i} ' + 'to be or not to be ' * 5 for i in range(ROWS)],
        'glue': [f'sentence {split} {i}\t{i % 2}' for i in range(ROWS)],
        'wmt16_translate': [f'english {i}\tromanian {i}' for i in range(ROWS)],
      }[builder.name]
      (files / f'{builder.name}.{split}.txt').write_text('\n'.join(rows))
    one = builder(config=config, data_dir=str(directory))
    one.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  return str(directory)


@pytest.fixture
def data_dir(prepared, monkeypatch):
  catalog.import_modules()
  monkeypatch.setenv('TFDS_DATA_DIR', prepared)
  return prepared


def texts(name, split='train'):
  task = seqio.get_mixture_or_task(catalog.resolve(name, BYTES))
  dataset = task.get_dataset({'inputs': 999, 'targets': 999}, split=split, shuffle=False)
  decode = task.output_features['targets'].vocabulary.decode
  return [
    tuple(decode(example[key].tolist()) for key in ('inputs', 'targets'))
    for example in dataset.as_numpy_iterator()
  ]


def test_classification(data_dir):
  want = [
    (f'cola sentence: sentence train {i}', ('unacceptable', 'acceptable')[i % 2])
    for i in range(ROWS)
  ]
  # TFDS shuffles when it prepares.
  assert sorted(texts('glue_cola_v002')) == sorted(want)


def test_translation(data_dir):
  want = [(f'translate English to Romanian: english {i}', f'romanian {i}') for i in range(ROWS)]
  assert sorted(texts('wmt16_enro_v003', 'validation')) == sorted(want)


def test_text_of_another_version_through_the_rows(data_dir):
  """The path of training; 9.0.0 is there, 2.2.0 is asked for."""
  cfg = DatasetConfig(
    mixture_or_task_name=catalog.resolve('c4_v220_span_corruption', BYTES),
    task_feature_lengths={'inputs': 64, 'targets': 32},
    batch_size=4,
    window=8,
    num_threads=1,
  )
  iterator = dataset_iterator.DatasetIterator(cfg)
  batch = next(iterator)
  state = next(iterator)
  iterator.close()
  assert batch['encoder_input_tokens'].shape == (4, 64) and state.keys() == batch.keys()
  assert (batch['encoder_input_tokens'] > 0).mean() > 0.9


def test_a_short_text_to_repeat(data_dir):
  """Table 9: so many documents of the training split, and all of the others."""
  name = catalog.resolve('c4_v220_first3_full_lm', BYTES)
  task = seqio.get_mixture_or_task(name)
  assert task.num_input_examples('train') == 3
  assert task.num_input_examples('validation') == ROWS


def test_examples_are_counted(data_dir):
  catalog.register_mixture('tfds_source_mixture', ['glue_cola_v002', 'wmt16_enro_v003'], limit=5)
  name = catalog.resolve('tfds_source_mixture', BYTES)
  mixture = seqio.get_mixture_or_task(name)
  assert [mixture.get_rate(task) for task in mixture.tasks] == [5, 5]
  source = tfds_source.PreparedSource('glue/cola:1.0.0', {'part': 'train[:25%]'}, ())
  assert source.num_input_examples('part') == ROWS // 4


def test_seqios_own_setting_names_the_directory(prepared, tmp_path, monkeypatch):
  catalog.import_modules()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  monkeypatch.setattr(seqio.utils, '_TFDS_DATA_DIR_OVERRIDE', prepared)
  source = tfds_source.PreparedSource('glue/cola:1.0.0', {'train': 'train'}, ('sentence',))
  assert source.num_input_examples('train') == ROWS


def test_a_users_own_source_reads_what_is_prepared(data_dir):
  """SeqIO's would ask the network first, even for what is there."""
  feature = seqio.Feature(seqio.ByteVocabulary(), required=False)
  names = {
    'theirs': 'glue/cola:1.0.0',
    'default_config': 'wmt16_translate:1.0.0',
    'nowhere': 'squad:3.0.0',
  }
  for name, dataset in names.items():
    source = seqio.TfdsDataSource(tfds_name=dataset)
    seqio.TaskRegistry.add(f'tfds_source_{name}', source, output_features={'targets': feature})
  task = catalog.find_provider('tfds_source_theirs')
  assert set(task.splits) == {'train', 'validation'}
  assert task.source.num_input_examples('train') == ROWS
  assert len(list(task.source.get_dataset('train', shuffle=False))) == ROWS
  name = catalog.find_provider('tfds_source_nowhere').source.tfds_dataset.name
  assert name == 'squad/v1.1:3.0.0'
  assert (
    catalog.find_provider('tfds_source_default_config').source.tfds_dataset.name.count('/') == 1
  )
  for _ in range(2):
    with pytest.raises(UsageError, match=r'run `tfds build squad/v1\.1'):
      assert catalog.find_provider('tfds_source_nowhere').splits


def test_a_missing_column_or_split_is_one_line(data_dir):
  source = tfds_source.PreparedSource('glue/cola:1.0.0', {'train': 'train'}, ('text',))
  with pytest.raises(UsageError, match=r"no column 'text', only idx, label, sentence"):
    source.get_dataset('train')
  source = tfds_source.PreparedSource('glue/cola:1.0.0', {'test': 'test[:5]'}, ())
  with pytest.raises(UsageError, match=r"no split 'test', only train, validation"):
    source.get_dataset('test')
