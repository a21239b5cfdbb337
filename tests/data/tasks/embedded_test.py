"""The embedded tasks: their files, their rows, their prefixes."""

import hashlib
import importlib.resources

import numpy as np
import pytest
import seqio

from t5x_lite.data.tasks import catalog, embedded  # noqa: F401
from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary

LENGTHS = {'inputs': 256, 'targets': 256}
ROWS = {
  'pronounce': (113_382, 5_191, 4_978),
  'language_id': (23_321, 990, 1_081),
  'syllables': (113_382, 5_191, 4_978),
  'translate_en_de': (7_641, 334, 321),
  'translate_en_fr': (4_873, 205, 205),
}
PREFIXES = {
  'pronounce': 'pronounce: ',
  'language_id': 'language: ',
  'translate_en_de': 'translate English to German: ',
  'translate_en_fr': 'translate English to French: ',
  'syllables': 'syllables: ',
}
TASKS = {
  'embedded_tasks': set(PREFIXES) - {'syllables'},
  'quickstart_mixture': {'pronounce', 'language_id', 'syllables'},
  'translate': {'translate_en_de', 'translate_en_fr'},
}
MIXTURES = ('embedded_tasks', 'quickstart_mixture', 'translate')


def get(name, split, *, shuffle=False, **settings):
  dataset = seqio.get_mixture_or_task(name).get_dataset(
    LENGTHS, split=split, shuffle=shuffle, try_in_mem_cache=False, **settings
  )
  return dataset.as_numpy_iterator()


def test_the_corpora_are_the_ones_of_the_readme():
  folder = importlib.resources.files('t5x_lite.data.corpora')
  model = (folder / 't5.sentencepiece.model').read_bytes()
  assert hashlib.sha256(model).hexdigest() == (
    'd60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86'
  )
  for file in ('LICENSE.cmudict', 'LICENSE.apache-2.0', 'README.md'):
    assert (folder / file).is_file()


@pytest.mark.parametrize('suffix', ['t5', 'byte'])
def test_all_names_are_registered(suffix):
  names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  assert {f'{n}_{suffix}' for n in catalog.catalog()} >= {
    f'{n}_{suffix}' for n in (*ROWS, *MIXTURES, 'shakespeare_span_corruption')
  }
  for name in (*ROWS, *MIXTURES, 'shakespeare_prefix_lm'):
    assert f'{name}_{suffix}' in names
  assert catalog.resolve('pronounce', catalog.VOCABULARIES[suffix]) == (f'pronounce_{suffix}')


@pytest.mark.parametrize('name', ROWS)
def test_no_row_is_lost(name):
  task = seqio.TaskRegistry.get(f'{name}_byte')
  splits = ('train', 'validation', 'test')
  assert tuple(task.num_input_examples(s) for s in splits) == ROWS[name]
  examples = list(get(f'{name}_byte', 'test'))
  assert len(examples) == ROWS[name][2]
  # Cut to length, but otherwise what the file says.
  vocabulary = make_vocabulary(VocabularyConfig(kind='byte'))
  prefix = PREFIXES[name]
  for example in examples[:200]:
    text = example['inputs_pretokenized'].decode()
    assert text.startswith(prefix) and len(text) > len(prefix)
    if len(example['inputs']) < 256:
      assert vocabulary.decode(example['inputs']) == text


def test_pronounce_has_every_reference():
  examples = {e['inputs_pretokenized'].decode(): e for e in get('pronounce_t5', 'test')}
  example = examples['pronounce: a']
  vocabulary = make_vocabulary(VocabularyConfig())
  assert vocabulary.decode(example['targets']) == 'AH0'
  assert example['targets_pretokenized'] == b'AH0 | EY1'
  task = seqio.TaskRegistry.get('pronounce_t5')
  target = task.postprocess_fn('AH0 | EY1', example=example, is_target=True)
  assert target == ['AH0', 'EY1']
  [metric] = task.metric_fns
  assert metric([target], ['EY1'])['word_error_rate'] == 0.0


def test_the_official_vocabulary_can_spell_the_targets():
  vocabulary = make_vocabulary(VocabularyConfig())
  for name in ('pronounce', 'language_id'):
    for example in list(get(f'{name}_t5', 'validation'))[:300]:
      assert vocabulary.unk_id not in example['targets']


def test_batches_do_not_follow_the_alphabet():
  initials = [
    e['inputs_pretokenized'][len('pronounce: ') :][:1]
    for e, _ in zip(get('pronounce_byte', 'train', shuffle=True, seed=0), range(200), strict=False)
  ]
  assert len(set(initials)) > 15


@pytest.mark.parametrize('name', MIXTURES)
def test_mixtures_draw_from_every_task(name):
  iterator = get(f'{name}_byte', 'train', shuffle=True, seed=0, copy_pretokenized=True)
  found = set()
  for example, _ in zip(iterator, range(300), strict=False):
    found.add(example['inputs_pretokenized'].decode().split(': ')[0] + ': ')
  assert found == {PREFIXES[task] for task in TASKS[name]}


def test_syllables_are_the_vowels_of_the_first_pronunciation():
  rows = get('syllables_byte', 'test')
  counts = {
    row['inputs_pretokenized'].decode(): row['targets_pretokenized'].decode() for row in rows
  }
  assert counts['syllables: a'] == '1' and set(counts.values()) <= set(map(str, range(1, 15)))


@pytest.mark.parametrize('name', ['quickstart_mixture', 'pronounce'])
def test_seeds_and_hosts(name):
  def first(n=50, seed=0, **settings):
    iterator = get(f'{name}_byte', 'train', shuffle=True, seed=seed, num_epochs=None, **settings)
    return [e['inputs'].tolist() for e, _ in zip(iterator, range(n), strict=False)]

  assert first() == first()
  assert first() != first(seed=1)
  hosts = [first(shard_info=seqio.ShardInfo(index=i, num_shards=2)) for i in range(2)]
  assert not {tuple(x) for x in hosts[0]} & {tuple(x) for x in hosts[1]}


def test_shakespeare_fills_the_papers_lengths():
  dataset = seqio.get_mixture_or_task('shakespeare_span_corruption_t5')
  dataset = dataset.get_dataset({'inputs': 512, 'targets': 114}, split='validation', shuffle=False)
  examples = list(dataset.as_numpy_iterator())
  full = [e for e in examples if len(e['inputs']) == 512]
  assert len(full) >= len(examples) - 1
  assert {len(e['targets']) for e in full} == {114}
  held = np.concatenate([e['inputs'] for e in examples])
  assert (held == 2).mean() < 0.01
