import functools

import pytest
import seqio
import tensorflow as tf

from t5x_lite.data.objectives import denoising, named
from t5x_lite.data.tasks import catalog, from_files
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError

BYTES = VocabularyConfig(kind='byte')


# One of each function, at the setting that needs most. UL2's are below.
@pytest.mark.parametrize(
  'objective',
  [
    'span_corruption_2',
    'iid_denoising_50',
    'bert_style',
    'mass_style',
    'drop_tokens',
    'deshuffling',
    'prefix_lm',
    'full_lm',
  ],
)
def test_every_objective_makes_examples(tmp_path, objective):
  name = f'named_test_{objective}'
  (tmp_path / 'x.txt').write_text('to be or not to be ' * 20)
  from_files.register_text_task(name, train_file=str(tmp_path / 'x.txt'), objective=objective)
  task = seqio.get_mixture_or_task(catalog.resolve(name, BYTES))
  dataset = task.get_dataset({'inputs': 32, 'targets': 32}, split='train')
  found = list(dataset.as_numpy_iterator())
  assert found
  for key in task.output_features:
    assert all(0 < len(e[key]) <= 32 for e in found), key


def tokens(name, path, lengths, **kwargs):
  from_files.register_text_task(name, train_file=str(path), objective='all')
  task = seqio.get_mixture_or_task(catalog.resolve(kwargs.pop('full', name), BYTES))
  dataset = task.get_dataset(lengths, split='train', shuffle=False, num_epochs=1, **kwargs)
  return list(dataset.as_numpy_iterator())


@pytest.fixture
def text(tmp_path):
  path = tmp_path / 'x.txt'
  path.write_text(''.join(f'{i} to be or not to be that is the question\n' for i in range(4500)))
  return path


@pytest.mark.parametrize(('rate', 'span'), [(0.1, 2), (0.5, 10)])
def test_any_rate_and_span_over_thousands(text, rate, span):
  """Exact counts in every full row, and every token is in inputs or targets."""
  name = f'named_test_any{span}'
  found = tokens(
    name, text, {'inputs': 96, 'targets': 96}, full=f'{name}_span_corruption_rate{rate}_span{span}'
  )
  assert len(found) > 1000
  full = [example for example in found if len(example['inputs']) == 96]
  assert len(full) > 0.95 * len(found)  # the rows are filled
  original = text.read_text().replace('\n', '').encode()
  length, _ = denoising.random_spans_helper(96, noise_density=rate, mean_noise_span_length=span)
  noise, spans = denoising.num_noise_tokens_and_spans(length, rate, span)
  for example in full:
    inputs, targets = example['inputs'][:-1], example['targets'][:-1]
    # Bytes are below 259, sentinels count down from 383.
    assert inputs[inputs >= 259].tolist() == list(range(383, 383 - spans, -1))
    assert targets[targets >= 259].tolist() == list(
      range(383, 383 - len(targets[targets >= 259]), -1)
    )
    assert (targets < 259).sum() == noise and (inputs < 259).sum() == length - noise
    assert bytes(recovered(inputs, targets)) in original


def recovered(inputs, targets):
  """Puts the spans of the targets where the inputs have their sentinels."""
  spans, current = {}, None
  for token in targets:
    if token >= 259:
      current = token
      spans[current] = []
    else:
      spans[current].append(token)
  text = []
  for token in inputs:
    text += spans.get(token, []) if token >= 259 else [token]
  return [int(token) - 3 for token in text]


def test_ul2s_denoisers_say_their_mode(text):
  """[R], [S] and [X] before inputs that fill the row with it."""
  name = 'named_test_ul2'
  from_files.register_text_task(name, train_file=str(text), objective='all')
  lengths = {'inputs': 96, 'targets': 96}
  rates = {}
  for denoiser in named.UL2:
    task = seqio.get_mixture_or_task(catalog.resolve(f'{name}_{denoiser}', BYTES))
    dataset = task.get_dataset(lengths, split='train', shuffle=False, seed=0, num_epochs=1)
    # A prefix is of any length, so that its mean takes more of them.
    found = list(dataset.take(500 if denoiser == 'ul2_s' else 100).as_numpy_iterator())
    mode = f'[{denoiser[4].upper()}]'.encode()
    share = []
    for example in found:
      assert bytes(int(i) - 3 for i in example['inputs'][:3]) == mode
      assert len(example['inputs']) <= 96 and len(example['targets']) <= 96
      kept = (example['inputs'][3:-1] < 259).sum()
      lost = (example['targets'][:-1] < 259).sum()
      share.append(lost / (kept + lost))
    rates[denoiser] = sum(share) / len(share)
    if denoiser != 'ul2_s':
      assert sum(len(example['inputs']) == 96 for example in found) > 0.9 * len(found)
  want = dict(
    ul2_r3=0.15, ul2_r8=0.15, ul2_s=0.25, ul2_x3=0.5, ul2_x8=0.5, ul2_x64=0.15, ul2_x64_half=0.5
  )
  assert rates == pytest.approx(want, abs=0.02)


@pytest.mark.parametrize(
  'name', ['span_corruption_rate0', 'iid_denoising_rate1.0', 'prefix_lm_rate2']
)
def test_a_rate_lies_between_0_and_1(name):
  with pytest.raises(UsageError, match='it must lie between 0 and 1'):
    named.find_objective(name)
  assert named.find_objective('mlm') is None
  assert named.find_objective('bert_style_span3') is None


def test_byt5s_sentinels_are_the_last_bytes():
  """Without extra ids they count down from 258, as in ByT5's own vocabulary."""
  vocabulary = seqio.ByteVocabulary(extra_ids=0)
  ids = tf.ragged.constant([range(3, 203)], dtype=tf.int32)
  inputs, _ = denoising.denoise_tokens(
    ids,
    tf.constant([1, 2]),
    vocabulary=vocabulary,
    noise_density=0.15,
    noise_mask_fn=functools.partial(denoising.random_spans_noise_mask, mean_noise_span_length=20.0),
    inputs_fn=denoising.noise_span_to_unique_sentinel,
  )
  assert [i for i in inputs.to_list()[0] if i > 202] == [258, 257]
