"""Sources of TensorFlow Datasets that are prepared already; nothing is downloaded.

SeqIO's own source goes to the network for whatever it does not find, and without one hangs for
minutes. This one looks into the data directory alone: DatasetConfig does not name it,
TFDS_DATA_DIR, `--tfds_data_dir` or `seqio.set_tfds_data_dir_override` do. It may be on GCS
(gs://...).
"""

import os
import re
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from t5x_lite.errors import UsageError, refusing


def find_prepared(name: str, directory: str) -> epath.Path:
  """Returns the folder of a prepared dataset such as 'glue/cola:1.0.0' in a data directory.

  If that version is not there, the newest will do; UsageError if there is none.
  """
  dataset, _, version = name.partition(':')
  root = epath.Path(directory).expanduser()
  versions = {}
  with refusing(f'{root} cannot be read', OSError, tf.errors.OpError):
    for path in (root / dataset).iterdir() if (root / dataset).exists() else ():
      if re.fullmatch(r'\d+\.\d+\.\d+', path.name) and (path / 'dataset_info.json').exists():
        versions[tuple(map(int, path.name.split('.')))] = path
  if not versions:
    raise UsageError(
      f'the TFDS dataset {dataset} is not prepared in {root}: run `tfds build {dataset} '
      f'--data_dir={root}` where there is a network, or name the directory that has it by '
      'TFDS_DATA_DIR or --tfds_data_dir'
    )
  return next((p for p in versions.values() if p.name == version), versions[max(versions)])


class _Loader(seqio.utils.LazyTfdsLoader):
  """Finds the builder by its folder, so that no network is asked."""

  def _get_builder_key(self, dataset: str, directory: str | None) -> tuple[str, str]:
    return dataset, directory or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'

  def _get_builder(self, split: str | None = None):
    key = self._get_builder_key(self.name, self.data_dir)
    if key not in self._MEMOIZED_BUILDERS:
      self._MEMOIZED_BUILDERS[key] = tfds.builder_from_directory(find_prepared(*key))
    return self._MEMOIZED_BUILDERS[key]


def read_prepared(source: seqio.DataSource) -> None:
  """Makes a user's own seqio.TfdsDataSource look into the data directory alone, too."""
  if type(source) is seqio.TfdsDataSource and (loader := source.tfds_dataset).name:
    dataset, colon, version = loader.name.partition(':')
    if '/' not in dataset:  # a default config has no name there, but a folder
      config = getattr(loader.builder_cls(), 'default_builder_config', None)
      dataset += f'/{config.name}' if config else ''
    loader._name, loader._read_only = f'{dataset}{colon}{version}', True
    loader.__class__ = _Loader


class PreparedSource(seqio.TfdsDataSource):
  """A dataset by name, with its splits and columns known before it is touched."""

  def __init__(self, name: str, splits: Mapping[str, str], columns: Sequence[str]):
    """Reads nothing yet.

    `name` is with config and version, 'glue/cola:1.0.0'; splits are TFDS's, or parts of them
    ('train[:90%]'), by our names; columns are those that the task needs.
    """
    super().__init__(name, splits=dict(splits), read_only=True)
    self._tfds_dataset = _Loader(name, split_map=dict(splits), read_only=True)
    self._columns = columns

  def get_dataset(self, split: str | None = None, *args, **kwargs) -> tf.data.Dataset:
    """See seqio.TfdsDataSource; UsageError if it, its split or a column is not there."""
    name, info = self.tfds_dataset.name, self.tfds_dataset.info
    parts = self.tfds_dataset._map_split(split or 'train') or ''
    splits = [part.partition('[')[0] for part in parts.split('+')]
    needed = {'column': (self._columns, info.features), 'split': (splits, info.splits)}
    for kind, (names, there) in needed.items():
      if lacking := [one for one in names if there and one not in there]:
        raise UsageError(f'{name} has no {kind} {lacking[0]!r}, only {", ".join(sorted(there))}')
    return super().get_dataset(split, *args, **kwargs)
