"""The errors that are told to whoever gave something, rather than to whoever wrote the program."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CheckpointError", "UnsupportedLayer", "UserError", "about", "as_checkpoint_error", "message", "shortened"]

_LENGTH = 400


class UserError(ValueError):
    """Something that was given cannot be; the message names it, says what was expected and how to mend it.

    The command line shows it in one line and ends with exit code 2. Any other exception is a bug, and keeps its traceback.
    """

    def add_note(self, note: str, /) -> None:
        """Puts the note in front of the message, which says what it is about and stays one line."""
        self.args = (f"{note}: {self}",)


class UnsupportedLayer(UserError):
    """A dense layer that a method cannot replace; the message names the argument."""


class CheckpointError(UserError):
    """A file that cannot be read, or does not fit the model; the message says which keys and why."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Errors that leave this block say what they are about: a layer, a rule, an epoch."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


@contextmanager
def as_checkpoint_error(what: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turns errors that leave this block into those of a checkpoint, in a message of bounded length."""
    try:
        yield
    except kind as error:
        raise CheckpointError(f"{what}: {shortened(str(error), _LENGTH)}") from None


def message(error: BaseException) -> str:
    """Returns an error as one line: what it is about, then what it says, or its type where it says nothing."""
    notes = reversed(getattr(error, "__notes__", []))
    return " ".join(": ".join([*notes, str(error) or type(error).__name__]).split())


def shortened(text: str, most: int) -> str:
    """Returns a text for messages: what a file brings may be long, and may hold what a terminal takes for commands."""
    text = text[: most + 1]
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= most else f"{shown[:most]}..."
