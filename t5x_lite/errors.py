"""Exceptions that stand for what a user can mend, not for bugs; and how settings are checked."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any


class UsageError(ValueError):
  """A setting, file or argument that cannot work, told in one line.

  The message names the offending value, what is allowed and how to fix it;
  the command line prints it alone and exits with code 2.
  """


class DamagedError(UsageError):
  """What is read is not what was written."""


def check_fields(config: Any, **rules: tuple[Any, str]) -> None:
  """Raises UsageError for the first field that is wrong: (is it right, what it must be) by name."""
  for name, (right, allowed) in rules.items():
    if not right:
      field = f'{type(config).__name__}.{name}'
      raise UsageError(f'{field} is {getattr(config, name)!r}; it must be {allowed}')


def suggest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
  """Returns '; did you mean ...?', or nothing."""
  close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=cutoff)
  return f'; did you mean {" or ".join(close)}?' if close else ''


def check_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
  """Refuses a choice that there is not, naming those there are, and the closest ones."""
  if value not in allowed:
    hint = suggest(value.lower(), allowed)
    raise UsageError(f'{name} is {value!r}; allowed: {", ".join(sorted(allowed))}{hint}')


def check_positive(name: str, value: int | None) -> None:
  """Refuses a count or period below 1; None stands for no bound."""
  if value is not None and value < 1:
    raise UsageError(f'{name} is {value}; it must be at least 1')


def first_line(error: BaseException) -> str:
  """Returns the first line of an error: XLA's run to pages."""
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextlib.contextmanager
def refusing(what: str, *kinds: type[Exception]) -> Iterator[None]:
  """Turns an exception of one of these kinds into a UsageError: `what`, and why in one line."""
  try:
    yield
  except kinds as error:
    told = error if isinstance(error, UsageError) else first_line(error)
    raise UsageError(f'{what}: {getattr(error, "strerror", None) or told}') from error
