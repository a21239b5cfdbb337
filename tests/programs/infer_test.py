import gzip
import io
import json
import signal
import subprocess
import sys
import types

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import t5x_lite
from t5x_lite import main
from t5x_lite.data import pairs
from t5x_lite.decoding import prediction
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.programs import infer as infer_lib
from t5x_lite.programs.infer import infer
from t5x_lite.runs import run_directory
from tests import tiny_run

WORDS = ['hello', 'a', '', 'pronounce', 'zebra', 'müßig', 'x' * 40]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  model_dir = tmp_path_factory.mktemp('run')
  tiny_run.save_untrained(model_dir)
  return str(model_dir)


@pytest.fixture
def words(tmp_path):
  path = tmp_path / 'words.txt'
  path.write_text(''.join(word + '\n' for word in WORDS), encoding='utf-8')
  return path


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Predicting ----


def test_one_object_a_line_in_order(run, words, tmp_path):
  output = tmp_path / 'out.jsonl'
  written = infer(model=run, input=str(words), output=str(output), batch_size=8)
  entries = read(output)
  assert written == len(WORDS)
  assert [entry['input'] for entry in entries] == WORDS
  for entry in entries:
    assert isinstance(entry['prediction'], str)
    assert entry['score'] < 0


def test_inputs_of_a_task_of_ones_own(run, words, tmp_path, monkeypatch):
  """As from a file of the same lines; `--module` registers a plain seqio.Task."""
  name = f'inputs_of_a_task_{tmp_path.parent.name}'.replace('-', '_')
  (tmp_path / f'{name}.py').write_text(
    'import seqio, tensorflow as tf\n'
    f'rows = [(word, "y") for word in {WORDS!r}]\n'
    'def read(split, shuffle_files=False, seed=None):\n'
    '  columns = dict(zip(("inputs", "targets"), map(list, zip(*rows))))\n'
    '  return tf.data.Dataset.from_tensor_slices(columns)\n'
    'feature = seqio.Feature(seqio.ByteVocabulary(125), add_eos=True)\n'
    f'seqio.TaskRegistry.add({name!r}, source=seqio.FunctionDataSource(read, splits=["test"]),\n'
    '  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],\n'
    '  output_features={"inputs": feature, "targets": feature})\n'
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  files, tasks = tmp_path / 'files.jsonl', tmp_path / 'tasks.jsonl'
  infer(model=run, input=str(words), output=str(files), batch_size=8)
  argv = ['infer', f'--model={run}', '--input_format=task', f'--module={name}', '--batch_size=8']
  assert main.main([*argv, f'--input={name}:test', f'--output={tasks}']) == 0
  assert read(files) == read(tasks)
  with pytest.raises(UsageError, match="has no split 'train'; it has test"):
    infer(model=run, input=f'{name}:train', output=f'{tasks}2', input_format='task')


def test_a_draft_changes_nothing(run, words, tmp_path):
  small, alone, drafted = (tmp_path / name for name in ('small', 'alone.jsonl', 'drafted.jsonl'))
  tiny_run.save_untrained(small, seed=1, emb_dim=8)
  infer(model=run, input=str(words), output=str(alone), batch_size=8)
  argv = ['infer', f'--model={run}', f'--input={words}', f'--output={drafted}', '--batch_size=8']
  assert main.main([*argv, f'--draft_model={small}', '--draft_tokens=2']) == 0
  for one, other in zip(read(alone), read(drafted), strict=True):
    assert one['prediction'] == other['prediction']
    assert one['score'] == pytest.approx(other['score'], abs=1e-3)


@pytest.mark.parametrize('lengths', [tiny_run.LENGTHS, {'targets': 16}])
def test_a_decoder_continues_the_line(words, tmp_path, lengths):
  """After EOS, if it was trained on inputs and targets, and as it was trained to read them."""
  run, output = tmp_path / 'run', tmp_path / 'out.jsonl'
  changes = dict(architecture='decoder', bidirectional_prefix='inputs' in lengths)
  tiny_run.save_untrained(run, **changes)
  run_directory.write_run(
    str(run), model=tiny_run.model(**changes), vocabulary=tiny_run.VOCABULARY, lengths=lengths
  )
  assert infer(model=str(run), input=str(words), output=str(output), batch_size=8) == len(WORDS)
  model = t5x_lite.load(str(run))
  found = [entry['prediction'] for entry in read(output)]
  assert found == model.generate(WORDS, max_new_tokens=16)
  end = [1] if 'inputs' in lengths else []
  ids = model.generate(
    [[*model.vocabulary.encode(word), *end] for word in WORDS], max_new_tokens=16
  )
  assert found == [model.vocabulary.decode(row) for row in ids]


def test_settings_are_flags(run, words, tmp_path):
  output = tmp_path / 'out.jsonl'
  argv = ['infer', f'--model={run}', f'--input={words}', f'--output={output}', '--batch_size=8']
  argv += ['--num_beams=3', '--num_return_sequences=2', '--brevity_alpha=0.6']
  # A gin file's decoding is changed by a flag, not replaced.
  argv += [
    '--gin_file=configs/runs/infer.gin',
    '--gin.MAX_DECODE_LENGTH=5',
    '--early_stopping=never',
  ]
  assert main.main(argv) == 0
  for entry in read(output):
    best, second = entry['n_best']
    assert (entry['prediction'], entry['score']) == (best['prediction'], best['score'])
    assert best['score'] >= second['score'] and best != second
    assert entry['normalization'] == 'sum of log-probabilities / ((5 + length) / 6)**0.6'
  argv = ['infer', f'--model={run}', f'--input={words}', f'--output={output}', '--batch_size=8']
  assert main.main([*argv, '--overwrite', '--labels', 'yes', 'no']) == 0
  assert {entry['prediction'] for entry in read(output)} <= {'yes', 'no'}
  assert main.main([*argv, '--overwrite', '--num_beams=2', '--temperature=1']) == 2
  # What outputs begin with, ids that none has, and how likely each token is.
  more = ['--decoder_prefix=ab', '--log_probs', '--max_decode_length=4', '--stop_strings', 'b', 'z']
  letters = [str(i + 3) for i in b'abcdefgh'] + ['3,4', '5,6']
  assert main.main([*argv, *more, '--overwrite', '--forbidden_tokens', *letters]) == 0
  for entry in read(output):
    assert entry['prediction'].startswith('ab')
    assert not set(entry['prediction'][2:]) & set('abcdefghz')
    assert 1 <= len(entry['log_probs']) <= 4
    assert entry['score'] == pytest.approx(sum(entry['log_probs']), abs=1e-4)


def test_formats_agree(run, words, tmp_path):
  data = words.read_bytes()
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(data))
  lines = [json.dumps({'id': 3, 'word': word}) for word in WORDS]
  for name, text in (('a.txt.zst', data), ('a.jsonl.zst', '\n'.join(lines).encode())):
    with pyarrow.CompressedOutputStream(str(tmp_path / name), 'zstd') as file:
      file.write(text)
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'a.csv').write_text('id,word\n' + ''.join(f'1,"{w}"\n' for w in WORDS))
  (tmp_path / 'a.tsv').write_text(''.join(f'{i}\t{w}\n' for i, w in enumerate(WORDS)))
  parquet.write_table(pyarrow.table({'word': WORDS}), tmp_path / 'a.parquet')
  fields = {'a.tsv': '1', 'a.txt.gz': '', 'a.txt.zst': '', 'words.txt': ''}
  outputs = []
  for path in sorted(tmp_path.glob('[aw]*')):
    output, field = tmp_path / 'out.jsonl', fields.get(path.name, 'word')
    infer(model=run, input=str(path), output=str(output), field=field, batch_size=8, overwrite=True)
    outputs.append(output.read_text())
  assert len(outputs) == 8 and len(set(outputs)) == 1


