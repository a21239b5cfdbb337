import json
import pathlib
import re
import signal

import numpy as np
import pytest

import t5x_lite
from t5x_lite import main
from t5x_lite.errors import UsageError
from t5x_lite.parallel import distributed, pytrees
from t5x_lite.programs import finetune as finetune_lib
from t5x_lite.programs import finetune_plan
from t5x_lite.programs import train as train_lib
from t5x_lite.runs import checkpoints, metric_writers
from tests import tiny_run

finetune = finetune_lib.finetune


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """A small model of bytes, as transformers writes it."""
  path = tmp_path_factory.mktemp('start') / 'model'
  config = tiny_run.model(scan_layers=False)
  t5x_lite.new(config, tiny_run.VOCABULARY).save(str(path), format='hf')
  return str(path)


@pytest.fixture(scope='module')
def table(tmp_path_factory):
  path = tmp_path_factory.mktemp('table') / 'rows.csv'
  lines = [f'word {i % 7} {i},{"even" if i % 2 else "odd"}' for i in range(60)]
  path.write_text('\n'.join(['text,label', *lines]) + '\n')
  return str(path)


@pytest.fixture(scope='module')
def finished(start, table, tmp_path_factory):
  output = tmp_path_factory.mktemp('finished') / 'out'
  results = finetune(model=start, train=table, output=str(output), steps=6, seed=3)
  return output, results


def test_the_command_to_predict_makes_inputs_as_training_did():
  text = finetune_lib.summary(
    {'metrics': {}, 'step': 3}, 'out', 'out/checkpoints/3', " --prefix 'a: '"
  )
  assert "infer --model out/checkpoints/3 --prefix 'a: ' --input FILE" in text


def test_everything_is_there(finished, start):
  output, results = finished
  names = {path.name for path in output.iterdir()}
  assert names >= {
    'checkpoints', 'config.json', 'evaluation', 'export', 'finetune.gin',
    'finetune.json', 'metrics.jsonl', 'model.json', 'results.json',
  }  # fmt: skip
  assert {'accuracy', 'f1_macro', 'examples'} <= set(results['metrics'])
  assert json.loads((output / 'results.json').read_text()) == results
  plan = json.loads((output / 'finetune.json').read_text())['plan']
  assert plan['total_steps'] == 6 and plan['metrics'] == ['accuracy', 'f1']
  lines = (output / 'evaluation' / 'finetune.jsonl').read_text().splitlines()
  assert len(lines) == results['metrics']['examples'] >= 1
  card = (output / 'export' / 'README.md').read_text()
  assert start in card and 'rows.csv' in card
  assert not list(output.glob('.export*'))


def test_transformers_gives_the_same_text(finished):
  transformers = pytest.importorskip('transformers')
  output, _ = finished
  ours = t5x_lite.load(str(output))
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(output / 'export')
  tokenizer = transformers.AutoTokenizer.from_pretrained(output / 'export')
  for text in ('word 3 3', 'word 5 12'):
    ids = tokenizer(text, return_tensors='pt').input_ids
    [row] = model.generate(ids, max_new_tokens=8)
    wanted = tokenizer.decode(row, skip_special_tokens=True)
    assert ours.generate(text, max_new_tokens=8) == wanted


def test_the_gin_file_runs_it_again_bit_for_bit(finished, tmp_path):
  output, _ = finished
  again = tmp_path / 'again'
  gin = str(output / 'finetune.gin')
  arguments = ['finetune', '--gin_file', gin, '--output', str(again)]
  assert main.main([*arguments, '--no-export_hf', '--num_shown', '0']) == 0
  a, b = (tiny_run.saved_arrays(path) for path in (output, again))
  assert a.keys() == b.keys()
  for name, array in a.items():
    assert array.tobytes() == b[name].tobytes(), name


def test_other_data_in_the_same_run_is_refused(start, table, finished, tmp_path):
  output, _ = finished
  other = tmp_path / 'other.csv'
  other.write_text('text,label\na,x\nb,y\nc,x\n')
  with pytest.raises(UsageError, match='begun with other data'):
    finetune(model=start, train=str(other), output=str(output))
  del table


def test_best_checkpoint_and_early_stopping(start, table, tmp_path):
  output = tmp_path / 'out'
  results = finetune(
    model=start,
    train=table,
    output=str(output),
    epochs=30,
    learning_rate=3.0,  # far too high: it gets worse soon
    patience=1,
    export_hf=False,
    num_shown=0,
    method='adamw',
  )
  losses = {
    entry['step']: entry['eval/finetune/loss']
    for entry in metric_writers.read_metrics(str(output))
    if 'eval/finetune/loss' in entry
  }
  assert results['step'] == min(losses, key=lambda step: losses[step])
  assert max(losses) < json.loads(
    (output / 'finetune.json').read_text()
  )['plan']['total_steps']  # fmt: skip
  kept = {int(p.name) for p in (output / 'checkpoints').iterdir()}
  assert results['step'] in kept


