"""Whose an error is: a user's, who is told in one line, or a bug, which keeps its traceback."""

import dis

__all__ = ["FOR_USERS", "OURS", "is_bug", "raised_in"]

OURS = ("tnlayers", "lightning_modules")
FOR_USERS = (ValueError, OSError, ArithmeticError)
"""The kinds of errors that our packages raise for users."""


def raised_in(error: BaseException) -> str | None:
    """The package whose `raise` statement an error comes from; None where Python itself raised it."""
    package, stated = _origin(error)
    return package if stated else None


def is_bug(error: BaseException, *packages: str) -> bool:
    """Whether an error in a call with a user's options is none of the options' own.

    Libraries refuse values in whatever way they come upon them. Our packages, and the others that are named, do so by a `raise`;
    what Python itself raises in a line of theirs is a bug. The call's own line alone stands for a signature that does not
    match.

    Args:
        error: caught in the function that made the call.
        packages: further ones that are no libraries.
    """
    place = error.__traceback__
    if place is None or place.tb_next is None:
        return False
    package, stated = _origin(error)
    if package in OURS:
        return not (stated and isinstance(error, FOR_USERS))
    return package in packages and not stated


def _origin(error: BaseException) -> tuple[str | None, bool]:
    """The package of the line that an error comes from, and whether that line is a `raise` statement."""
    last = error.__traceback__
    if last is None:
        return None, False
    while last.tb_next is not None:
        last = last.tb_next
    stated = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return last.tb_frame.f_globals.get("__name__", "").partition(".")[0], stated