def test_lines_are_sorted_by_length_and_written_in_order(run, tmp_path, monkeypatch):
  """Each line is predicted as if it were alone, whatever lengths its neighbours have."""
  texts = ['x' * (7 * i % 31) for i in range(40)]
  path, output = tmp_path / 'in.txt', tmp_path / 'out.jsonl'
  path.write_text(''.join(text + '\n' for text in texts))
  lengths, predict_all = [], prediction.Predictor.predict_all

  def spy(self, params, rows, **options):
    lengths.append([len(row) for row in rows])
    return predict_all(self, params, rows, **options)

  monkeypatch.setattr(prediction.Predictor, 'predict_all', spy)
  monkeypatch.setattr(infer_lib, 'WINDOW', 4)
  infer(model=run, input=str(path), output=str(output), batch_size=8)
  assert [sum(batch) for batch in lengths] != [sum(map(len, texts[i : i + 8])) for i in range(5)]
  first = [length for batch in lengths[:4] for length in batch]
  assert first == sorted(first, reverse=True)
  entries = read(output)
  assert [entry['input'] for entry in entries] == texts
  model = t5x_lite.load(run)
  alone = [model.generate(text, max_new_tokens=16) for text in texts[::9]]
  assert [entry['prediction'] for entry in entries[::9]] == alone