def test_bad_data_is_told_before_anything_is_written(start, tmp_path, capsys):
  path = tmp_path / 'x.csv'
  path.write_text('text,label\na,b\nc\n')
  output = tmp_path / 'out'
  code = main.main(['finetune', '--model', start, '--train', str(path), '--output', str(output)])
  assert code == 2 and not output.exists()
  [line] = capsys.readouterr().err.splitlines()
  assert f'{path}:3 has 1 columns' in line


def test_train_takes_its_architecture_from_the_checkpoint(start, tmp_path):
  arguments = tiny_run.arguments(tmp_path / 'run', total_steps=1)
  del arguments['model'], arguments['vocabulary']
  with pytest.raises(UsageError, match='no checkpoint to take it from'):
    train_lib.train(**arguments)
  arguments['checkpoint'] = checkpoints.CheckpointConfig(restore_path=start)
  arguments['model_changes'] = {'dropout_rate': 0.5}
  assert int(train_lib.train(**arguments).step) == 1
  saved = json.loads((tmp_path / 'run' / 'model.json').read_text())['model']
  assert saved['emb_dim'] == tiny_run.model().emb_dim
  assert saved['dropout_rate'] == 0.5
  # Continued, it is the run's own.
  arguments['total_steps'] = 2
  arguments['checkpoint'] = checkpoints.CheckpointConfig()
  assert int(train_lib.train(**arguments).step) == 2
  with pytest.raises(UsageError, match="'depth' is no field"):
    train_lib.train(**{**arguments, 'model_changes': {'depth': 3}})


# ---- Methods that train a few parameters ----


@pytest.fixture(scope='module')
def lora(start, table, tmp_path_factory):
  output = tmp_path_factory.mktemp('lora') / 'out'
  settings = {'method': 'lora', 'lora_rank': 2, 'lora_targets': ['query', 'wo'], 'seed': 3}
  return (
    output,
    settings,
    finetune(model=start, train=table, output=str(output), steps=6, learning_rate=0.1, **settings),
  )


def test_lora_ends_in_a_plain_model_and_an_adapter(lora, start):
  transformers = pytest.importorskip('transformers')
  peft = pytest.importorskip('peft')
  output, _, results = lora
  ours = t5x_lite.load(str(output / 'checkpoints' / str(results['step'])))
  plain = t5x_lite.load(start)
  for name, x in pytrees.flatten_names(plain.params).items():
    kept = pytrees.flatten_names(ours.params)[name]
    assert np.asarray(x).tobytes() == np.asarray(kept).tobytes(), name
  merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(output / 'export')
  base = transformers.AutoModelForSeq2SeqLM.from_pretrained(start)
  with_adapter = peft.PeftModel.from_pretrained(base, str(output / 'adapter'))
  tokenizer = transformers.AutoTokenizer.from_pretrained(output / 'export')
  again = t5x_lite.load(start, adapter=str(output / 'adapter'))
  ids = tokenizer('word 3 3', return_tensors='pt').input_ids
  first = np.zeros((1, 1), np.int32)
  wanted = ours.logits(ids.numpy(), first)
  assert np.abs(wanted - plain.logits(ids.numpy(), first)).max() > 1e-2
  np.testing.assert_array_equal(again.logits(ids.numpy(), first), wanted)
  for model in (merged, with_adapter):
    found = model(input_ids=ids, decoder_input_ids=ids[:, :1] * 0).logits
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-4)
  card = (output / 'export' / 'README.md').read_text()
  assert 'LoRA of rank 2, merged into the weights' in card
  assert '--lora_rank 2' in card and '--lora_targets query wo' in card


