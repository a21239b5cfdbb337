"""Exceptions that stand for what a user can mend, not for bugs."""


class UsageError(ValueError):
  """A setting, file or argument that cannot work, told in one line.

  The message names the offending value, what is allowed and how to fix it;
  the command line prints it alone and exits with code 2.
  """


class DamagedError(UsageError):
  """What is read is not what was written."""