@pytest.mark.parametrize('how', [{}, {'temperature': 1.0, 'top_k': 9}])
def test_continuous_batching_writes_the_same(run, words, tmp_path, how):
  decoding = DecodingConfig(max_decode_length=16, **how)
  found = []
  for continuous in (False, True):
    output = tmp_path / f'{continuous}.jsonl'
    given = {'decoding': decoding, 'batch_size': 8, 'seed': 3, 'continuous': continuous}
    infer(model=run, input=str(words), output=str(output), **given)
    found.append([{**entry, 'score': round(entry['score'], 3)} for entry in read(output)])
  assert found[0] == found[1]
  given = {'model': run, 'input': str(words), 'output': str(tmp_path / 'c'), 'continuous': True}
  with pytest.raises(UsageError, match='greedy search or one sample'):
    infer(**given, decoding=DecodingConfig(num_beams=2))
  with pytest.raises(UsageError, match='texts of one model'):
    infer(**given, embeddings='mean')


@pytest.mark.parametrize('pooling', ['mean', 'first', 'none'])
def test_embeddings_are_those_of_transformers(run, words, tmp_path, pooling):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  output = tmp_path / 'out.parquet'
  infer(model=run, input=str(words), output=str(output), batch_size=8, embeddings=pooling)
  found = parquet.read_table(output)
  assert found['input'].to_pylist() == WORDS
  model = t5x_lite.load(run)
  model.save(str(tmp_path / 'hf'), format='hf')
  oracle = transformers.T5EncoderModel.from_pretrained(str(tmp_path / 'hf')).eval()
  for text, one in zip(WORDS, found['embedding'].to_pylist(), strict=True):
    ids = torch.tensor([[*model.vocabulary.encode(text), 1]])
    with torch.no_grad():
      states = oracle(input_ids=ids).last_hidden_state[0].numpy()
    wanted = {'mean': states.mean(axis=0), 'first': states[0], 'none': states}[pooling]
    np.testing.assert_allclose(np.asarray(one), wanted, atol=2e-5)


def test_bad_rows_are_told_and_left_out(run, tmp_path, caplog):
  huge = b'{"text": ' + b'9' * 5000 + b'}\n'
  rows = b'{"text": "a"}\nnonsense\n{"x": 1}\n{"text": []}\n{"text": "\xff"}\n' + huge
  (tmp_path / 'in.jsonl').write_bytes(rows + b'[]\n{"text": "b"}\n')
  # A quoted field that goes wrong on its second line, too few columns, no UTF-8.
  table = b'text,n\na,1\n"x\ny" z,2\nx\n\xff,3\nb,\xff\n'
  (tmp_path / 'in.csv').write_bytes(table)
  for name, lines in (('in.jsonl', [2, 3, 4, 5, 6, 7]), ('in.csv', [3, 5, 6])):
    caplog.clear()
    output = tmp_path / 'out.jsonl'
    arguments = dict(model=run, input=str(tmp_path / name), output=str(output), field='text')
    with pytest.raises(UsageError, match=f'{name}:{lines[0]}'):
      infer(**arguments, overwrite=True)
    assert infer(**arguments, batch_size=8, skip_bad_rows=True, overwrite=True) == 2
    assert [entry['input'] for entry in read(output)] == ['a', 'b']
    told = [r.getMessage() for r in caplog.records if 'left out' in r.getMessage()]
    assert [int(one.split(f'{name}:')[1].split(':')[0].split()[0]) for one in told] == lines
    assert infer(**arguments, batch_size=8, skip_bad_rows=True, resume=True) == 2
  (tmp_path / 'in.csv').write_text('text,n\na,1\n"open,2\nb,3\n')
  with pytest.raises(UsageError, match=r'in\.csv:3 is not CSV'):
    infer(**arguments, skip_bad_rows=True, overwrite=True)


def test_standard_streams(run, words, monkeypatch, capsys):
  stdin = types.SimpleNamespace(buffer=io.BytesIO(words.read_bytes()))
  monkeypatch.setattr(sys, 'stdin', stdin)
  infer(model=run, input='-', output='-', batch_size=8)
  lines = capsys.readouterr().out.splitlines()
  assert [json.loads(line)['input'] for line in lines] == WORDS


def test_a_prefix_is_for_the_model_alone(run, tmp_path):
  bare, full = tmp_path / 'bare.txt', tmp_path / 'full.txt'
  bare.write_text('hello\n')
  full.write_text('say: hello\n')
  entries = []
  for path, prefix in ((bare, 'say: '), (full, '')):
    output = tmp_path / 'out.jsonl'
    infer(
      model=run, input=str(path), output=str(output), prefix=prefix, batch_size=8, overwrite=True
    )
    entries += read(output)
  assert entries[0]['prediction'] == entries[1]['prediction']
  assert entries[0]['input'] == 'hello'


