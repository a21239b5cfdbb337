"""Regular expressions and stop strings as automata over the tokens of a vocabulary.

outlines-core (the extra `constrain`) makes an automaton over bytes, and a regex of a JSON schema;
tokens are walked through it here, since a vocabulary has ways of its own to write spaces.

Legend: S states, C classes of tokens that no state tells apart, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from t5x_lite.errors import UsageError

# Left of a state from which no token leads to the end.
NEVER = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
  """What is read, from state 0 on."""

  next_SC: np.ndarray  # the state after a token
  class_V: np.ndarray  # of each token; 0 is of those that are no text
  left_S: np.ndarray  # the fewest tokens to a whole text: 0 where it is one


@functools.lru_cache(maxsize=64)
def compiled(pattern: str, schema: str, vocabulary: Any) -> Automaton:
  """Returns the automaton of a regex, or of a JSON schema if it is ''; one object per input.

  The vocabulary is a `data.vocabularies.Vocabulary`. Raises UsageError if the text cannot be read,
  or the vocabulary can write nothing that matches.
  """
  given = repr(pattern or schema)
  try:
    import outlines_core
    from outlines_core import json_schema

    pattern = pattern or json_schema.build_regex_from_schema(schema)
    # One token a byte. The end is a byte too, or version 0.2.14 loses what goes on after a match.
    byte_tokens = outlines_core.Vocabulary(256, {bytes([i]): [i] for i in range(256)})
    index = outlines_core.Index(f'(?:{pattern})\\x00', byte_tokens)
  except ImportError as error:
    why = "outlines-core is missing: in a checkout, pip install '.[constrain]'"
    raise UsageError(why) from error
  except (TypeError, ValueError) as error:
    raise UsageError(f'{given} is no regex or JSON schema that can be followed: {error}') from error
  moves, first, ends = index.get_transitions(), index.get_initial_state(), index.get_final_states()
  ends = [state for state, row in moves.items() if row.get(0) in ends]
  # State 0 is the start, where a space may be skipped; 1 the start after that.
  number = {state: i for i, state in enumerate({first, *moves}, start=2)}
  dead = len(number) + 2
  byte_SB = np.full((dead + 1, 256), dead, np.int32)
  for state, row in moves.items():
    for byte in row.keys() - {0, 256}:
      byte_SB[number[state], byte] = number[row[byte]]
  byte_SB[1] = byte_SB[number[first]]
  if vocabulary.drops_space:  # a text never begins with one
    byte_SB[1, ord(' ')] = dead

  next_SC, class_V = _over_tokens(byte_SB, np.full(dead + 1, dead, np.int32), vocabulary)
  left_S = np.full(dead + 1, NEVER)
  left_S[[number[state] for state in ends]] = 0
  left_S[:2] = left_S[number[first]]
  while (shorter_S := np.minimum(left_S, left_S[next_SC].min(axis=1) + 1)).sum() < left_S.sum():
    left_S = shorter_S
  if left_S[0] >= NEVER:
    raise UsageError(f'nothing that this vocabulary can write matches {given}')
  return Automaton(next_SC, class_V, left_S)


@functools.lru_cache(maxsize=64)
def stopping(strings: tuple[str, ...], vocabulary: Any, prefixed: bool = False) -> Automaton:
  """Returns the automaton that ends (left_S is 0) once a text holds one of the strings.

  A state is how much of them the text ends with (Aho and Corasick 1975). Prefixed is what goes on
  from another text, so that a space it begins with is not dropped.
  """
  wanted = tuple(text.encode() for text in strings)
  parts = [text[:length] for text in wanted for length in range(1, len(text))]
  number = {part: state for state, part in enumerate(dict.fromkeys([b'', *parts]), start=2)}
  whole = len(number) + 2
  byte_SB = np.full((whole + 1, 256), whole, np.int32)
  for part, state in number.items():
    for byte in range(256):
      text = part + bytes([byte])
      if not text.endswith(wanted):
        byte_SB[state, byte] = next(
          number[text[i:]] for i in range(len(text) + 1) if text[i:] in number
        )
  byte_SB[1] = byte_SB[2]
  if vocabulary.drops_space and not prefixed:
    byte_SB[1, ord(' ')] = 1
  # What is no text is left out, or shown as a sign, after which all begins anew.
  none_S = np.arange(whole + 1, dtype=np.int32)
  if vocabulary.decode([vocabulary.unk_id]):
    none_S[2:whole] = 2
  left_S = np.ones(whole + 1, np.int32)
  left_S[whole] = 0
  return Automaton(*_over_tokens(byte_SB, none_S, vocabulary, prefixed), left_S)


def _over_tokens(
  byte_SB: np.ndarray, none_S: np.ndarray, vocabulary: Any, prefixed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Returns next_SC and class_V of an automaton over bytes; none_S comes after what is no text.

  State 0 is the start, where a space may be dropped, and 1 the start after that.
  """

  @functools.cache
  def after(text: bytes) -> np.ndarray:
    """Returns the state that a text leads to from each."""
    if not text:
      return np.arange(len(byte_SB), dtype=np.int32)
    return byte_SB[after(text[:-1]), text[-1]]

  classes = {none_S.tobytes(): 0}
  class_V = np.zeros(vocabulary.vocab_size, np.int32)
  for token, text in enumerate(vocabulary.token_texts()):
    if text:
      after_S = after(text).copy()
      first = text if prefixed or not vocabulary.drops_space else text.removeprefix(b' ')
      after_S[0] = after(first)[1]
      class_V[token] = classes.setdefault(after_S.tobytes(), len(classes))
  return np.stack([np.frombuffer(row, np.int32) for row in classes], axis=1), class_V
