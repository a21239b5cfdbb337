"""Input that cannot work, given on the command line as a user would.

One line that names the file and, where there is one, the row; exit code 2; and
nothing is left behind. What only looks odd works.
"""

import json
import os
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

import t5x_lite
from t5x_lite import main as main_lib
from tests import tiny_run

pytestmark = pytest.mark.slow

GOOD = 'text,label\n' + ''.join(f'word {i},{"ab"[i % 2]}\n' for i in range(12))


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A small model of bytes, as transformers writes it."""
  path = tmp_path_factory.mktemp('start') / 'model'
  t5x_lite.new(tiny_run.model(scan_layers=False), tiny_run.VOCABULARY).save(str(path), format='hf')
  return path


@pytest.fixture
def work(tmp_path, monkeypatch):
  """A working directory with nothing in it."""
  folder = tmp_path / 'work'
  folder.mkdir()
  monkeypatch.chdir(folder)
  return folder


@pytest.fixture
def refused(capfd, work):
  """Runs a command that must fail in one line, and returns the line."""

  def run(*argv):
    before = listed(work.parent)
    assert main_lib.main([str(argument) for argument in argv]) == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith('t5x-lite: ')]
    assert len(lines) == 1 and 'Traceback' not in err, err
    assert listed(work.parent) == before, 'something was left behind'
    return lines[0]

  return run


def listed(folder):
  return sorted(str(path) for path in folder.rglob('*'))


def infer(model, path, *more):
  return ('infer', '--model', model, '--input', path, '--output', 'out.jsonl', *more)


def finetune(model, path, *more):
  arguments = ('--steps', 1, '--output', 'out', '--no-export_hf', '--num_shown', 0)
  return ('finetune', '--model', model, '--train', path, *arguments, *more)


COMMANDS = {'infer': infer, 'finetune': finetune}

# Name of the file, its bytes, and what is said of it: by both, or by each.
FILES = {
  # Nothing in, nothing out: infer writes an empty file.
  'empty.csv': (b'', {'finetune': r'empty\.csv.* holds no rows'}),
  'empty.txt': (b'', {'finetune': r'empty\.txt.* holds no rows'}),
  'blank.jsonl': (b'\n\n', {'finetune': r'blank\.jsonl.* holds no rows'}),
  'only_a_header.csv': (b'text,label\n', {'finetune': r'a_header\.csv.* holds no rows'}),
  'empty_list.json': (b'[]', {'finetune': r'empty_list\.json.* holds no rows'}),
  'empty_field.csv': (b'text,label\na,x\nb,\n', {'finetune': r"field\.csv:3: .*'label' is empty"}),
  'empty_text.jsonl': (
    b'{"text": "a", "label": "x"}\n{"text": " ", "label": "y"}\n',
    {'finetune': r"text\.jsonl:2: .*'text' is empty.*--skip_bad_rows"},
  ),
  'no_column.csv': (b'colour,shape,size\nred,round,2\n', r'no_column\.csv'),
  'missing.jsonl': (
    b'{"text": "a", "label": "x"}\n{"label": "y"}\n',
    r"missing\.jsonl:2: the field 'text' .* not there",
  ),
  'short_row.csv': (b'text,label\na,x\nb\n', r'short_row\.csv:3 has 1 columns, the first line 2'),
  'tab_inside.tsv': (b'text\tlabel\na\tx\nb\tc\ty\n', r'tab_inside\.tsv:3 has 3 columns'),
  'broken.jsonl': (b'{"text": "a", "label": "x"}\n{"text": \n', r'broken\.jsonl:2 is not JSON'),
  'no_object.jsonl': (b'{"text": "a", "label": "x"}\n[1]\n', r'no_object\.jsonl:2 is not a JSON'),
  'broken.json': (b'[{"text": "a", "label": "x"},', r'broken\.json is not JSON'),
  'null.jsonl': (b'{"text": null, "label": "x"}\n', r'null\.jsonl:1: .*must be text'),
  'latin.csv': ('text,label\na,x\nMüller,y\n'.encode('latin-1'), r'latin\.csv:3 is not UTF-8'),
  'latin.txt': ('a b\tx\nMüller\ty\n'.encode('latin-1'), r'latin\.txt:2 is not UTF-8'),
  'utf16.csv': ('text,label\na,x\n'.encode('utf-16'), r'utf16\.csv:1 is not UTF-8'),
  'half.jsonl': (b'{"text": "a\\ud800", "label": "x"}\n', r'half\.jsonl:1: .*no Unicode'),
  'open_quote.csv': (b'text,label\na,x\n"b,y\nc,z\n', r'open_quote\.csv:3 is not CSV'),
  'twice.jsonl': (
    b'{"text": "a", "text": "b", "label": "x"}\n',
    r"twice\.jsonl:1 .*'text' is there",
  ),
  'twice.csv': (b'text,label,text\na,x,b\n', r"twice\.csv names the column 'text' twice"),
  'cut.csv.gz': (b'\x1f\x8b\x08\0\0\0\0\0\0\xffKL', r'cut\.csv\.gz is not a whole gzip file'),
  'no.parquet': (b'PAR1 no', r'no\.parquet is not a whole Parquet file'),
  'equal.csv': (b'text,label\na,x\na,x\n', {'finetune': 'all inputs are equal'}),
  'one.csv': (b'text,label\na,x\n', {'finetune': 'there is one example'}),
}


@pytest.mark.parametrize(
  ('name', 'command'),
  [
    (name, command)
    for name, (_, message) in FILES.items()
    for command in COMMANDS
    if isinstance(message, str) or command in message
  ],
)
def test_a_bad_file_is_named(model, work, refused, name, command):
  content, message = FILES[name]
  message = message if isinstance(message, str) else message[command]
  path = work.parent / name
  path.write_bytes(content)
  line = refused(*COMMANDS[command](model, path))
  assert re.search(message, line), line


def test_no_file(model, refused):
  assert 'nowhere.csv' in refused(*infer(model, 'nowhere.csv'))
  assert 'nowhere.csv' in refused(*finetune(model, 'nowhere.csv'))
  assert "'no[0-9].csv'" in refused(*finetune(model, 'no[0-9].csv'))


# ---- What only looks odd ----


def test_any_path_works_through_all_commands(model, work):
  """Blanks, and what a format, a URL or a shell would read."""
  root = work / "%s {x} it's #1"
  root.mkdir()
  start, rows, out = root / 'model', root / 'rows.csv', root / 'out'
  shutil.copytree(model, start)
  rows.write_text(GOOD)
  arguments = ('--output', str(out), '--steps', '2', '--num_shown', '0')
  run = main_lib.main
  tune = ['finetune', '--model', str(start), '--train', str(rows), *arguments]
  assert run(tune) == 0
  assert run(tune) == 0  # continues, and finds that it is done
  assert len(read(out / 'evaluation' / 'finetune.jsonl')) >= 1
  results = root / 'out.jsonl'
  flags = ['--input', str(rows), '--output', str(results)]
  assert run(['infer', '--model', str(out), *flags]) == 0
  assert run(['infer', '--model', str(out / 'export'), *flags, '--resume']) == 0
  assert len(read(results)) == 12
  assert run(['report', str(out)]) == 0
  assert 'finetune' in (out / 'report.html').read_text()
  assert run(['convert', str(out), str(root / 'back')]) == 0


@pytest.mark.parametrize('folder', ['run[1]', 'what? *'])
def test_folders_named_like_patterns_are_read_but_hold_no_run(model, work, refused, folder):
  """Orbax would commit checkpoints there that hold no arrays."""
  root = work / folder
  start, rows = root / 'model', root / 'rows.csv'
  shutil.copytree(model, start)
  rows.write_text(GOOD)
  line = refused(*finetune(start, rows, '--output', root / 'out'))
  assert 'a run cannot be below a folder with' in line
  flags = ('--output', str(root / 'out.jsonl'), '--max_decode_length', '4')
  assert main_lib.main(['infer', '--model', str(start), '--input', str(rows), *flags]) == 0
  assert len(read(root / 'out.jsonl')) == 12
  assert main_lib.main(['convert', str(start), str(root / 'converted')]) == 0
  assert main_lib.main(['convert', str(root / 'converted'), str(root / 'hf'), '--to', 'hf']) == 0
  whole, back = (
    safetensors.numpy.load_file(path / 'model.safetensors') for path in (start, root / 'hf')
  )
  assert all((whole[name] == back[name]).all() for name in whole)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_quoted_newlines_and_long_lines_and_rows(model, work):
  long = 'x' * 10_000_000
  rows = work / 'rows.csv'
  rows.write_text(f'text,label\n"two\nlines, one ""cell""",a\n{long},b\n' + GOOD.split('\n', 1)[1])
  assert main_lib.main([*map(str, infer(model, rows, '--max_input_length', 32))]) == 0
  entries = read(work / 'out.jsonl')
  assert len(entries) == 14
  assert entries[0]['input'] == 'two\nlines, one "cell"'
  assert entries[1]['truncated'] and not entries[0].get('truncated')
  rows.write_text(rows.read_text().replace(long, long[:500_000]))  # training takes it several times
  assert main_lib.main([*map(str, finetune(model, rows, '--input_length', 32))]) == 0


