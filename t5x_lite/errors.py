"""The one exception that stands for a mistake of the user, not of the code."""


class UsageError(ValueError):
  """A setting, file or argument that cannot work, told in one line.

  The message names the offending value, what is allowed and how to fix it;
  the command line prints it alone and exits with code 2.
  """