def test_long_inputs_are_cut_and_say_so(run, words, tmp_path, caplog):
  output = tmp_path / 'out.jsonl'
  infer(model=run, input=str(words), output=str(output), max_input_length=10, batch_size=8)
  cut = [entry.get('truncated', False) for entry in read(output)]
  assert cut == [len(w.encode()) > 9 for w in WORDS]
  warnings = [r for r in caplog.records if r.levelname == 'WARNING']
  assert 'max_input_length=10' in warnings[0].getMessage()


def test_an_empty_file(run, tmp_path):
  (tmp_path / 'in.txt').write_text('')
  output = tmp_path / 'out.jsonl'
  assert infer(model=run, input=str(tmp_path / 'in.txt'), output=str(output)) == 0
  assert output.read_text() == ''


def test_needs_no_tensorflow(run, words, tmp_path):
  code = (
    'import sys\n'
    'from t5x_lite.programs.infer import infer\n'
    f'infer(model={run!r}, input={str(words)!r}, output="-", batch_size=8)\n'
    'assert "tensorflow" not in sys.modules\n'
    'assert "seqio" not in sys.modules\n'
  )
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert len(result.stdout.splitlines()) == len(WORDS)


def test_a_torn_line_of_bytes_is_written_again(run, words, tmp_path):
  output = tmp_path / 'out.jsonl'
  arguments = dict(model=run, input=str(words), output=str(output))
  infer(**arguments, batch_size=8)
  whole = output.read_bytes()
  lines = whole.splitlines(keepends=True)
  output.write_bytes(b''.join(lines[:9]) + b'{"input": "\xff\xfe"}\n')
  infer(**arguments, batch_size=8, resume=True)
  assert output.read_bytes() == whole


def test_finished_work_is_not_overwritten(run, words, tmp_path):
  output = tmp_path / 'out.jsonl'
  arguments = dict(model=run, input=str(words), output=str(output))
  infer(**arguments, batch_size=8)
  written = output.read_text()
  with pytest.raises(UsageError, match='--resume, replace it with --overwrite'):
    infer(**arguments)
  with pytest.raises(UsageError, match='contradict'):
    infer(**arguments, resume=True, overwrite=True)
  assert output.read_text() == written
  infer(**arguments, batch_size=8, overwrite=True)
  assert output.read_text() == written


# ---- Interruptions ----


@pytest.mark.parametrize('kept', [0, 3, 9])
def test_an_interrupted_output_is_continued(run, tmp_path, kept):
  """What is written in two goes is what one go writes, byte for byte."""
  path, output = tmp_path / 'in.txt', tmp_path / 'out.jsonl'
  path.write_text(''.join(f'word {i}\n' for i in range(20)))
  arguments = dict(model=run, input=str(path), output=str(output), batch_size=8)
  infer(**arguments)
  whole = output.read_bytes()
  lines = whole.splitlines(keepends=True)
  output.write_bytes(b''.join(lines[:kept]) + lines[kept][:7])
  assert infer(**arguments, resume=True) == 20
  assert output.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize('ending', ['csv', 'parquet'])
def test_a_killed_table_is_made_all_the_same(run, tmp_path, ending):
  path, output, whole = (tmp_path / name for name in ('in.txt', f'out.{ending}', f'whole.{ending}'))
  path.write_text(''.join(f'word {i}\n' for i in range(400)))
  partial = tmp_path / f'out.{ending}.partial.jsonl'
  arguments = dict(model=run, input=str(path), batch_size=8)
  code = f"""
import os, signal
from t5x_lite.decoding import prediction
from t5x_lite.programs.infer import infer
numbers, predict_all = iter(range(400)), prediction.Predictor.predict_all
def until_killed(*arguments, **options):
  if next(numbers) == 20:
    os.kill(os.getpid(), signal.SIGKILL)
  return predict_all(*arguments, **options)
prediction.Predictor.predict_all = until_killed
infer(output={str(output)!r}, **{arguments})
"""
  assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
  assert partial.exists() and not output.exists()
  # As if it had come in the middle of a line.
  partial.write_bytes(partial.read_bytes()[:-20])
  with pytest.raises(UsageError, match='holds predictions already'):
    infer(**arguments, output=str(output))
  assert infer(**arguments, output=str(output), resume=True) == 400
  infer(**arguments, output=str(whole))
  assert output.read_bytes() == whole.read_bytes() and not partial.exists()
  assert infer(**arguments, output=str(output), resume=True) == 400
  assert output.read_bytes() == whole.read_bytes() and not partial.exists()