def test_a_single_class(model, work):
  rows = work / 'rows.csv'
  rows.write_text('text,label\n' + ''.join(f'word {i},same\n' for i in range(8)))
  assert main_lib.main([*map(str, finetune(model, rows, '--metrics', 'accuracy', 'f1'))]) == 0
  metrics = json.loads((work / 'out' / 'results.json').read_text())['metrics']
  assert np.isfinite(metrics['f1_macro'])


# ---- Models ----


@pytest.fixture
def damaged(model, tmp_path):
  """A copy of the model, to be damaged."""
  return shutil.copytree(model, tmp_path / 'damaged')


@pytest.fixture
def rows(tmp_path):
  path = tmp_path / 'rows.csv'
  path.write_text(GOOD)
  return path


def uses(rows, model):
  """A command line of each kind that takes a model."""
  task = (
    '--gin.MIXTURE_OR_TASK_NAME=pronounce',
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    '--gin.BATCH_SIZE=8',
  )
  start = (f'--gin.INITIAL_CHECKPOINT_PATH={model}', '--gin.TRAIN_STEPS=2', '--gin.MODEL_DIR=run')
  return {
    'infer': infer(model, rows),
    'finetune': finetune(model, rows),
    'convert': ('convert', model, 'converted'),
    'export': ('export', model, 'exported', '--target_length', 8),
    'eval': (
      *('eval', '--gin_file=configs/runs/eval.gin', f'--gin.MODEL_DIR={model}', *task),
      *('--output', 'evaluated'),
    ),
    'train': ('train', '--gin_file=configs/runs/finetune.gin', *start, *task),
  }


