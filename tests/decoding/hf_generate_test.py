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

NEW, SIZE = 12, 24
VARIANTS = {v.name: v for v in hf_models.VARIANTS}


@pytest.fixture(scope='module')
def flan(tmp_path_factory):
  # Layers one by one, as `infer` has them on a CPU.
  return load('t5_1_1_lm_flan', tmp_path_factory, scan_layers=False)


def load(name, tmp_path_factory, scan_layers=None):
  variant = VARIANTS[name]
  scan_layers = variant.scan_layers if scan_layers is None else scan_layers
  model = hf_models.make(variant).double()  # what both float32 are near
  with torch.no_grad():
    # Some outputs are to end early, some at the limit.
    model.lm_head.weight[1] *= 2.0 if variant.untied else 1.0
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
      **{'do_sample': False, 'num_beams': 1, **prompt, **settings},
    )
  start = 1 + len(prefix or ())
  found = []
  for row in out.sequences[:, start:].tolist():
    if 1 in row:
      del row[row.index(1) :]
    while len(row) == NEW and row and row[-1] == 0:  # as ours: padding is no output
      row.pop()
    found.append(row)
  return found, getattr(out, 'sequences_scores', None)


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
  if scores is not None:
    np.testing.assert_allclose([o.score for o in outputs], scores.numpy(), atol=1e-4)
  return outputs


# Penalties of either sign and none by every rule to stop; BEAMS=all takes every pair.
RULES = [(0.0, False), (0.6, True), (2.0, 'never'), (-1.0, False), (-1.0, 'never'), (1.0, 'never')]
if os.environ.get('BEAMS') == 'all':
  RULES = [
    (penalty, stopping)
    for stopping in (False, True, 'never')
    for penalty in (0.0, 0.6, 1.0, 2.0, -1.0)
  ]
# What they are of: an old T5, tied and untied heads, deep encoders, biases per layer.
FAMILIES = ('t5_1_0_scanned', 'byt5', 'umt5_unrolled', 'mt5_tied_unrolled', 'umt5_tied', 'ul2')


@pytest.mark.slow
@pytest.mark.parametrize('index', range(len(RULES)))
def test_beams(index, tmp_path_factory):
  penalty, stopping = RULES[index]
  pair = load(FAMILIES[index % len(FAMILIES)], tmp_path_factory)
  compare(pair, 3, num_beams=4, length_penalty=penalty, early_stopping=stopping)


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
  compare(flan, size=50, hf=settings if hf is None else hf, **settings)


def test_beams_with_processors(flan):
  settings, hf = PROCESSORS['all']
  beams = {'num_beams': 4, 'length_penalty': 0.6, 'early_stopping': True}
  compare(flan, hf={**(hf or settings), **beams}, **settings, **beams)


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
