"""Exceptions that stand for what a user can mend, not for bugs, and the commonest checks."""

from collections.abc import Iterable


class UsageError(ValueError):
  """A setting, file or argument that cannot work, told in one line.

  The message names the offending value, what is allowed and how to fix it;
  the command line prints it alone and exits with code 2.
  """


class DamagedError(UsageError):
  """What is read is not what was written."""


def check_one_of(name: str, value: object, allowed: Iterable[object]) -> None:
  """Refuses a setting that is none of those that there are."""
  if value not in allowed:
    raise UsageError(f'{name} is {value!r}; allowed are {", ".join(map(str, allowed))}')


def check_positive(name: str, value: int | None) -> None:
  """Refuses a count or period below 1; None stands for no bound."""
  if value is not None and value < 1:
    raise UsageError(f'{name} is {value}; it must be at least 1')
