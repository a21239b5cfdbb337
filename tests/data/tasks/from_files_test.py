import itertools
import json

import numpy as np
import pytest
import seqio

from t5x_lite.data.tasks import catalog, from_files
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

BYTES = VocabularyConfig(kind='byte')
LENGTHS = {'inputs': 32, 'targets': 32}
_NUMBERS = itertools.count()


@pytest.fixture
def name():
  return f'file_tasks_test_{next(_NUMBERS)}'


def examples(name, split='train', lengths=None, **settings):
  task = seqio.get_mixture_or_task(catalog.resolve(name, BYTES))
  dataset = task.get_dataset(lengths or LENGTHS, split=split, shuffle=False, **settings)
  return task, list(dataset.as_numpy_iterator())


def test_fine_tuning_on_jsonl_takes_two_lines(name, tmp_path):
  rows = [{'input': 'zwei', 'target': 'two'}, {'input': 'drei', 'target': 'three'}]
  text = '\n'.join(map(json.dumps, rows))
  (tmp_path / 'train.jsonl').write_text(text)
  from_files.register_file_task(
    name, train_file=str(tmp_path / 'train.jsonl'), prefix='translate: '
  )
  task, found = examples(name)
  vocabulary = task.output_features['inputs'].vocabulary
  assert [vocabulary.decode(e['inputs']) for e in found] == [
    'translate: zwei', 'translate: drei',
  ]  # fmt: skip
  assert [e['targets_pretokenized'] for e in found] == [b'two', b'three']
  assert all(e['inputs'][-1] == e['targets'][-1] == 1 for e in found)
  assert task.splits == ('train',)
  [metric] = task.metric_fns
  assert metric(['two'], ['two']) == {'accuracy': 100.0}


def test_long_examples_are_cut_and_still_end(name, tmp_path):
  (tmp_path / 'x.tsv').write_text('a' * 100 + '\t' + 'b' * 100 + '\n')
  from_files.register_file_task(
    name, validation_file=str(tmp_path / 'x.tsv'), input_field=0, target_field=1
  )
  _, [example] = examples(name, 'validation')
  assert len(example['inputs']) == 32 and example['inputs'][-1] == 1
  assert example['targets_pretokenized'] == b'b' * 100


def test_references(name, tmp_path):
  (tmp_path / 'x.tsv').write_text('word\tsound\na\tAH0;EY1\nb\tB IY1\n')
  from_files.register_file_task(
    name,
    train_file=str(tmp_path / 'x.tsv'),
    input_field='word',
    target_field='sound',
    reference_separator=';',
    metrics=('pronunciation_error_rates', 'accuracy'),
  )
  task, found = examples(name)
  vocabulary = task.output_features['targets'].vocabulary
  assert [vocabulary.decode(e['targets']) for e in found] == ['AH0', 'B IY1']
  targets = [
    task.postprocess_fn(e['targets_pretokenized'].decode(), example=e, is_target=True)
    for e in found
  ]
  assert targets == [['AH0', 'EY1'], ['B IY1']]
  scores = [metric(targets, ['EY1', 'B IY1']) for metric in task.metric_fns]
  assert set(scores[0].values()) == {0.0}
  assert scores[1] == {'accuracy': 100.0}


def test_pretraining_on_own_text(name, tmp_path):
  lines = [f'{i} the quick brown fox jumps over the lazy dog' for i in range(50)]
  (tmp_path / 'books.txt').write_text('\n'.join(lines))
  from_files.register_text_task(name, train_file=str(tmp_path / '*.txt'), lines_per_document=5)
  task, found = examples(name)
  assert set(found[0]) == {'inputs', 'targets'}
  assert task.num_input_examples('train') == 10
  # All but the last example are full, EOS included.
  assert {len(e['inputs']) for e in found[:-1]} == {32}
  held = np.concatenate([e[f] for e in found for f in ('inputs', 'targets')])
  text = '\n'.join(lines).encode()
  # Between documents no line break is added.
  assert sorted(held[(held > 2) & (held < 259)] - 3) == sorted(
    text.replace(b'\n', b'', 0)[i]
    for i in range(len(text))
    if not (text[i] == 10 and text[:i].count(b'\n') % 5 == 4)
  )


