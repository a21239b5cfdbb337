"""DecodingConfig: how output tokens are chosen, flat, so that gin and flags can set it."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

from t5x_lite.errors import UsageError, check_fields

DEFAULT_LENGTH = 128
INF = float('inf')
_FROM_0, _FROM_1, _UP_TO_1, _WITHIN_1 = (
  (0, INF, '0 or more'),
  (1, INF, 'at least 1'),
  (1e-9, 1.0, 'above 0 and at most 1'),
  (0.0, 1.0, '0 to 1'),
)
_BOUNDS: dict[str, tuple[float, float, str]] = {
  **dict.fromkeys(('max_decode_length', 'num_beams', 'num_return_sequences'), _FROM_1),
  **dict.fromkeys(('num_beam_groups', 'draft_tokens'), _FROM_1),
  **dict.fromkeys(('min_new_tokens', 'top_k', 'no_repeat_ngram_size', 'best_of'), _FROM_0),
  **dict.fromkeys(('min_p', 'epsilon_cutoff', 'eta_cutoff'), _WITHIN_1),
  **dict.fromkeys(('top_p', 'typical_p'), _UP_TO_1),
  # float32 holds what is made of these.
  'temperature': (0.0, 1e4, '0 (greedy) or positive, up to 10,000'),
  'repetition_penalty': (1e-4, 1e4, '0.0001 to 10,000'),
  'frequency_penalty': (-1e4, 1e4, '-10,000 to 10,000'),
  'diversity_penalty': (0.0, 1e4, '0 to 10,000'),
  **dict.fromkeys(('length_penalty', 'brevity_alpha'), (-10.0, 10.0, '-10 to 10')),
}
_OF_SAMPLING = ('top_k', 'top_p', 'min_p', 'typical_p', 'epsilon_cutoff', 'eta_cutoff', 'best_of')
# What says which outputs there are, and what forbids tokens without regard to that.
_LIMITS = ('regex', 'json_schema', 'labels', 'allowed_outputs')
_HIDING = ('min_new_tokens', 'no_repeat_ngram_size', 'forbidden_words', 'forbidden_tokens')
_HIDING += ('forced_bos_id', 'forced_eos_id')
_IDS = ('max_decode_length', 'forced_bos_id', 'forced_eos_id')
_EARLY_STOPPING = {'false': False, 'true': True, 'never': 'never'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
  """How tokens are chosen; names and meanings are those of transformers' `generate`.

  Attributes:
    max_decode_length: most new tokens, EOS included; None for as many as in training, or 128.
    min_new_tokens: no end of sequence before this many new tokens.
    temperature: 0 is greedy; otherwise logits are divided by it and sampled.
    top_k: sample among the k likeliest tokens; 0 means all.
    top_p: sample among the fewest tokens whose probability reaches p; 1 means all.
    min_p: sample among tokens at least this many times as likely as the likeliest.
    typical_p: sample among the most ordinary tokens that reach p (Meister et al. 2022); 1 is all.
    epsilon_cutoff: sample among tokens of at least this probability (Hewitt et al. 2022).
    eta_cutoff: as epsilon_cutoff, but lower where the distribution is flat.
    repetition_penalty: divides positive logits of tokens read already, multiplies negative ones.
    frequency_penalty: taken from a logit as often as its token has been written.
    no_repeat_ngram_size: no n-gram of this size twice; 0 means off.
    forced_bos_id: the first new token; None for a free choice.
    forced_eos_id: the token at max_decode_length; None for a free choice.
    forbidden_tokens: sequences of ids that may not be written.
    forbidden_words: texts that may not be written, as the vocabulary encodes each.
    allowed_outputs: sequences of ids, without the end of sequence: the only outputs there can be.
    labels: texts, the only outputs there can be.
    regex: what a whole output is to match, without ^, $, look-around and back-references.
    json_schema: the same by a schema, as text: an output is JSON of this form.
    automaton: the `automaton.Automaton` of these two, by `resolved`.
    stop_strings: an output ends with the first of these, and the text is cut before it.
    stopper: the `automaton.Automaton` of these, by `resolved`.
    num_beams: hypotheses of beam search; 1 is greedy or sampling.
    length_penalty: rank by log-probability / length**length_penalty; above 0 favours long outputs.
    brevity_alpha: rank by log-probability / ((5 + length) / 6)**alpha instead, as T5X does (the
      paper: 0.6); None for length_penalty.
    early_stopping: True stops an input's search at num_beams finished hypotheses; False when no
      running one is better now; 'never' when none can become better.
    draft_tokens: what a draft proposes at a time, where there is one.
    num_beam_groups: parts that the beams are searched in, each unlike those before it.
    diversity_penalty: taken from a log-probability as often as groups before write its token there.
    num_return_sequences: outputs for each input: the best beams, or samples.
    best_of: draw this many samples and return the best by length-normalised score.
  """

  max_decode_length: int | None = None
  min_new_tokens: int = 0
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  typical_p: float = 1.0
  epsilon_cutoff: float = 0.0
  eta_cutoff: float = 0.0
  repetition_penalty: float = 1.0
  frequency_penalty: float = 0.0
  no_repeat_ngram_size: int = 0
  forced_bos_id: int | None = None
  forced_eos_id: int | None = None
  forbidden_tokens: tuple[tuple[int, ...], ...] = ()
  forbidden_words: Sequence[str] = ()
  allowed_outputs: tuple[tuple[int, ...], ...] = ()
  labels: Sequence[str] = ()
  regex: str = ''
  json_schema: str = ''
  automaton: Any = None
  stop_strings: Sequence[str] = ()
  stopper: Any = None
  num_beams: int = 1
  length_penalty: float = 1.0
  brevity_alpha: float | None = None
  early_stopping: bool | str = False
  draft_tokens: int = 4
  num_beam_groups: int = 1
  diversity_penalty: float = 0.0
  num_return_sequences: int = 1
  best_of: int = 0

  def __post_init__(self):
    # gin and JSON hand over lists; the config must stay hashable.
    for name in ('forbidden_words', 'labels', 'stop_strings'):
      value = getattr(self, name)
      listed = isinstance(value, Sequence)
      texts = (value,) if isinstance(value, str) else tuple(value) if listed else ()
      # Without half a surrogate pair, which no vocabulary can encode.
      whole = (isinstance(x, str) and x == x.encode(errors='ignore').decode() != '' for x in texts)
      check_fields(self, **{name: (listed and all(whole), 'Unicode texts that are not empty')})
      object.__setattr__(self, name, texts)
    for name in ('regex', 'json_schema'):
      check_fields(self, **{name: (isinstance(getattr(self, name), str), 'a text')})
    for name in ('forbidden_tokens', 'allowed_outputs'):
      try:
        rows = tuple((i,) if isinstance(i, int) else tuple(i) for i in getattr(self, name))
      except TypeError:
        rows = ((),)
      ids = all(isinstance(i, numbers.Integral) for row in rows for i in row)
      check_fields(self, **{name: (all(rows) and ids, 'sequences of at least one id')})
      object.__setattr__(self, name, rows)
    for name, field in self.__dataclass_fields__.items():
      whole, value = type(field.default) is int or name in _IDS, getattr(self, name)
      number = isinstance(value, numbers.Integral if whole else numbers.Real)
      if whole or type(field.default) is float or name == 'brevity_alpha':
        what = f'a {"whole " * whole}number'
        check_fields(self, **{name: (number or value is field.default, what)})
    for name, (least, most, allowed) in _BOUNDS.items():
      value = getattr(self, name)
      check_fields(self, **{name: (value is None or least <= value <= most, allowed)})
    stop = _EARLY_STOPPING.get(str(self.early_stopping).lower())
    check_fields(self, early_stopping=(stop is not None, "True, False or 'never'"))
    object.__setattr__(self, 'early_stopping', stop)
    fine = self.min_new_tokens <= self.length
    check_fields(self, min_new_tokens=(fine, f'at most max_decode_length, {self.length}'))
    if self.temperature == 0.0:
      why = 'but temperature is 0, which is greedy and draws nothing: set temperature=1.0 to sample'
      self._refuse(_OF_SAMPLING, why)
    elif self.num_beams > 1:
      self._refuse(['num_beams'], 'but with a temperature: beams are searched, not sampled')
    if self.num_beams == 1:
      ranks = () if self.best_of else ('length_penalty', 'brevity_alpha')
      self._refuse((*ranks, 'early_stopping'), 'but num_beams is 1: it ranks beams')
    fine = self.num_beams % self.num_beam_groups == 0
    check_fields(self, num_beam_groups=(fine, f'a divisor of num_beams, {self.num_beams}'))
    fine = (self.num_beam_groups > 1) == (self.diversity_penalty > 0)
    check_fields(self, diversity_penalty=(fine, 'above 0 with num_beam_groups above 1, and else 0'))
    if limits := [name for name in _LIMITS if getattr(self, name)]:
      self._refuse((*limits[1:], *_HIDING), f'but {limits[0]} is set too, which may leave no token')
    if self.brevity_alpha is not None:
      self._refuse(['length_penalty'], 'but brevity_alpha is set too: choose one of them')
    if rows := self.allowed_outputs:
      most = max(map(len, rows))
      fine = most < self.length and (
        self.num_beams == 1 or self.num_return_sequences <= len({*rows})
      )
      what = f'as many as num_return_sequences, and with the end within {self.length} tokens'
      check_fields(self, allowed_outputs=(fine, what))
    samples = self.num_beams == 1 and not self.best_of and self.temperature
    most = INF if samples else max(self.num_beams, self.best_of)
    fine = self.num_return_sequences <= most
    check_fields(self, num_return_sequences=(fine, f'at most {most}, as many as there are'))

  def _refuse(self, names: Sequence[str], why: str) -> None:
    """Refuses a field that has been changed."""
    for name in names:
      if getattr(self, name) != self.__dataclass_fields__[name].default:
        raise UsageError(f'DecodingConfig.{name} is {getattr(self, name)}, {why}')

  @property
  def length(self) -> int:
    """Most new tokens."""
    return DEFAULT_LENGTH if self.max_decode_length is None else self.max_decode_length

  @property
  def rows_per_input(self) -> int:
    """Beams or samples that are decoded for each input."""
    return max(self.num_beams, self.best_of, self.num_return_sequences)

  @property
  def normalization(self) -> str:
    """Says what a score is, for whoever reads it."""
    less = ' less penalties' if self.diversity_penalty else ''
    total = f'sum of log-probabilities{less}'
    if self.num_beams == 1 and not self.best_of:
      return total
    if self.brevity_alpha is not None:
      return f'{total} / ((5 + length) / 6)**{self.brevity_alpha:g}'
    return f'{total} / length**{self.length_penalty:g}' if self.length_penalty else total

  def normalized(self, total: Any, length: Any) -> Any:
    """Returns what outputs are ranked by, of the sum over `length` new tokens (a float)."""
    if self.brevity_alpha is not None:  # t5x/decoding.py:723, Wu et al. 2016
      return total / ((5.0 + length) / 6.0) ** self.brevity_alpha
    return total / length**self.length_penalty

  def resolved(
    self, vocabulary: Any, max_decode_length: int | None = None, *, prefixed: bool = False
  ) -> 'DecodingConfig':
    """Returns the config with ids for texts, and a length where it names none.

    The vocabulary is a `data.vocabularies.Vocabulary` or None; prefixed outputs go on from a text.
    UsageError if texts need one, no output matches the regex or schema, or none is short enough.
    """
    if vocabulary is None:
      for name in ('labels', 'forbidden_words', 'regex', 'json_schema'):
        self._refuse([name], 'but there is no vocabulary')
    words, labels = (
      tuple(tuple(vocabulary.encode(text)) for text in texts)
      for texts in (self.forbidden_words, self.labels)
    )
    stopper, automaton = self.stopper, self.automaton
    length = self.max_decode_length or max_decode_length
    from t5x_lite.decoding import automaton as automata  # `--help` shall not wait for numpy

    if self.stop_strings and getattr(vocabulary, 'unk_id', None) is not None:  # it has texts
      stopper = automata.stopping(self.stop_strings, vocabulary, prefixed)
    if self.regex or self.json_schema:
      automaton = automata.compiled(self.regex, self.json_schema, vocabulary)
      fine = (length or DEFAULT_LENGTH) > automaton.left_S[0]
      why = f'above the {automaton.left_S[0]} tokens of the shortest output that matches'
      given = dataclasses.replace(self, max_decode_length=length)
      check_fields(given, max_decode_length=(fine, why))
    return dataclasses.replace(
      self,
      max_decode_length=length,
      labels=(),
      forbidden_words=(),
      regex='',
      json_schema='',
      automaton=automaton,
      stopper=stopper,
      allowed_outputs=self.allowed_outputs + labels,
      forbidden_tokens=self.forbidden_tokens + words,
    )

  def cut(self, text: str, start: int = 0) -> str:
    """Returns a text up to the first stop string at `start` or later."""
    found = [at for s in self.stop_strings if (at := text.find(s, start)) >= 0]
    return text[: min(found, default=len(text))]


def decoding_config(max_new_tokens: int, /, **settings: Any) -> DecodingConfig:
  """Returns the config that the Python interface's arguments mean; UsageError for others."""
  known = {field.name for field in dataclasses.fields(DecodingConfig)}
  known -= {'max_decode_length', 'automaton', 'stopper'}
  for name in settings:
    if name not in known:
      raise UsageError(f'{name!r} is no setting of decoding; there are {", ".join(sorted(known))}')
  return DecodingConfig(max_decode_length=max_new_tokens, **settings)
