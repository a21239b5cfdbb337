import csv
import json
import sys
from unittest import mock

import numpy as np
import pytest
from pyarrow import parquet

from t5x_lite.data import pairs
from t5x_lite.errors import UsageError
from t5x_lite.programs.output_file import OutputFile

# What a table must quote, and rows that only differ in what is not there.
TEXTS = ['a, "b"', 'two\nlines\rand\ttabs', '', 'müßig \u2028 x', "'", 'NULL', '=1+1']
BEST = [{'prediction': 'x', 'score': 0.5}]
ROWS = [
  {'input': text, 'prediction': text[::-1], 'score': -0.1 * i, 'n_best': BEST}
  for i, text in enumerate(TEXTS)
]
ROWS[3]['truncated'] = True


def fill(file, rows, *, append=False):
  with file.open(append=append) as write:
    for row in rows:
      write(row)


@pytest.mark.parametrize('ending', ['csv', 'parquet'])
def test_a_table_holds_what_the_lines_held(tmp_path, ending):
  path = str(tmp_path / f'out.{ending}')
  file = OutputFile(path, key='prediction')
  fill(file, ROWS)
  assert not (tmp_path / f'out.{ending}').exists()
  file.finish(len(ROWS))
  assert [p.name for p in tmp_path.iterdir()] == [f'out.{ending}']
  for name, wanted in (('input', TEXTS), ('prediction', [text[::-1] for text in TEXTS])):
    assert list(pairs.read_inputs(path, pairs.Columns(input=name))) == wanted
  if ending == 'parquet':
    rows = parquet.read_table(path).to_pylist()
    assert rows == [{'truncated': False, **row} for row in ROWS]
  assert file.is_whole(iter(TEXTS))
  for other in (TEXTS[:-1], [*TEXTS, 'more'], [*TEXTS[:-1], 'x']):
    with pytest.raises(UsageError, match='of another input'):
      file.is_whole(iter(other))


@pytest.mark.parametrize('ending', ['npy', 'parquet', 'jsonl'])
def test_embeddings_keep_every_bit(tmp_path, ending):
  vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
  file = OutputFile(str(tmp_path / f'out.{ending}'), key='embedding', width=3)
  numbers = vectors.astype(str).astype(float).tolist()
  fill(file, [{'input': str(i), 'embedding': row} for i, row in enumerate(numbers)])
  file.finish(5)
  path = tmp_path / f'out.{ending}'
  if ending == 'npy':
    found = np.load(path)
  elif ending == 'parquet':
    found = np.asarray(parquet.read_table(path)['embedding'].to_pylist(), np.float32)
  else:
    found = np.asarray([json.loads(x)['embedding'] for x in path.open()], np.float32)
  np.testing.assert_array_equal(found, vectors)
  if ending == 'npy':
    assert found.dtype == np.float32
    with pytest.raises(UsageError, match='start over with --overwrite'):  # it holds no inputs
      file.is_whole(iter('01234'))


@pytest.mark.parametrize('ending', ['jsonl', 'csv', 'parquet'])
def test_no_predictions_are_lost_to_another_input(tmp_path, ending):
  file = OutputFile(str(tmp_path / f'out.{ending}'), key='prediction')
  fill(file, ROWS)
  before = (tmp_path / file.lines).read_bytes()
  for other in (TEXTS[:4], [], ['x', *TEXTS]):
    with pytest.raises(UsageError, match=r'is not the prediction of line .* --overwrite'):
      file.resume(iter(other), 2)
  if ending != 'csv':
    with pytest.raises(UsageError, match='is not the embedding of line 1'):
      OutputFile(file.path, key='embedding').resume(iter(TEXTS), 2)
  assert (tmp_path / file.lines).read_bytes() == before
  assert file.resume(iter(TEXTS), 4) == len(TEXTS)
  assert file.resume(iter([*TEXTS, 'more']), 4) == 4


@pytest.mark.parametrize('ending', ['jsonl', 'csv'])
def test_one_infer_alone_writes_a_file(tmp_path, ending):
  path = str(tmp_path / f'out.{ending}')
  with OutputFile(path, key='prediction').open(append=False) as write:
    write(ROWS[0])
    other = OutputFile(path, key='prediction')
    with pytest.raises(UsageError, match=r'another infer writes .*name another output'):
      other.resume(iter(TEXTS), 1)
    with pytest.raises(UsageError, match='another infer writes'):
      fill(other, ROWS)
    write(ROWS[1])
  assert len(open(other.lines).readlines()) == 2
  fill(other, ROWS)


@pytest.mark.parametrize('path', ['/dev/full', '-'])
def test_a_full_disk_is_named(monkeypatch, path):
  full = mock.Mock(flush=mock.Mock(side_effect=OSError(28, 'No space left on device')))
  monkeypatch.setattr(sys, 'stdout', full)
  with pytest.raises(UsageError, match='No space left') as caught:
    fill(OutputFile(path, key='prediction'), ROWS[:1])
  assert str(caught.value).startswith(f'cannot write {path}')
  assert ('--resume' in str(caught.value)) == (path != '-')


@pytest.mark.parametrize('notes', [b'my notes\n', b'a,b\n1,2\n', b'{"text": "a"}\n', b'a'])
def test_what_infer_did_not_write_is_not_cut(tmp_path, notes):
  path = tmp_path / 'out.jsonl'
  path.write_bytes(notes)
  with pytest.raises(UsageError, match=r'out\.jsonl holds no predictions'):
    OutputFile(str(path), key='prediction').resume(iter(['a']), 1)
  assert path.read_bytes() == notes


@pytest.mark.parametrize('name', ['x.csv', 'x.npy', 'x.jsonl.gz', 'x.parquet.zst'])
def test_endings_that_cannot_hold_it(tmp_path, name):
  with pytest.raises(UsageError, match='cannot hold embeddings'):
    OutputFile(str(tmp_path / name), key='embedding')


@pytest.mark.parametrize('n_best', [False, True])
@pytest.mark.parametrize('ending', ['.csv', '.parquet'])
def test_log_probabilities_have_a_column(tmp_path, ending, n_best):
  best = {'prediction': 'a', 'score': -1.5, 'log_probs': [-1.0, -0.5]}
  entry = {'input': 'x', **best, **({'n_best': [best, best]} if n_best else {})}
  path = tmp_path / f'out{ending}'
  file = OutputFile(str(path), key='prediction')
  with file.open(append=False) as write:
    write(entry)
  file.finish(1)
  if ending == '.parquet':
    [row] = parquet.read_table(path).to_pylist()
    assert row == {**entry, 'truncated': False}
  else:
    [row] = csv.DictReader(path.read_text().splitlines())
    assert json.loads(row['log_probs']) == best['log_probs']
    assert not n_best or json.loads(row['n_best']) == [best, best]