def test_a_short_text_to_repeat(name, tmp_path, monkeypatch):
  """Table 9: the first rows of the training split, and all of the others."""
  lines = [f'{i:02} fox' for i in range(8)]
  file = tmp_path / 'x.txt'
  file.write_text('\n'.join(lines))
  files = dict(train_file=str(file), validation_file=str(file))
  from_files.register_text_task(name, **files, lines_per_document=2, objective='all')
  text = seqio.ByteVocabulary()
  for short, split, count in ((f'{name}_first3', 'train', 3), (f'{name}_first3', 'validation', 8)):
    _, found = examples(f'{short}_full_lm', split, {'targets': 99})
    [tokens] = [e['targets'] for e in found]
    read = text.decode(tokens[tokens > 1].tolist())  # without the EOS of each document
    assert sum(line in read for line in lines) == count
  assert len(catalog.leaves(f'{name}_first3_ul2')) == 7
  monkeypatch.setattr(from_files, 'MAX_IN_MEMORY_BYTES', 10)
  from_files.register_text_task(f'{name}_large', **files, objective='all')
  with pytest.raises(UsageError, match='streamed: put its first 3 lines into a file'):
    examples(f'{name}_large_first3_full_lm', lengths={'targets': 99})


def test_an_objective_of_ones_own(name, tmp_path):
  def copy(dataset):
    return dataset.map(lambda e: {'inputs': e['targets'], **e})

  (tmp_path / 'x.txt').write_text('abc\n')
  from_files.register_text_task(name, train_file=str(tmp_path / 'x.txt'), objective=copy)
  _, [example] = examples(name)
  assert example['inputs'].tolist() == example['targets'].tolist()


def test_large_text_is_streamed(name, tmp_path, monkeypatch):
  monkeypatch.setattr(from_files, 'MAX_IN_MEMORY_BYTES', 10)
  (tmp_path / 'x.txt').write_text('the quick brown fox\n\njumps over\n' * 9)
  file = str(tmp_path / 'x.txt')
  from_files.register_text_task(name, train_file=file)
  task, found = examples(name)
  assert isinstance(task.source, seqio.FileDataSource)
  held = np.concatenate([e[f] for e in found for f in ('inputs', 'targets')])
  assert ((held > 2) & (held < 259)).sum() == 9 * 29
  with pytest.raises(UsageError, match=r'too large for lines_per_document=2'):
    from_files.register_text_task(f'{name}_2', train_file=file, lines_per_document=2)


def test_a_vocabulary_of_its_own(name, tmp_path):
  (tmp_path / 'x.txt').write_text('text')
  from_files.register_text_task(name, train_file=str(tmp_path / 'x.txt'), vocabulary=BYTES)
  assert catalog.is_registered(name)
  assert name not in catalog.catalog()


def test_errors_come_at_registration(name, tmp_path):
  (tmp_path / 'x.txt').write_text('text')
  (tmp_path / 'x.tsv').write_text('a\tb\n')
  text, tsv = str(tmp_path / 'x.txt'), str(tmp_path / 'x.tsv')
  register = from_files.register_file_task
  with pytest.raises(UsageError, match=r'has no files'):
    register(name)
  with pytest.raises(UsageError, match=r'There is no file'):
    register(name, train_file=str(tmp_path / 'none.tsv'))
  with pytest.raises(UsageError, match='csv, jsonl, json or parquet'):
    register(name, train_file=text)
  with pytest.raises(UsageError, match=r'the metric is .*blue'):
    register(name, train_file=tsv, metrics=('blue',))
  with pytest.raises(UsageError, match=r'no objective .*mlm.*span_corruption'):
    from_files.register_text_task(name, train_file=text, objective='mlm')
  with pytest.raises(UsageError, match=r'lines_per_document is 0'):
    from_files.register_text_task(name, train_file=text, lines_per_document=0)
  assert name not in catalog.catalog()