def test_a_shorter_input_deletes_nothing(run, words, tmp_path):
  output = tmp_path / 'out.jsonl'
  arguments = dict(model=run, output=str(output), batch_size=8)
  infer(**arguments, input=str(words))
  before = output.read_bytes()
  (tmp_path / 'short.txt').write_text(WORDS[0] + '\n')
  with pytest.raises(
    UsageError, match=r'out\.jsonl:2 is not the prediction of line 2 of this input'
  ):
    infer(**arguments, input=str(tmp_path / 'short.txt'), resume=True)
  assert output.read_bytes() == before


def test_resuming_checks_that_the_input_is_the_same(run, words, tmp_path):
  output = tmp_path / 'out.jsonl'
  output.write_text('{"input": "other", "prediction": ""}\n')
  with pytest.raises(UsageError, match=r'out\.jsonl:1 is not the prediction'):
    infer(model=run, input=str(words), output=str(output), resume=True)


# ---- Mistakes ----


@pytest.mark.parametrize(
  'name, content, message',
  [
    (
      'a.jsonl',
      b'{"input": "a"}\n{"inptu": "b"}\n',
      r"a\.jsonl:2: the field 'input' must be text or a number; it is not",
    ),
    ('a.jsonl', b'{"input": "a"}\nnonsense\n', r'a\.jsonl:2 is not JSON'),
    ('a.jsonl', b'{"text": []}\n', r'a\.jsonl:1: the field .* it is list'),
    ('a.csv', b'text,n\na,1\n"b,2\n', r'a\.csv:3 is not CSV'),
    ('a.csv', b'left,right\na,1\n', r'a header or an example'),
    ('a.tsv', b'a b\tc d\n', r'which of the columns 0, 1 is the input'),
    ('a.txt', b'fine\n\xff\xfe\n', r'a\.txt:2 is not UTF-8'),
  ],
)
def test_an_unreadable_line_is_named_before_anything_is_written(
  run, tmp_path, name, content, message
):
  (tmp_path / name).write_bytes(content)
  output = tmp_path / 'out.jsonl'
  output.write_text('precious')
  with pytest.raises(UsageError, match=message):
    infer(model=run, input=str(tmp_path / name), output=str(output), overwrite=True)
  assert output.read_text() == 'precious'


@pytest.mark.parametrize(
  'overrides, message',
  [
    (dict(model='/nowhere'), 'does not exist'),
    (dict(input='/nowhere.txt'), 'no such input file'),
    (dict(output='/nowhere/out'), 'no such directory'),
    (dict(input_format='xml'), "input_format is 'xml'"),
    (dict(input_format='tsv', field='3'), 'no column 3'),
    (dict(input_format='tsv', field='x'), "no column 'x'"),
    (dict(input='-', input_format='csv'), 'standard input is text'),
    (dict(field='x', template='{x}'), 'not both'),
    (dict(batch_size=0), 'batch_size is 0'),
    (dict(output='-', resume=True), 'cannot be resumed'),
    (dict(embeddings='max'), "embeddings is 'max'; allowed: first, mean, none"),
    (dict(output='x.jsonl.gz'), 'cannot hold'),
    (dict(field='x'), r"words\.txt is text, a line an input, without a field 'x'"),
    (dict(embeddings='mean', decoding=DecodingConfig(num_beams=2)), 'are not decoded'),
    (dict(decoder_prefix='a', continuous=True), 'without a draft and a prefix'),
    (dict(embeddings='mean', log_probs=True), 'are not decoded'),
    (dict(input='/dev/null'), 'is a pipe.* standard input'),
  ],
)
def test_mistakes_are_one_clear_line(run, words, tmp_path, overrides, message):
  arguments = dict(model=run, input=str(words), output=str(tmp_path / 'out.jsonl'))
  with pytest.raises(UsageError, match=message):
    infer(**{**arguments, **overrides})


def test_the_input_is_not_overwritten(run, words):
  with pytest.raises(UsageError, match='same file'):
    infer(model=run, input=str(words), output=str(words))
  partial = words.rename(words.parent / 'out.csv.partial.jsonl')
  with pytest.raises(UsageError, match='same file'):
    infer(model=run, input=str(partial), output=str(words.parent / 'out.csv'), overwrite=True)


def test_lines_end_where_the_file_says(tmp_path):
  path = tmp_path / 'in.txt'
  path.write_bytes('\ufeffa\u2028b\r\nc\n\nd'.encode())
  assert list(pairs.read_inputs(str(path))) == ['a\u2028b', 'c', '', 'd']
