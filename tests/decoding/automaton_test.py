"""What is decoded under a regex or a JSON schema matches it, whatever the model would say."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_lite
from t5x_lite.data.vocabularies import VocabularyConfig, make_vocabulary
from t5x_lite.decoding import automaton, processors
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from tests.models import tiny

pytest.importorskip('outlines_core')

VOCABULARIES = {
  'byte': VocabularyConfig(kind='byte'),
  't5': VocabularyConfig(),
  'quickstart': VocabularyConfig(path='package:quickstart', extra_ids=8),
}
# Spaces at all places, ends that are begun again, letters of two bytes, a number of repetitions.
PATTERNS = [
  r'(yes|no), (it|he) is( not){0,3} (nice|new)\.?',
  r'-?[0-9]+(\.[0-9]{2})?',
  r'( ?(ü|bé)[a-c]*){1,3}',
]


def accepts(found, vocabulary, tokens):
  """Walks the automaton in Python; returns whether a text may end there."""
  state = 0
  for token in tokens:
    state = found.next_SC[state, found.class_V[token]]
  return found.left_S[state] == 0


@pytest.mark.parametrize('name', VOCABULARIES)
def test_the_automaton_takes_what_the_regex_does(name):
  vocabulary = make_vocabulary(VOCABULARIES[name])
  rng = np.random.default_rng(0)
  for pattern in (*PATTERNS, '(ab|c*)', 'a(bc)?', '[a-d ]*'):
    found = automaton.compiled(pattern, '', vocabulary)
    for _ in range(200):
      text = ''.join(rng.choice(list('abcdé .1'), rng.integers(0, 6)))
      tokens = vocabulary.encode(text)
      if vocabulary.decode(tokens) == text and vocabulary.unk_id not in tokens:
        assert accepts(found, vocabulary, tokens) == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize('name', VOCABULARIES)
def test_a_stop_string_is_found_with_the_token_that_completes_it(name):
  vocabulary = make_vocabulary(VOCABULARIES[name])
  rng = np.random.default_rng(0)
  pieces = [*'abé. ', 'ab', '. ', ' a', 'the ', 'word']
  found = 0
  for strings in (('ab',), ('. ', 'b.a', 'aab'), ('é', 'the word'), (' ', 'aaaa'), ('abab', 'ba')):
    stopper = automaton.stopping(strings, vocabulary)
    read = jax.jit(functools.partial(processors.read_until, stopper))
    for _ in range(100):
      text = ''.join(rng.choice(pieces, rng.integers(1, 9)))
      tokens = vocabulary.encode(text)
      if rng.random() < 0.3:  # ids that are no text, among them
        tokens.insert(rng.integers(len(tokens) + 1), int(rng.choice([0, vocabulary.unk_id])))
      holds = [
        any(s in vocabulary.decode(tokens[: n + 1]) for s in strings) for n in range(len(tokens))
      ]
      # Whatever comes after.
      padded = np.asarray([(tokens + [7, 8, 9] * 40)[:100]], np.int32)
      count, state = read(padded, np.asarray([len(tokens)]))
      ends = stopper.left_S[np.asarray(state)] == 0
      if {0, vocabulary.unk_id}.isdisjoint(tokens):
        assert bool(ends[0]) == any(holds), (text, strings)
        assert int(count[0]) == (holds.index(True) + 1 if any(holds) else len(tokens))
      else:  # never where there is none
        assert not ends[0] or holds[int(count[0]) - 1], (tokens, strings)
      found += any(holds)
  assert found > 100


def test_a_space_after_a_prefix_and_ids_that_are_left_out():
  """The first is not dropped there; the others join what is around them."""
  vocabulary = make_vocabulary(VOCABULARIES['t5'])
  the = np.asarray([[*vocabulary.encode('the')[:1], 3]])
  for prefixed in (False, True):
    stopper = automaton.stopping((' the',), vocabulary, prefixed)
    _, state = processors.read_until(stopper, jnp.asarray(the), np.asarray([1]))
    assert (stopper.left_S[np.asarray(state)] == 0) == prefixed
  vocabulary = make_vocabulary(VOCABULARIES['byte'])
  stopper = automaton.stopping(('ca',), vocabulary)
  ids = [ord('c') + 3, 0, 2, 300, ord('a') + 3]
  assert vocabulary.decode(ids) == 'ca'
  _, state = processors.read_until(stopper, jnp.asarray([ids]), np.asarray([5]))
  assert stopper.left_S[np.asarray(state)] == 0


@functools.cache
def model_of(name):
  config = VOCABULARIES[name]
  # An embedding has more rows than the vocabulary ids.
  size = make_vocabulary(config).vocab_size + 28
  cfg = tiny.config(vocab_size=size, emb_dim=8, num_encoder_layers=1, num_decoder_layers=1)
  return t5x_lite.Model(cfg, tiny.params(cfg), config)


HOW = {
  'greedy': {},
  'sampling': {'temperature': 3.0, 'seed': range(50)},
  'beams': {'num_beams': 3, 'num_return_sequences': 2, 'max_new_tokens': 24},
}


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize(
  ('name', 'pattern'), zip(('t5', 'byte', 'quickstart'), PATTERNS, strict=True)
)
def test_texts_match(name, pattern, how):
  rows = np.random.default_rng(0).integers(3, 200, (50, 4)).tolist()
  model = model_of(name)
  settings = {'max_new_tokens': 40, 'batch_size': 64, **HOW[how]}
  found = model.generate(rows, regex=pattern, **settings)
  found = [one for each in found for one in (each if how == 'beams' else [each])]
  texts = [model.vocabulary.decode(tokens) for tokens in found]
  assert [text for text in texts if not re.fullmatch(pattern, text)] == []
  assert len(set(texts)) > 2 or how == 'greedy'


def test_json_is_whole_however_short_the_output():
  schema = {
    'type': 'object',
    'properties': {'name': {'type': 'string'}, 'age': {'type': 'integer'}},
    'required': ['name', 'age'],
  }
  texts = model_of('byte').generate(
    ['x'] * 50,
    json_schema=json.dumps(schema),
    temperature=1.0,
    seed=range(50),
    max_new_tokens=28,
    batch_size=64,
  )
  for text in texts:
    read = json.loads(text)
    assert isinstance(read['name'], str) and isinstance(read['age'], int)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'regex': '(a'}, r"'\(a' is no regex"),
    ({'regex': '(?=a)a'}, 'is no regex'),
    ({'json_schema': '{"type": "thing"}'}, 'is no regex or JSON schema'),
    ({'json_schema': 'no'}, 'is no regex or JSON schema'),
    # T5's vocabulary has no braces.
    ({'regex': r'\{\}'}, 'nothing that this vocabulary can write'),
    ({'regex': '[0-9]{60}', 'max_decode_length': 10}, r'max_decode_length is 10; .* above the '),
    ({'regex': 'a', 'json_schema': '{}'}, 'regex is set too'),
  ],
)
def test_what_cannot_be_followed_is_an_error(settings, message):
  with pytest.raises(UsageError, match=message):
    DecodingConfig(**settings).resolved(make_vocabulary(VOCABULARIES['t5']))