def test_lora_stopped_and_started_again_ends_the_same(lora, start, table, tmp_path, monkeypatch):
  output, settings, results = lora
  arguments = dict(model=start, train=table, steps=6, learning_rate=0.1, **settings)
  original = train_lib.DatasetIterator.__next__
  calls = []

  def stop_after_three(self):
    calls.append(1)
    if len(calls) == 3:
      signal.raise_signal(signal.SIGTERM)
    return original(self)

  with monkeypatch.context() as patch:
    patch.setattr(train_lib.DatasetIterator, '__next__', stop_after_three)
    assert finetune(output=str(tmp_path / 'out'), **arguments) is None
  assert distributed.stopped_by()
  assert not (tmp_path / 'out' / 'export').exists()
  again = finetune(output=str(tmp_path / 'out'), **arguments)
  assert again is not None and again['step'] == results['step']
  a, b = (tiny_run.saved_arrays(path) for path in (output, tmp_path / 'out'))
  for name, array in a.items():
    assert array.tobytes() == b[name].tobytes(), name
  for file in ('adapter/adapter_model.safetensors', 'export/model.safetensors'):
    assert (output / file).read_bytes() == (tmp_path / 'out' / file).read_bytes()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'method': 'lora', 'lora_rank': 0}, 'lora_rank is 0'),
    ({'method': 'lora', 'lora_targets': ['wi']}, r"\('wi',\); it must be of query"),
    ({'method': 'adamw', 'lora_rank': 8}, 'for --method lora'),
    ({'method': 'prompt', 'pack': True}, 'one example a row'),
    ({'method': 'adapter'}, 'allowed are adafactor, adamw, lora, adapters, prompt'),
  ],
)
def test_methods_that_cannot_be(start, table, tmp_path, settings, message):
  with pytest.raises(UsageError, match=message):
    finetune(model=start, train=table, output=str(tmp_path / 'out'), **settings)
  assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def model():
  return t5x_lite.new(tiny_run.model(), tiny_run.VOCABULARY)


def test_rows_in_memory_become_files_of_the_run(model, tmp_path, monkeypatch):
  rows = [(f'q{i}', f'a{i % 2}') for i in range(40)]
  output = tmp_path / 'out'
  tuned = model.finetune(
    rows,
    output=str(output),
    validation={'question': ['x', 'y'], 'label': ['a0', 'a1']},
    prefix='say: ',
    steps=2,
    num_shown=0,
  )
  assert tuned.step == 2 and tuned.config.emb_dim == model.config.emb_dim
  lines = (output / 'data' / 'train.jsonl').read_text().splitlines()
  assert len(lines) == 40
  assert json.loads(lines[0]) == {'input': 'say: q0', 'target': 'a0'}
  validation = (output / 'data' / 'validation.jsonl').read_text()
  assert json.loads(validation.splitlines()[1])['input'] == 'say: y'
  assert (output / 'export' / 'model.safetensors').exists()
  # The command line runs it again from there.
  found = {}
  monkeypatch.setattr(finetune_lib, 'finetune', lambda **given: found.update(given))
  gin = (output / 'finetune.gin').read_text()
  assert 'out/start' in gin and 'train.jsonl' in gin and 'prefix' not in gin


def test_unknown_settings_and_rows(model, tmp_path):
  with pytest.raises(UsageError, match="no setting 'num_epochs'"):
    model.finetune([('a', 'b')], output=str(tmp_path / 'o'), num_epochs=3)
  with pytest.raises(UsageError, match='give a path, a list'):
    model.finetune(5, output=str(tmp_path / 'o'))
  assert not (tmp_path / 'o').exists()
  without = t5x_lite.new(tiny_run.model())
  with pytest.raises(UsageError, match='without a vocabulary'):
    without.finetune([('a', 'b')], output=str(tmp_path / 'o'))


def test_the_example_of_the_readme_has_something_to_learn(tmp_path, monkeypatch):
  """Its rows, as `finetune` gets them, from the words that stand there."""
  text = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()
  (code,) = [one for one in re.findall(r'```python\n(.*?)```', text, re.S) if '.finetune(' in one]
  given = {}

  def finetune_rows(data, validation, **arguments):
    given.update(arguments, data=data)
    return 'best'

  monkeypatch.setattr(finetune_lib, 'finetune_rows', finetune_rows)
  model = t5x_lite.new(tiny_run.model(), tiny_run.VOCABULARY)
  monkeypatch.setattr(t5x_lite, 'load', lambda name: model, raising=False)
  monkeypatch.setattr(type(model), '_like_this', lambda self, path: path)
  names: dict = {}
  exec(code, names)
  assert names['tuned'] == 'best' and given['output'] == 'runs/languages'
  (tmp_path / 'rows.jsonl').write_text(
    '\n'.join(json.dumps({'input': a, 'target': b}) for a, b in given['data'])
  )
  parts = finetune_lib.read_parts(str(tmp_path / 'rows.jsonl'), (), finetune_lib.Columns(), 0.1)
  assert finetune_plan.choose_metrics(parts['train'].targets) == ['accuracy', 'f1']


def test_too_few_inputs_to_hold_one_out(model, tmp_path):
  rows = [('Das ist gut.', 'German'), ('That is good.', 'English')] * 50
  with pytest.raises(UsageError, match=r"every target is '(German|English)': equal inputs"):
    model.finetune(rows, output=str(tmp_path / 'out'))
