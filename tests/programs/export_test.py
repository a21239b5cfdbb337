import json
import os
import subprocess
import sys

import numpy as np
import pytest

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.programs.export import export

TEXTS = ['abc', 'hello there you all, dear friends', 'x']


@pytest.fixture(scope='module')
def model():
  config = t5x_lite.named_config(
    't5_1_1_small',
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
  )
  return t5x_lite.new(config, t5x_lite.VocabularyConfig(kind='byte'), seed=3)


@pytest.fixture(scope='module')
def model_dir(model, tmp_path_factory):
  directory = str(tmp_path_factory.mktemp('export') / 'model')
  model.save(directory)
  return directory


def rows_of(model, texts):
  return [[*model.vocabulary.encode(text), 1] for text in texts]


# Runs where t5x_lite cannot be found.
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import load_exported
rows, targets = json.loads(sys.argv[2])
model = load_exported.Exported(sys.argv[1])
tokens, log_probs = model.generate(rows)
try:
  model.generate([[5] * 50])
except ValueError as error:
  refused = str(error)
foreign = {'t5x_lite', 'flax', 'safetensors', 'tensorflow', 'orbax'} & {
  name.split('.')[0] for name in sys.modules}
print(json.dumps({
  'tokens': tokens, 'log_probs': log_probs, 'scores': model.score(rows, targets),
  'encoded': [x.tolist() for x in model.encode(rows)],
  'foreign': sorted(foreign), 'refused': refused}))
"""


def test_stablehlo_with_jax_alone(model, model_dir, tmp_path):
  out = str(tmp_path / 'out')
  os.mkdir(out)  # an empty folder is as good as none
  export(model=model_dir, destination=out, input_lengths=(8, 40), target_length=10)
  rows, targets = rows_of(model, TEXTS), rows_of(model, ['ab', 'c', 'def'])
  environ = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  result = subprocess.run(
    [sys.executable, '-c', CODE, out, json.dumps([rows, targets])],
    capture_output=True,
    text=True,
    env=environ,
    cwd=tmp_path,
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  assert found['foreign'] == []
  assert 'was not exported; there are [8, 40]' in found['refused']
  tokens, log_probs = model.generate(rows, max_new_tokens=10, return_scores=True)
  assert found['tokens'] == tokens
  np.testing.assert_allclose(found['log_probs'], log_probs, rtol=1e-4)
  np.testing.assert_allclose(found['scores'], model.score(rows, targets), rtol=1e-4)
  for row, vectors in zip(rows, found['encoded'], strict=True):
    np.testing.assert_allclose(vectors, model.encode([row])[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_saved_model_takes_text(model, model_dir, tmp_path):
  import tensorflow as tf

  out = str(tmp_path / 'out')
  export(
    model=model_dir,
    destination=out,
    to='saved_model',
    functions=('generate', 'score'),
    input_lengths=(40,),
    target_length=10,
  )
  signatures = tf.saved_model.load(out).signatures
  found = signatures['serving_default'](inputs=tf.constant(TEXTS))
  texts, log_probs = model.generate(TEXTS, max_new_tokens=10, return_scores=True)
  assert [text.decode() for text in found['outputs'].numpy()] == texts
  np.testing.assert_allclose(found['log_probs'], log_probs, rtol=1e-4)
  scores = signatures['score'](inputs=tf.constant(TEXTS), targets=tf.constant(['ab', 'c', 'def']))
  np.testing.assert_allclose(scores['log_probs'], model.score(TEXTS, ['ab', 'c', 'def']), rtol=1e-4)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'to': 'onnx'}, "export.to is 'onnx'; allowed: jax, saved_model"),
    ({'functions': ['decode']}, "export.functions is 'decode'"),
    ({'platforms': ['gpu']}, "export.platforms is 'gpu'"),
    ({'input_lengths': [0]}, 'lengths of at least 1'),
    ({'functions': []}, 'needs a function'),
  ],
)
def test_mistakes_are_told_before_anything_is_written(model_dir, tmp_path, arguments, message):
  with pytest.raises(UsageError, match=message.replace('(', r'\(')):
    export(model=model_dir, destination=str(tmp_path / 'out'), **arguments)
  assert list(tmp_path.iterdir()) == []
