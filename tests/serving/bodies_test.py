"""What is true of answers is checked by tests/programs/serve_test.py, of a server that runs."""

import pydantic
import pytest

from t5x_lite.serving import bodies, guard


def test_every_error_that_is_sent_is_described():
  assert set(guard.STATUS.values()) | {401, 408, 413, 500} == set(bodies.ERRORS)
  model = bodies.ERRORS[429]['model']
  assert model.model_validate(guard.error_body(429, 'full')).error.message == 'full'


def test_a_field_that_is_not_there_is_refused_and_openais_others_are_looked_at():
  with pytest.raises(pydantic.ValidationError, match='warmth'):
    bodies.GenerateBody(inputs='a', warmth=1.0)
  for wrong in ({'temperature': float('nan')}, {'top_p': 1e-300}, {'top_p': float('nan')}):
    for body, text in ((bodies.GenerateBody, 'inputs'), (bodies.CompletionBody, 'prompt')):
      with pytest.raises(pydantic.ValidationError, match=next(iter(wrong))):
        body(**{text: 'a', **wrong})
  assert bodies.CompletionBody(prompt='a', logprobs=3).logprobs == 3