USES = ('infer', 'finetune', 'convert', 'export', 'eval', 'train')


@pytest.mark.parametrize('use', USES)
def test_pickled_weights_are_refused_with_the_way_out(damaged, rows, refused, use):
  (damaged / 'model.safetensors').unlink()
  for name in ('pytorch_model.bin', 'model.pt'):
    (damaged / name).write_bytes(b'\x80\x04cos\nsystem\n')
    line = refused(*uses(rows, damaged)[use])
    assert f'{name} is a pickle' in line and 'save_pretrained' in line
    (damaged / name).unlink()


@pytest.mark.parametrize('use', USES)
def test_truncated_safetensors(damaged, rows, refused, use):
  weights = damaged / 'model.safetensors'
  whole = weights.read_bytes()
  for size in (0, 4, len(whole) // 2, len(whole) - 1):
    weights.write_bytes(whole[:size])
    assert 'cut short' in refused(*uses(rows, damaged)[use])


@pytest.mark.parametrize('use', USES)
def test_a_vocabulary_larger_than_the_embedding(damaged, rows, refused, use):
  weights = damaged / 'model.safetensors'
  tensors = safetensors.numpy.load_file(weights)
  for name in ('shared.weight', 'lm_head.weight'):
    if name in tensors:
      tensors[name] = tensors[name][:200].copy()
  safetensors.numpy.save_file(tensors, weights)
  config = json.loads((damaged / 'config.json').read_text())
  (damaged / 'config.json').write_text(json.dumps({**config, 'vocab_size': 200}))
  line = refused(*uses(rows, damaged)[use])
  assert '384 ids' in line and '200 rows' in line


# ---- Places that cannot be written to ----


@pytest.fixture
def read_only(tmp_path):
  if os.geteuid():
    folder = tmp_path / 'read_only'
    folder.mkdir()
    folder.chmod(0o555)
    return str(folder)
  return '/sys'  # where root cannot make a file either


@pytest.mark.parametrize('place', ['read_only', 'file'])
@pytest.mark.parametrize('use', [*USES, 'report', 'vocab'])
def test_an_output_that_cannot_be_written(model, rows, refused, read_only, tmp_path, use, place):
  if place == 'file':
    read_only = str(tmp_path / 'rows.csv')
  out = f'{read_only}/out'
  argv = {
    'infer': (*infer(model, rows)[:-1], f'{out}.jsonl'),
    'finetune': (*finetune(model, rows), '--output', out),
    'convert': ('convert', model, out),
    'export': ('export', model, out, '--target_length', 8, '--input_lengths', 8),
    'eval': (*uses(rows, model)['eval'], '--output', out),
    'train': (*uses(rows, model)['train'], f'--model_dir={out}'),
    'report': ('report', tmp_path / 'run', '--output', f'{out}.html'),
    'vocab': ('vocab', '--input', rows, '--output', f'{out}.model', '--vocab_size', '24'),
  }[use]
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
  assert read_only in refused(*argv)
