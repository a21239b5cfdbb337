import json

import pytest

from t5x_lite.data import pairs
from t5x_lite.data.pairs import Columns
from t5x_lite.errors import UsageError


def write(path, text):
  path.write_text(text)
  return str(path)


def both(found):
  return list(zip(found.inputs, found.targets, strict=True))


def test_columns_are_found_by_their_names(tmp_path):
  path = write(tmp_path / 'x.csv', 'id,Summary,Article\n1,short,long\n')
  found = pairs.read(path)
  assert both(found) == [('long', 'short')]
  assert found.fields == ('Article', 'Summary')
  assert found.places == [f'{path}:2']


def test_inputs_alone(tmp_path):
  path = write(tmp_path / 'x.csv', 'text,n\na,1\n"b\nc",2\n,3\n')
  assert list(pairs.read_inputs(path)) == ['a', 'b\nc', '']
  made = Columns(template='{n}: {text}', prefix='p ')
  assert list(pairs.read_inputs(path, made)) == ['p 1: a', 'p 2: b\nc', 'p 3: ']
  path = write(tmp_path / 'y.tsv', 'one two\nthree four\n')
  assert list(pairs.read_inputs(path)) == ['one two', 'three four']
  path = write(tmp_path / 'z.txt', 'a\n\nb\tc\n')
  assert list(pairs.read_inputs(path)) == ['a', '', 'b\tc']
  for made in (Columns(input='text'), Columns(template='say {text}')):
    with pytest.raises(UsageError, match=r"z\.txt is text, .* without a field 'text'"):
      list(pairs.read_inputs(path, made))


def test_columns_by_name_number_and_template(tmp_path):
  path = write(tmp_path / 'x.tsv', 'a\tb\tc\n1\t2\t3\n')
  named = Columns(input='c', target='a', prefix='p: ')
  assert both(pairs.read(path, named)) == [('p: 3', '1')]
  numbered = Columns(input='2', target='0')
  assert both(pairs.read(path, numbered)) == [('c', 'a'), ('3', '1')]
  made = Columns(template='{b} of {c}: {{x}}', target='a')
  assert both(pairs.read(path, made)) == [('2 of 3: {x}', '1')]


@pytest.mark.parametrize(
  ('columns', 'message'),
  [
    (dict(template='{a}', input='b'), 'not both'),
    (dict(template='none'), 'names no field'),
    (dict(template='{a'), "expected '}'"),
    (dict(template='{a:>3}'), 'has a format'),
  ],
)
def test_bad_templates(columns, message):
  with pytest.raises(UsageError, match=message):
    Columns(**columns)


def test_what_is_unclear_is_asked(tmp_path):
  path = write(tmp_path / 'x.jsonl', '{"left": "a", "right": "b"}')
  with pytest.raises(UsageError, match=r'is the input\? Say --input_column'):
    pairs.read(path)
  with pytest.raises(UsageError, match=r'is the target\? Say --target_column'):
    pairs.read(path, Columns(input='left'))
  with pytest.raises(UsageError, match=r'is the input\? Say --field'):
    list(pairs.read_inputs(path))
  with pytest.raises(UsageError, match='1111'):  # more digits than int() takes
    list(pairs.read_inputs(path, Columns(input='1' * 5000)))


def test_several_files_patterns_and_paths_with_spaces(tmp_path):
  (tmp_path / 'my data').mkdir()
  for i in range(3):
    row = json.dumps({'input': str(i), 'target': 1})
    write(tmp_path / 'my data' / f'{i}.jsonl', row)
  found = pairs.read(str(tmp_path / 'my data' / '*.jsonl'))
  assert both(found) == [('0', '1'), ('1', '1'), ('2', '1')]
  odd = write(tmp_path / 'x[1].tsv', 'one two\tthree\n')
  assert both(pairs.read([odd])) == [('one two', 'three')]


def test_parallel_files(tmp_path):
  en = write(tmp_path / 'x.en', 'yes\n\nno\n')
  de = write(tmp_path / 'x.de', 'ja\n\nnein\n')
  assert both(pairs.read(en, targets=de)) == [('yes', 'ja'), ('no', 'nein')]
  short = write(tmp_path / 'short.de', 'ja\n')
  with pytest.raises(UsageError, match=r'short\.de has 1 lines'):
    pairs.read(en, targets=short)
  with pytest.raises(UsageError, match=r'has 1 lines, .*x\.de has more'):
    pairs.read(short, targets=de)


def test_bad_rows_are_named_or_skipped(tmp_path):
  path = write(tmp_path / 'x.csv', 'text,label\na,x\n  ,y\nc,\n')
  with pytest.raises(UsageError, match=r"x\.csv:3: the field 'text' is empty"):
    pairs.read(path)
  found = pairs.read(path, Columns(skip_bad_rows=True))
  assert both(found) == [('a', 'x')] and found.skipped == 2


@pytest.mark.parametrize('name', ['x.csv', 'x.tsv', 'x.jsonl', 'x.json'])
def test_an_empty_file(tmp_path, name):
  path = write(tmp_path / name, '')
  with pytest.raises(UsageError, match='holds no rows'):
    pairs.read(path)


