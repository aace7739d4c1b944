"""The errors that are told to whoever gave something, rather than to whoever wrote the program."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Something that was given cannot be; the message names it, says what was expected and how to mend it.

    The command line shows it in one line and ends with exit code 2. Any other exception is a bug, and keeps its traceback.
    """
