"""The errors that are told to whoever gave something, rather than to whoever wrote the program."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CheckpointError", "UnsupportedLayer", "UserError", "about", "as_checkpoint_error", "message", "shortened"]

_LENGTH = 400


class UserError(ValueError):
    """Something that was given cannot be; the message names it, says what was expected and how to mend it.

    The command line shows it in one line and ends with exit code 2. Any other exception is a bug, and keeps its traceback.
    """


class UnsupportedLayer(UserError):
    """A dense layer that a method cannot replace; the message names the argument."""


class CheckpointError(UserError):
    """A file that cannot be read, or does not fit the model; the message says which keys and why."""


class _Place(str):
    """A note on what an error is about, as told from the notes that other libraries add."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Adds what the block works on (a layer, a rule, an epoch) to every error that leaves it.

    A user's error begins with it; a bug keeps its own words and gets a note.
    """
    try:
        yield
    except UserError as error:
        error.args = (f"{what}: {error}",)
        raise
    except Exception as error:
        error.add_note(_Place(what))
        raise


@contextmanager
def as_checkpoint_error(what: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """Turns errors that leave this block into those of a checkpoint, in a message of bounded length.

    Args:
        what: what the message begins with.
        kind: the errors that are the file's fault. All others, such as those of a bug of ours, pass.
    """
    try:
        yield
    except kind as error:
        raise CheckpointError(f"{what}: {shortened(str(error), _LENGTH)}") from error


def message(error: BaseException) -> str:
    """Returns an error as one line: what it is about, then what it says, or its type where it says nothing."""
    places = [note for note in reversed(getattr(error, "__notes__", [])) if isinstance(note, _Place)]
    return " ".join(": ".join([*places, str(error) or type(error).__name__]).split())


def shortened(text: str, most: int) -> str:
    """Returns a text for messages: what a file brings may be long, and may hold what a terminal would obey."""
    text = text[: most + 1]
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= most else f"{shown[:most]}..."
