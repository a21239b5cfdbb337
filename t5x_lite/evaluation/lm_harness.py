"""A model as EleutherAI's lm-evaluation-harness (the package lm-eval) takes it: its tasks, ours.

As its `hf` model does, the encoder reads a context and EOS, and continuations have no EOS.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM

from t5x_lite.errors import UsageError


class LanguageModel(TemplateLM):
  """What `lm_eval.simple_evaluate(model=...)` takes, of an encoder-decoder `t5x_lite.Model`.

  It reads batch_size inputs at a time, cut to max_length tokens.
  """

  backend = 'seq2seq'

  def __init__(self, model: Any, *, batch_size: int = 16, max_length: int = 1024):
    super().__init__()
    if not model.config.has_encoder:
      raise UsageError('the harness asks for outputs to inputs: give an encoder-decoder')
    self.model, self.batch_size, self.max_length = model, batch_size, max_length

  @property
  def eot_token_id(self) -> int:
    """What ends a text, and is read where there is no context."""
    return self.model.config.eos_id

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Returns ids, with EOS by default."""
    ids = self.model.vocabulary.encode(string)
    return ids if add_special_tokens is False else [*ids, self.eot_token_id]

  def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
    read, wanted = ([one[k][-self.max_length :] for one in requests] for k in (1, 2))
    found = self.model._score_rows(read, wanted, self.batch_size, matches=True)
    return [(float(score), bool(match)) for score, match in found]

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-probability of each text, in windows of max_length."""
    scores = []
    for request in requests:
      ids = self.tok_encode(request.args[0])
      windows = utils.get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
      pairs = [('', *utils.make_disjoint_window(window)) for window in windows]
      scores.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
    return scores

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    """Returns an output for each context, cut before the first of the task's `until`."""
    found: list[str] = []
    for given, alike in itertools.groupby(requests, lambda request: request.args[1]):
      settings = {'stop_strings': given.get('until', ()), **given}
      length = settings.pop('max_gen_toks', 256)
      settings.pop('until', None)
      if not settings.pop('do_sample', False):
        settings['temperature'] = 0.0
      limits = {'max_input_tokens': self.max_length, 'batch_size': self.batch_size}
      inputs = [request.args[0] for request in alike]
      found += self.model.generate(inputs, max_new_tokens=length, **limits, **settings)
    return found
