"""Beam search and processors beside transformers' PyTorch `generate`: token for token."""

import os

import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

import torch

from t5x_lite.decoding import prediction
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.interop import checkpoint_source, tensors
from t5x_lite.parallel.placement import single_device
from tests.interop import hf_models

NEW, SIZE = 12, 50
VARIANTS = {v.name: v for v in hf_models.VARIANTS}
# Tied and untied heads, deep encoders, biases per layer, scanned and not; and what the end's logits
# are multiplied by, so that some outputs end early and some at the limit.
FAMILIES = {
  't5_1_0_scanned': 4.0,
  't5_1_1_lm_flan': 1.5,
  'mt5_tied_unrolled': -3.0,
  'byt5': 1.5,
  'umt5_tied': 1.5,
  'umt5_unrolled': 3.0,
  'ul2': -3.0,
}


@pytest.fixture(autouse=True, scope='module')
def one_thread():
  """Products this small wait for each other's threads, twice as long where cores are shared."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.fixture(
  scope='module',
  params=[pytest.param(x, marks=() if 'flan' in x else pytest.mark.slow) for x in FAMILIES],
)
def family(request, tmp_path_factory):
  return load(request.param, tmp_path_factory)


@pytest.fixture(scope='module')
def flan(tmp_path_factory):
  # Layers one by one, as `infer` has them on a CPU.
  return load('t5_1_1_lm_flan', tmp_path_factory, scan_layers=False)


def load(name, tmp_path_factory, scan_layers=None):
  variant = VARIANTS[name]
  scan_layers = variant.scan_layers if scan_layers is None else scan_layers
  model = hf_models.make(variant).double()  # what both float32 are near
  with torch.no_grad():
    model.lm_head.weight[1] *= FAMILIES[name]
  folder = tmp_path_factory.mktemp(name)
  model.save_pretrained(folder)
  source = checkpoint_source.open_source(str(folder))
  cfg = source.config.replace(dtype='float32', scan_layers=scan_layers)
  return model, cfg, tensors.place(source.tensors, cfg)


def rows(size=SIZE):
  ids = hf_models.inputs(seed=3, size=size, length=20)
  return ids, [[int(i) for i in row if i] for row in ids]


def theirs(model, ids, *, prefix=None, **settings):
  prompt = {}
  if prefix is not None:
    prompt['decoder_input_ids'] = torch.tensor([[0, *prefix]] * len(ids))
  ids = torch.tensor(ids).long()
  with torch.no_grad():
    out = model.generate(
      input_ids=ids,
      attention_mask=(ids != 0).long(),
      max_new_tokens=NEW,
      return_dict_in_generate=True,
      output_scores=True,
      output_logits=True,
      **{'do_sample': False, 'num_beams': 1, **prompt, **settings},
    )
  start = 1 + len(prefix or ())
  found = []
  for row in out.sequences[:, start:].tolist():
    end = row.index(1) if 1 in row else len(row)
    while 1 not in row and end and row[end - 1] == 0:  # as ours: padding is no output
      end -= 1
    found.append(row[:end])
  scores = out.sequences_scores if 'sequences_scores' in out else sums(out.sequences, out.logits)
  return found, scores.numpy()


def sums(sequences, logits):
  """Sums of log-probabilities by the model's own logits, the end's included."""
  log_probs = torch.stack(logits, dim=1).log_softmax(-1)
  new = sequences[:, -len(logits) :]
  ended = (new == 1).cumsum(-1) - (new == 1).long()  # before this position
  chosen = log_probs.gather(-1, new[:, :, None])[:, :, 0]
  return torch.where(ended > 0, 0.0, chosen).sum(-1)


def ours(cfg, params, rows, *, prefix=None, **settings):
  config = DecodingConfig(max_decode_length=NEW, **settings)
  predictor = prediction.Predictor(
    cfg, placement=single_device(), decoding=config, batch_size=len(rows), max_input_length=32
  )
  prefixes = None if prefix is None else [prefix] * len(rows)
  outputs = predictor.predict_all(params, rows, prefixes=prefixes)
  flat = [output for n_best in outputs for output in n_best]
  return [output.tokens for output in flat], flat


def compare(pair, n=1, *, size=SIZE, prefix=None, hf=None, **settings):
  model, cfg, params = pair
  ids, tokens = rows(size)
  if n > 1:
    settings['num_return_sequences'] = n
  expected, scores = theirs(model, ids, prefix=prefix, **(settings if hf is None else hf))
  found, outputs = ours(cfg, params, tokens, prefix=prefix, **settings)
  assert found == expected
  np.testing.assert_allclose([o.score for o in outputs], scores, atol=1e-4)
  return found


@pytest.mark.slow
def test_greedy(family):
  plain = compare(family)
  lengths = [len(row) for row in plain]
  assert min(lengths) < NEW == max(lengths), 'all end early, or none'
  assert len({tuple(row) for row in plain}) > 10, 'prompts hardly matter'
  for settings in (
    {'repetition_penalty': 1.7},
    {'no_repeat_ngram_size': 2},
    {'min_new_tokens': 6},
    {'prefix': [11, 12, 13, 11]},
  ):
    assert compare(family, **settings) != plain, f'{settings} changes nothing'


# Every rule to stop with a penalty below 1 and one above, and none and a negative one; BEAMS=all
# takes every pair.
STOPPING = (False, True, 'never')
RULES = [(penalty, stopping) for stopping in STOPPING for penalty in (0.6, 2.0)]
RULES += [(0.0, False), (-1.0, False), (-1.0, 'never')]
if os.environ.get('BEAMS') == 'all':
  RULES = [(penalty, stopping) for stopping in STOPPING for penalty in (0.0, 0.6, 1.0, 2.0, -1.0)]


@pytest.mark.slow
@pytest.mark.parametrize('rule', RULES, ids=str)
def test_beams_all_four_returned(family, rule):
  penalty, stopping = rule
  compare(family, 4, num_beams=4, length_penalty=penalty, early_stopping=stopping)


@pytest.mark.slow
@pytest.mark.parametrize(
  'settings',
  [
    {'repetition_penalty': 1.7, 'min_new_tokens': 6},
    {'no_repeat_ngram_size': 2, 'prefix': [11] * 4},
  ],
  ids=' '.join,
)
def test_beams_with(family, settings):
  compare(family, 3, num_beams=4, **settings)


# Ours, and what transformers calls it where that differs.
PROCESSORS = {
  'repetition and minimum': ({'repetition_penalty': 1.7, 'min_new_tokens': 6}, None),
  'ngram': ({'no_repeat_ngram_size': 2}, None),
  'forbidden': (
    {'forbidden_tokens': ((88,), (1,), (31, 60), (44, 31))},
    {'bad_words_ids': [[88], [1], [31, 60], [44, 31]]},
  ),
  'no token twice and forced': (
    {'no_repeat_ngram_size': 1, 'forced_bos_id': 7, 'forced_eos_id': 1},
    {'no_repeat_ngram_size': 1, 'forced_bos_token_id': 7, 'forced_eos_token_id': 1},
  ),
  'all': (
    {'repetition_penalty': 1.3, 'no_repeat_ngram_size': 3, 'min_new_tokens': 4, 'forced_eos_id': 1},
    {
      'repetition_penalty': 1.3,
      'no_repeat_ngram_size': 3,
      'min_new_tokens': 4,
      'forced_eos_token_id': 1,
    },
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in PROCESSORS if name != 'all'])
def test_greedy_with_each_processor(flan, name):
  settings, hf = PROCESSORS[name]
  compare(flan, hf=settings if hf is None else hf, **settings)


def test_beams_with_processors(family):
  settings, hf = PROCESSORS['all']
  beams = {'num_beams': 4, 'length_penalty': 0.6, 'early_stopping': True}
  compare(family, hf={**(hf or settings), **beams}, **settings, **beams)


@pytest.mark.parametrize('num_beams', [1, 4])
def test_outputs_go_on_from_a_prefix(flan, num_beams):
  compare(flan, prefix=[11, 12, 13, 11], num_beams=num_beams, no_repeat_ngram_size=2)


def test_prefixes_of_different_lengths_are_as_each_alone(flan):
  _, cfg, params = flan
  _, tokens = rows(3)
  prefixes = [[5, 6, 7], [], [9]]
  config = DecodingConfig(max_decode_length=NEW, num_beams=3)

  def outputs(rows, prefixes):
    predictor = prediction.Predictor(
      cfg, placement=single_device(), decoding=config, batch_size=len(rows), max_input_length=32
    )
    found = predictor.predict_all(params, rows, prefixes=prefixes)
    return [one[0].tokens for one in found]

  alone = [
    outputs([row] * 3, [prefix] * 3)[0] for row, prefix in zip(tokens, prefixes, strict=True)
  ]
  assert outputs(tokens, prefixes) == alone
