"""A run directory on gs://, in a stand-in for epath's backend.

It has what object stores are like: `open` gives a context manager and no file
(so it is with TensorFlow's, which epath takes), there are no directories, no
locks, and no `os` call finds anything. Arrays are Orbax's and TensorStore's,
which need the real driver: they are not tried here.
"""

import contextlib
import errno
import json
import os

import pytest
from etils import epath
from etils.epath import backend, gpath

from t5x_lite.data import vocabularies
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import evaluators
from t5x_lite.programs import report
from t5x_lite.programs.infer import infer
from t5x_lite.runs import checkpoints, files, lease, metric_writers, run_directory
from t5x_lite.runs.metric_writers import MetricWriter
from tests import tiny_run
from tests.models import tiny

RUN = 'gs://bucket/some/run'
BYTES = VocabularyConfig(kind='byte')


class Store(backend._OsPathBackend):
  """gs://... in a folder; counts calls, and fails in every `failing`th write."""

  def __init__(self, root):
    self.root, self.calls, self.writes, self.failing = str(root), 0, 0, 0

  def _local(self, path):
    path = os.fspath(path)
    if path.startswith(self.root):  # one of these calls another
      return path
    assert path.startswith('gs://'), path
    self.calls += 1
    return path.replace('gs://', self.root + '/', 1)

  @contextlib.contextmanager
  def open(self, path, mode):
    if mode[0] in 'wa':
      self._fail_now_and_then()
      os.makedirs(os.path.dirname(self._local(path)), exist_ok=True)
    with super().open(self._local(path), mode) as file:
      yield file

  def _fail_now_and_then(self):
    self.writes += 1
    if self.failing and self.writes % self.failing == 0:
      raise OSError(errno.EIO, os.strerror(errno.EIO))

  def glob(self, path):
    found = super().glob(self._local(path))
    return [name.replace(self.root + '/', 'gs://', 1) for name in found]

  def makedirs(self, path, **_):
    os.makedirs(self._local(path), exist_ok=True)

  def replace(self, path, dst):
    self._fail_now_and_then()
    super().replace(self._local(path), self._local(dst))

  def rename(self, path, dst):
    super().rename(self._local(path), self._local(dst))

  def exists(self, path):
    return super().exists(self._local(path))

  def isdir(self, path):
    return super().isdir(self._local(path))

  def listdir(self, path):
    return super().listdir(self._local(path))

  def remove(self, path):
    super().remove(self._local(path))

  def rmtree(self, path):
    super().rmtree(self._local(path))

  def stat(self, path):
    return super().stat(self._local(path))


@pytest.fixture
def store(tmp_path, monkeypatch):
  store = Store(tmp_path / 'store')
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, 'gs', store)
  monkeypatch.setattr(gpath, '_GCS_BACKENDS', frozenset({store}))
  monkeypatch.chdir(tmp_path)
  yield store
  assert not [name for name in os.listdir(tmp_path) if name.startswith('gs:')]


@pytest.fixture(params=[0, 3], ids=['works', 'fails_now_and_then'])
def shaky(store, request, monkeypatch):
  """The store, and again where every third write fails at first."""
  monkeypatch.setattr(files.time, 'sleep', lambda _: None)
  store.failing = request.param
  return store


def write_run(path=RUN):
  run_directory.write_run(
    path,
    model=tiny.config(),
    vocabulary=VocabularyConfig(),
    lengths={'inputs': 8, 'targets': 4},
    config={'steps': 3},
    texts={'sharding.txt': 'table\n'},
  )


def test_what_a_run_directory_holds(shaky):
  write_run()
  (epath.Path(RUN) / 'checkpoints' / '3' / 'state').mkdir(parents=True)
  config, lengths = run_directory.read_model(epath.Path(RUN))
  assert config == tiny.config() and lengths['targets'] == 4
  assert checkpoints.find_checkpoint(RUN) == (f'{RUN}/checkpoints', 3)
  vocabulary = vocabularies.load_vocabulary(RUN)
  assert vocabulary.path.startswith(RUN)
  assert vocabularies.make_vocabulary(vocabulary).encode('a house')
  run_directory.check_resumable(RUN, model=tiny.config(), vocabulary=VocabularyConfig())
  with pytest.raises(UsageError, match='another vocabulary'):
    run_directory.check_resumable(RUN, model=tiny.config(), vocabulary=BYTES)
  assert not shaky.failing or shaky.writes > 10


def test_checkpoints_are_found_and_damaged_ones_told(store):
  root = epath.Path(RUN) / 'checkpoints'
  for name in ('1', '12', '5.damaged', 'x'):
    (root / name / 'state').mkdir(parents=True)
  assert checkpoints.find_checkpoint(RUN) == (os.fspath(root), 12)
  assert checkpoints.has_checkpoint(RUN)
  for name in ('1', '12'):
    (root / name).rmtree()
  with pytest.raises(UsageError, match='damaged checkpoints alone'):
    checkpoints.check_some_are_whole(RUN)


def test_metrics(shaky):
  epath.Path(RUN).mkdir(parents=True)
  with MetricWriter(RUN, first_step=0) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': 1.0 / step})
  with MetricWriter(RUN, first_step=2) as writer:  # killed, and back at 2
    writer.write(3, {'loss': 7.0})
  lines = metric_writers.read_metrics(RUN)
  assert [(line['step'], line['loss']) for line in lines] == [(1, 1.0), (2, 0.5), (3, 7.0)]
  events = list((epath.Path(RUN) / 'tensorboard').iterdir())
  assert events and all(path.stat().length > 50 for path in events)
  evaluators.write_lines(epath.Path(RUN) / 'infer_eval' / 'task' / '3.jsonl', [{'input': 'a'}])


def test_the_lease_keeps_others_out(store, monkeypatch):
  monkeypatch.setattr(lease, 'RENEWAL', 0.2)
  with lease.lock(RUN):
    with pytest.raises(UsageError, match='another run is training in gs://bucket/some/run'):
      with lease.lock(RUN):
        pass
  with lease.lock(RUN):
    pass
  assert list(epath.Path(RUN).iterdir()) == []


def test_a_report_of_it_and_into_it(store):
  write_run()
  with MetricWriter(RUN, first_step=0) as writer:
    writer.write(1, {'loss': 2.5})
  evaluators.write_lines(
    epath.Path(RUN) / 'infer_eval' / 'task' / '1.jsonl',
    [{'input': 'some input', 'prediction': 'p', 'target': 't'}],
  )
  assert report.report(runs=[RUN]) == f'{RUN}/report.html'
  text = (epath.Path(RUN) / 'report.html').read_text()
  assert 'some input' in text and 'loss' in text


def test_predictions_go_there_and_are_continued(shaky, tmp_path):
  tiny_run.save_untrained(tmp_path / 'run')
  words = [f'word {i}' for i in range(20)]
  (epath.Path('gs://bucket/in') / 'words.txt').write_text(''.join(w + '\n' for w in words))
  output = epath.Path('gs://bucket/some/out.jsonl')
  flags = dict(
    model=str(tmp_path / 'run'),
    input='gs://bucket/in/words.txt',
    output=os.fspath(output),
    batch_size=8,
  )
  assert infer(**flags) == 20
  whole = output.read_text()
  assert [json.loads(line)['input'] for line in whole.splitlines()] == words
  with pytest.raises(UsageError, match='holds predictions already'):
    infer(**flags)
  shaky.failing = 0
  output.write_text(whole[: len(whole) // 2])
  assert infer(**flags, resume=True) == 20
  assert output.read_text() == whole
