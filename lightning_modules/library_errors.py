"""Errors that a user's options have caused in libraries and classes, told as errors of the user.

No other file reads the frames of a traceback.
"""

import traceback
from typing import Any

from tnlayers.errors import UserError

__all__ = ["LIBRARIES", "made_of_options", "refusal_in_a_run"]

LIBRARIES = ("lightning", "torch", "torchvision", "timm", "wandb")
_NEVER_OURS = (
    "lightning.",
    "torch.optim.",
    "torch.nn.modules.module",
)  # the last says that a module lacks an attribute


def made_of_options(kind: type, *args: Any, **options: Any) -> Any:
    """Makes an object of a class that a configuration names.

    Libraries refuse options by whatever kind of error they come upon. A class of ours, or of a user's own, does it by a ValueError,
    which may come from a bug of its own too, so the line that raised it is named; what else leaves its constructor is a bug there.

    Raises:
        UserError: the class does not take the options.
    """
    library = kind.__module__.partition(".")[0] in LIBRARIES
    refused = Exception if library else ValueError
    try:
        return kind(*args, **options)
    except UserError:
        raise
    except refused as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if library else f" ({last.filename}, line {last.lineno})"
        raise UserError(f"{kind.__name__} cannot be made with the options {given}: {error}{where}") from error


def refusal_in_a_run(error: BaseException) -> UserError | None:
    """Returns the message for an error that a library raised because of its options; None for any other error.

    That is so where nothing but libraries lies between the trainer and the line that raised the error: a scheduler divides by a
    step of zero, a callback asks for what the module lacks. Errors about tensors may be anybody's, whoever raises them. Libraries
    raise errors of any kind for this, so the frames alone tell theirs from a bug in code that they call.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__")) for frame in frames]
    begin = next((place for place, name in enumerate(names) if name.startswith("lightning.pytorch.trainer.")), None)
    if begin is None or isinstance(error, AssertionError) or not names[-1].startswith(_NEVER_OURS):
        return None
    if any(name.partition(".")[0] not in (*LIBRARIES, "contextlib") for name in names[begin:]):
        return None
    last = next(frame for frame, name in reversed(list(zip(frames, names, strict=True))) if name != _NEVER_OURS[-1])
    refusing = last.f_code.co_qualname.partition(".")[0]
    return UserError(f"{refusing} does not work with the options given to it, {type(error).__name__}: {error}")
