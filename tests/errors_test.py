import pytest

from t5x_lite import errors


def test_refusing_makes_usage_errors_of_some_kinds_alone():
  wrong = errors.refusing('a.json is not JSON', ValueError, OSError)
  with pytest.raises(errors.UsageError, match=r'^a\.json is not JSON: no comma$') as caught, wrong:
    raise ValueError('no comma\nin line 2')
  assert isinstance(caught.value.__cause__, ValueError)
  with pytest.raises(KeyError), errors.refusing('a.json is not JSON', ValueError):
    raise KeyError('a')


@pytest.mark.parametrize(
  ('error', 'told'),
  [
    (errors.UsageError('x' * 400), 'x' * 400),  # names all that is allowed
    (OSError(28, 'no space', 'b.json'), 'no space'),  # the path is in the message
    (ValueError('y' * 400), 'y' * 300),
    (ValueError(), 'ValueError'),
  ],
)
def test_what_refusing_tells_of_an_error(error, told):
  with pytest.raises(errors.UsageError, match=f'^a: {told}$'), errors.refusing('a', Exception):
    raise error
