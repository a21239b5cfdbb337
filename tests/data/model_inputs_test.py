import numpy as np
import pytest

from t5x_lite.data.model_inputs import is_text, token_rows
from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary
from t5x_lite.errors import UsageError

BYTES = make_vocabulary(VocabularyConfig(kind='byte'))


def rows(inputs, **settings):
  given = dict(vocabulary=BYTES, num_ids=384, pad_id=0)
  return token_rows(inputs, **{**given, **settings})


def test_texts_end_with_eos_unless_they_are_continued():
  assert rows('') == [[1]]
  assert rows('ab') == rows(['ab']) == rows(('ab',)) == [[100, 101, 1]]
  assert rows(['', 'a'], eos=False) == [[], [100]]


@pytest.mark.parametrize(
  'ids',
  [
    [5, 6],
    [[5, 6]],
    ((5, 6),),
    np.array([5, 6, 0]),
    np.array([[5, 6, 0, 0]], np.int64),
    [np.int32(5), np.int32(6)],
  ],
)
def test_ids_of_any_form(ids):
  assert rows(ids) == [[5, 6]]


@pytest.mark.parametrize(
  'inputs, message',
  [
    (5, 'int is no input'),
    (None, 'NoneType is no input'),
    (2.5, 'float is no input'),
    ({'a': 1}, 'dict is no input'),
    ([2.5], 'list is no input'),
    ([[1, 'a']], 'list is no input'),
    (np.array(3), 'ndarray is no input'),
    (np.array([[0.5]]), 'ndarray is no input'),
    ([None], 'list is no input'),
    (b'bytes', 'outside 0 to'),
    ([], 'there is no input'),
    (['ok', 'a\ud800'], 'text 1 has half a surrogate pair'),
    (['a', 5], 'texts and int are mixed'),
    (['a', None], 'texts and NoneType are mixed'),
    ([[5, 999]], 'the id 999 is outside 0 to 99'),
    ([-1], 'the id -1'),
  ],
)
def test_anything_else_is_one_clear_error(inputs, message):
  with pytest.raises(UsageError, match=message):
    rows(inputs, num_ids=100)


def test_long_inputs_are_cut_and_counted(caplog):
  found = rows(['x' * 20_000, 'ab', 'y' * 9], limit=8)
  assert [len(row) for row in found] == [8, 3, 8]
  assert found[0] == [123] * 7 + [1]  # EOS keeps its place
  [record] = caplog.records
  assert '2 of 3 inputs' in record.getMessage()
  assert 'the longest has 20001 tokens' in record.getMessage()
  assert rows([[7] * 9], limit=8) == [[7] * 8]
  with pytest.raises(UsageError, match='max_input_tokens is 0'):
    rows('a', limit=0)


def test_is_text():
  assert is_text('') and is_text(['a', 'b'])
  assert not is_text([]) and not is_text([1]) and not is_text(np.array(['a']))