def test_rows_in_memory():
  expected = [('a', '1'), ('b', '2')]
  assert both(pairs.read([('a', 1), ('b', 2)])) == expected
  rows = [{'text': 'a', 'label': 1}, {'text': 'b', 'label': 2}]
  assert both(pairs.read(rows)) == expected
  assert both(pairs.read({'text': ['a', 'b'], 'label': [1, 2]})) == expected
  for bad in (5, [5], [('a', 'b', 'c')], ['a', ('b', 'c')]):
    with pytest.raises(UsageError):
      pairs.read(bad)
  with pytest.raises(UsageError, match='differ in length'):
    pairs.read({'text': ['a'], 'label': [1, 2]})


def test_frames_and_datasets():
  pandas = pytest.importorskip('pandas')
  datasets = pytest.importorskip('datasets')
  frame = pandas.DataFrame({'text': ['a', 'b'], 'label': ['x', 'y']})
  expected = [('a', 'x'), ('b', 'y')]
  assert both(pairs.read(frame)) == expected
  one = datasets.Dataset.from_pandas(frame)
  assert both(pairs.read(one)) == expected
  assert both(pairs.read(one.class_encode_column('label'))) == expected
  scores = pandas.DataFrame({'text': ['a', 'b'], 'label': [3.8, 1e8]}).astype({'label': 'float32'})
  for source in (scores, datasets.Dataset.from_pandas(scores)):
    assert both(pairs.read(source)) == [('a', '3.8'), ('b', '100000000.0')]
  frame.loc[1, 'label'] = None
  with pytest.raises(UsageError, match='train:2'):
    pairs.read(frame)


def test_a_part_of_a_saved_dataset_is_named_by_its_use(tmp_path):
  datasets = pytest.importorskip('datasets')
  parts = {
    name: datasets.Dataset.from_dict({'text': [name], 'label': ['x']})
    for name in ('train', 'validation', 'test')
  }
  for name, chosen in (('both', ('train', 'validation')), ('other', ('train', 'test'))):
    made = datasets.DatasetDict({x: parts[x] for x in chosen})
    made.save_to_disk(str(tmp_path / name))
  both_, other = str(tmp_path / 'both'), str(tmp_path / 'other')
  assert pairs.read(both_).inputs == pairs.read(other).inputs == ['train']
  assert pairs.read(both_, what='validation').inputs == ['validation']
  with pytest.raises(UsageError, match='holds the splits train, test: name one'):
    pairs.read(other, what='validation')


def test_holding_out_is_stable_and_keeps_equal_inputs_together():
  rows = [(f'q{i % 40}', str(i)) for i in range(80)]
  rest, held = pairs.read(rows).hold_out(8)
  assert len(rest) + len(held) == 80 and 4 <= len(held) <= 12
  assert not set(rest.inputs) & set(held.inputs)
  _, again = pairs.read(rows[::-1]).hold_out(8)
  assert set(both(again)) == set(both(held))
  with pytest.raises(UsageError, match='nothing to hold out'):
    pairs.read([('a', 'b'), ('a', 'c')]).hold_out(1)


def test_fingerprint_tells_content_and_order():
  prints = {
    pairs.read(rows).fingerprint()
    for rows in ([('a', 'b'), ('c', 'd')], [('c', 'd'), ('a', 'b')], [('ac', 'b'), ('x', 'd')])
  }
  assert len(prints) == 3


def test_duplicate_keys_are_an_error(tmp_path):
  path = write(tmp_path / 'x.jsonl', '{"input": "a", "input": "b"}')
  with pytest.raises(UsageError, match='twice'):
    pairs.read(path)
  assert json.loads('{"a": 1, "a": 2}') == {'a': 2}  # what Python does alone


def test_too_large_to_hold(tmp_path, monkeypatch):
  monkeypatch.setattr(pairs, 'MAX_BYTES', 3)
  path = write(tmp_path / 'x.csv', 'text,label\na,b\n')
  with pytest.raises(UsageError, match='more than is held in memory'):
    pairs.read(path)


def test_a_second_half_of_the_input_is_asked_for(tmp_path):
  path = tmp_path / 'alpaca.json'
  path.write_text('[{"instruction": "Add", "input": "1 2", "output": "3"}]')
  with pytest.raises(UsageError, match=r"'input' alone, or 'instruction' too\? Say .*--template '"):
    pairs.read(str(path))
  found = pairs.read(str(path), Columns(template='{instruction} {input}'))
  assert found.inputs == ['Add 1 2']
  assert pairs.read(str(path), Columns(input='input')).inputs == ['1 2']


@pytest.mark.parametrize(
  ('data', 'message'),
  [(b'PK\x03\x04abc', 'a spreadsheet or a zip archive'), (b'\x1f\x8babc', r'ends in \.gz')],
)
def test_archives_are_named(tmp_path, data, message):
  path = tmp_path / 'table.csv'
  path.write_bytes(data)
  with pytest.raises(UsageError, match=message):
    pairs.read(str(path))


def test_a_csv_with_tabs(tmp_path):
  path = tmp_path / 'table.csv'
  path.write_text('text\tlabel\n"two\nlines, a comma"\tx\nmore\ty\n')
  assert pairs.read(str(path)).inputs == ['two\nlines, a comma', 'more']
