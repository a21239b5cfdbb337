import dataclasses
import types

import pytest

from t5x_lite.decoding.config import DecodingConfig, decoding_config
from t5x_lite.errors import UsageError


@pytest.mark.parametrize(
  'field',
  [
    {'max_decode_length': 0},
    {'temperature': -1.0},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 0.9},
    {'top_k': 5},
  ],
)
def test_bad_values_are_named(field):
  with pytest.raises(UsageError, match=next(iter(field))):
    DecodingConfig(**field)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'num_beams': 4, 'temperature': 1.0}, 'searched, not sampled'),
    ({'length_penalty': 0.6}, 'num_beams'),
    ({'early_stopping': True}, 'num_beams'),
    ({'num_beams': 4, 'early_stopping': 'sometimes'}, "True, False or 'never'"),
    ({'num_beams': 4, 'length_penalty': 0.5, 'brevity_alpha': 0.6}, 'one of them'),
    ({'num_beams': 4, 'num_return_sequences': 5}, 'at most 4'),
    ({'num_return_sequences': 2}, 'at most 1'),
    ({'best_of': 3}, 'temperature'),
    ({'max_decode_length': 4, 'min_new_tokens': 5}, 'at most max_decode_length'),
    ({'labels': ['']}, 'not empty'),
    ({'forbidden_tokens': [[]]}, 'at least one id'),
    ({'forbidden_tokens': [[[1]]]}, 'at least one id'),
    ({'num_beams': '4'}, "'4'; it must be a whole number"),
    ({'num_beams': 2.5}, 'whole number'),
    ({'temperature': 'warm'}, 'a number'),
    ({'temperature': float('nan')}, 'temperature is nan'),
    ({'temperature': 1e300}, 'up to 10,000'),
    ({'repetition_penalty': float('inf')}, '0.0001 to 10,000'),
    ({'frequency_penalty': -1e300}, '-10,000 to 10,000'),
    ({'num_beams': 2, 'length_penalty': float('nan')}, 'length_penalty is nan'),
    ({'num_beams': 2, 'brevity_alpha': 1e10}, '-10 to 10'),
    ({'num_beams': 2, 'num_beam_groups': 2, 'diversity_penalty': 1e300}, '0 to 10,000'),
    ({'forced_bos_id': 'a'}, 'whole number'),
    ({'labels': 5}, 'texts that are not empty'),
    ({'labels': ['a\ud800']}, 'Unicode texts'),
    ({'json_schema': {'type': 'object'}}, 'a text'),
    ({'labels': ['a'], 'min_new_tokens': 2}, 'min_new_tokens is 2, but labels is set too'),
    ({'regex': 'a', 'no_repeat_ngram_size': 2}, 'but regex is set too, which may leave no token'),
    ({'allowed_outputs': [[5]], 'forbidden_words': 'b'}, 'but allowed_outputs is set too'),
    ({'regex': 'a', 'json_schema': '{}'}, 'json_schema is {}, but regex is set too'),
    ({'allowed_outputs': [[5, 6, 7]], 'max_decode_length': 3}, 'the end within 3 tokens'),
    ({'allowed_outputs': [[5], [6]], 'num_beams': 4, 'num_return_sequences': 3}, 'as many as'),
  ],
)
def test_what_would_do_nothing_or_cannot_be_is_an_error(fields, message):
  with pytest.raises(UsageError, match=message):
    DecodingConfig(**fields)


def test_settings_as_gin_and_flags_give_them():
  config = DecodingConfig(num_beams=4, early_stopping='true', labels='yes')
  assert config.early_stopping is True and config.labels == ('yes',)
  assert DecodingConfig(forbidden_tokens=[[3, 4], 5]).forbidden_tokens == ((3, 4), (5,))
  assert hash(config) == hash(dataclasses.replace(config))
  vocabulary = types.SimpleNamespace(encode=lambda text: [len(text)])
  resolved = config.resolved(vocabulary, 9)
  assert resolved.allowed_outputs == ((3,),) and resolved.labels == () and resolved.length == 9
  assert DecodingConfig().length == 128


@pytest.mark.parametrize(
  ('fields', 'score', 'text'),
  [
    ({}, -3.0, 'sum of log-probabilities'),
    ({'num_beams': 2}, -0.75, 'sum of log-probabilities / length**1'),
    ({'num_beams': 2, 'length_penalty': 0.0}, -3.0, 'sum of log-probabilities'),
    (
      {'num_beams': 2, 'brevity_alpha': 1.0},
      -2.0,
      'sum of log-probabilities / ((5 + length) / 6)**1',
    ),
  ],
)
def test_scores_say_what_they_are(fields, score, text):
  config = DecodingConfig(**fields)
  if fields:
    assert config.normalized(-3.0, 4.0) == pytest.approx(score)
  assert config.normalization == text


def test_texts_are_cut_before_the_first_stop_string():
  config = DecodingConfig(stop_strings=['. ', '!'])
  assert config.cut('One! Two. Three') == 'One'
  assert config.cut('One') == 'One'


def test_an_unknown_setting_says_what_there_is():
  config = decoding_config(5, temperature=0.5, top_p=0.9)
  assert (config.max_decode_length, config.top_p) == (5, 0.9)
  with pytest.raises(UsageError, match=r"'num_beam'.*num_beams.*temperature"):
    decoding_config(5, num_beam=4)
