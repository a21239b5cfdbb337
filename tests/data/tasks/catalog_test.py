import contextlib
import dataclasses
import functools
import itertools
import json

import pytest
import seqio
import tensorflow as tf

from t5x_lite.data import vocabularies
from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import dataset_iterator
from t5x_lite.data.tasks import catalog, sources
from t5x_lite.data.tasks import seqio_vocabulary as seqio_vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

_NUMBERS = itertools.count()


@pytest.fixture
def name():
  """A name no other test has used: SeqIO's registry lasts."""
  return f'recipes_test_{next(_NUMBERS)}'


def add(name, **settings):
  rows = {'inputs': ['a', 'b'], 'targets': ['x', 'y']}
  recipe = catalog.TaskRecipe(
    make_source=functools.partial(sources.RowsDataSource, {'train': lambda: rows}), **settings
  )
  catalog.add(name, recipe)


def test_a_recipe_serves_every_vocabulary(name):
  add(name)
  assert name in catalog.catalog()
  assert not catalog.is_registered(f'{name}_byte')
  assert catalog.resolve(name, VocabularyConfig(kind='byte')) == f'{name}_byte'
  assert catalog.resolve(name, VocabularyConfig()) == f'{name}_t5'
  own = VocabularyConfig(kind='byte', extra_ids=7)
  assert catalog.resolve(name, own) == f'{name}_byte7'
  assert catalog.resolve(name, own) == f'{name}_byte7'
  sizes = [
    seqio.TaskRegistry.get(f'{name}_{suffix}').output_features['inputs'].vocabulary.vocab_size
    for suffix in ('byte', 't5', 'byte7')
  ]
  assert sizes == [384, 32_100, 266]


def test_a_vocabulary_saved_with_a_run_is_the_same(name, tmp_path):
  vocabularies.save_vocabulary(VocabularyConfig(), tmp_path)
  saved = vocabularies.load_vocabulary(tmp_path)
  assert catalog.suffix(saved) == 't5'
  add(name)
  full_name = catalog.resolve(name, VocabularyConfig())
  assert catalog.resolve(name, saved) == full_name
  # Also by the full name, though the files differ.
  assert catalog.resolve(full_name, saved) == full_name


def test_full_names_must_have_the_models_vocabulary(name):
  add(name)
  full_name = catalog.resolve(name, VocabularyConfig())
  for other in (VocabularyConfig(kind='byte'), VocabularyConfig(extra_ids=28)):
    with pytest.raises(UsageError, match=rf'{full_name}.* has the vocabulary'):
      catalog.resolve(full_name, other)


def test_tasks_that_others_registered(name):
  feature = seqio.Feature(seqio_vocabularies.to_seqio(VocabularyConfig(kind='byte')))
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(lambda split, shuffle_files: None, ['x']),
    output_features={'inputs': feature},
  )
  assert catalog.resolve(name, VocabularyConfig(kind='byte')) == name
  with pytest.raises(UsageError, match=r'already'):
    add(name)


def test_unknown_names_get_a_suggestion(name):
  add(name)
  with pytest.raises(UsageError, match=rf'did you mean .*{name}'):
    catalog.resolve(f'{name}x', VocabularyConfig())


def test_mixtures(name):
  parts = [f'{name}_a', f'{name}_b']
  for part in parts:
    add(part)
  catalog.register_mixture(name, {parts[0]: 3.0, parts[1]: 1.0})
  full_name = catalog.resolve(name, VocabularyConfig(kind='byte'))
  mixture = seqio.MixtureRegistry.get(full_name)
  rates = [mixture.get_rate(task) for task in mixture.tasks]
  assert rates == [3.0, 1.0]
  catalog.register_mixture(
    f'{name}_fixed', {parts[0]: 1.0}, vocabulary=VocabularyConfig(kind='byte')
  )
  assert catalog.is_registered(f'{name}_fixed')
  with pytest.raises(UsageError, match=r'names .*none.* not registered'):
    catalog.register_mixture(f'{name}_2', {'none': 1.0})
  with pytest.raises(UsageError, match=r'rate 0'):
    catalog.register_mixture(f'{name}_2', {parts[0]: 0})
  with pytest.raises(UsageError, match=r'choose another name'):
    catalog.register_mixture(name, {parts[0]: 1.0})


def test_texts_come_before_the_tokenization(name):
  def shout(dataset):
    return dataset.map(lambda e: {**e, 'inputs': e['inputs'] + '!'})

  add(name, preprocessors=(shout,))
  assert list(catalog.texts(name)) == ['a!', 'x', 'b!', 'y']
  catalog.register_mixture(f'{name}_mix', {name: 1.0})
  assert list(catalog.texts(f'{name}_mix')) == ['a!', 'x', 'b!', 'y']
  with pytest.raises(UsageError, match=r'no split .*test.*, only train'):
    list(catalog.texts(name, 'test'))
  with pytest.raises(UsageError, match=r'There is no task'):
    list(catalog.texts(f'{name}_none'))


@pytest.mark.parametrize(
  'weights',
  [
    seqio.ContinuousFeature(dtype=tf.float32, rank=1),
    seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32),
  ],
)
def test_loss_weights_have_no_vocabulary(name, weights):
  """A task that has them can be named for training, as any of the user's own."""
  bytes_ = seqio.Feature(seqio_vocabularies.to_seqio(VocabularyConfig(kind='byte')))
  source = sources.RowsDataSource({'train': lambda: {}})
  features = {'targets': bytes_, 'targets_loss_weights': weights}
  seqio.TaskRegistry.add(name, source, output_features=features)
  assert catalog.resolve(name, VocabularyConfig(kind='byte')) == name
  with pytest.raises(UsageError, match=r"vocabulary .* for 'targets'"):
    catalog.resolve(name, VocabularyConfig())


def test_what_seqio_has_cached_is_read(tmp_path, monkeypatch):
  """By the name of t5's task, as `seqio_cache_tasks` writes it; TFDS has nothing there."""
  name = catalog.resolve('c4_realnewslike_v220_span_corruption', VocabularyConfig())
  vocabulary = seqio.get_mixture_or_task(name).output_features['targets'].vocabulary
  folder = tmp_path / name
  folder.mkdir()
  tokens = tf.train.Int64List(value=vocabulary.encode('to be or not to be ' * 30))
  feature = {'targets': tf.train.Feature(int64_list=tokens)}
  row = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
  with tf.io.TFRecordWriter(str(folder / 'train.tfrecord-00000-of-00001')) as writer:
    for _ in range(4):
      writer.write(row)
  features = {'targets': {'shape': [None], 'dtype': 'int32'}}
  info = {'num_shards': 1, 'features': features, 'seqio_version': '0.0.20'}
  (folder / 'info.train.json').write_text(json.dumps(info))
  (folder / 'stats.train.json').write_text(json.dumps({'examples': 4}))
  (folder / 'COMPLETED').touch()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'nowhere'))
  monkeypatch.setenv('SEQIO_CACHE_DIRS', str(tmp_path))
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', [])
  config = DatasetConfig(
    mixture_or_task_name=name,
    task_feature_lengths={'inputs': 32, 'targets': 16},
    batch_size=2,
    use_cached=True,
  )
  with contextlib.closing(dataset_iterator.DatasetIterator(config)) as iterator:
    batch = next(iterator)
  assert 32_099 in batch['encoder_input_tokens'] and 32_099 in batch['decoder_target_tokens']
  with pytest.raises(UsageError, match='not prepared'):
    next(dataset_iterator.DatasetIterator(dataclasses.replace(config, use_cached=False)))
