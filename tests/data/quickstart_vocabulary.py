"""Made the vocabulary of the quickstart: `python -m tests.data.quickstart_vocabulary OUTPUT.model`.

The test makes it again, byte for byte.

Phonemes, prefixes and each language's most frequent words are one piece each, for short sequences;
all else is characters. Prefixes swallow the space behind them and frequent words begin with one, so
that the word after `pronounce: ` is always spelt out.
"""

import collections
import gzip
import importlib.resources
import pathlib
import sys
from collections.abc import Iterator

from t5x_lite.data import vocabularies
from t5x_lite.programs import train_vocabulary

_SPACE = '\u2581'
_PREFIXES = ('pronounce: ', 'language: ', 'syllables: ')
_VOWELS = 'AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW'.split()
_CONSONANTS = 'B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH'.split()
_CORPORA = ('language_id', 'translate_en_de', 'translate_en_fr', 'cmudict')
_WORDS_PER_LANGUAGE = 60
_VOCAB_SIZE = 3072 - 100  # T5's 100 sentinels come on top


def _path(name: str) -> str:
  return str(importlib.resources.files('t5x_lite.data.corpora').joinpath(name))


def _rows(name: str) -> Iterator[list[str]]:
  with gzip.open(_path(name), 'rt', encoding='utf-8') as file:
    yield from (line.rstrip('\n').split('\t') for line in file)


def phonemes() -> list[str]:
  """Returns the CMU dictionary's phonemes, vowels with their three stresses."""
  return [f'{vowel}{stress}' for vowel in _VOWELS for stress in range(3)] + _CONSONANTS


def frequent_words(num: int = _WORDS_PER_LANGUAGE) -> list[str]:
  """Returns every language's most frequent words of two or more characters."""
  counts: dict[str, collections.Counter] = {}
  for text, language in _rows('language_id_train.tsv.gz'):
    words = (word for word in text.split() if len(word) > 1)
    counts.setdefault(language, collections.Counter()).update(words)
  chosen = (word for c in counts.values() for word, _ in c.most_common(num))
  return sorted(set(chosen))


def make(output: str) -> None:
  """Writes the vocabulary to a file."""
  symbols = [_SPACE + prefix.replace(' ', _SPACE) for prefix in _PREFIXES]
  numbers = [str(number) for number in range(1, 15)]
  pieces = [*phonemes(), *numbers, *frequent_words()]
  symbols += [_SPACE + piece for piece in pieces]
  train_vocabulary.train_vocabulary(
    output=output,
    input=[_path(f'{name}_train.tsv.gz') for name in _CORPORA],
    file_format='tsv',
    fields=(0, 1),
    vocab_size=_VOCAB_SIZE,
    model_type='char',
    character_coverage=0.9997,
    user_defined_symbols=list(dict.fromkeys(symbols)),
    overwrite=True,
  )
  _as_unigram(output)


def _as_unigram(path: str) -> None:
  """Calls a model of characters a unigram model, which transformers reads; no id changes."""
  file = pathlib.Path(path)
  model = vocabularies.parse_model(file.read_bytes())
  model.trainer_spec.model_type = vocabularies.proto.TrainerSpec.UNIGRAM
  file.write_bytes(model.SerializeToString())


if __name__ == '__main__':
  make(sys.argv[1])
