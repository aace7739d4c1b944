"""Errors of libraries that a user's options have caused, told as errors of the user."""

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

    Libraries refuse options by whatever kind of error they come upon. A class of ours, or of a user's own, does it by a ValueError;
    what else leaves its constructor is a bug there.

    Raises:
        UserError: the class does not take the options.
    """
    package = kind.__module__.partition(".")[0]
    refused = Exception if package in LIBRARIES else ValueError
    try:
        return kind(*args, **options)
    except UserError:
        raise
    except refused as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise UserError(f"{kind.__name__} cannot be made with the options {given}: {error}") from error


def refusal_in_a_run(error: BaseException) -> UserError | None:
    """Returns what to tell the user where a library refused, in the middle of a run, what options have made of it.

    That is so where nothing but libraries lies between the trainer and the line that raised the error: a scheduler divides by a
    step of zero, a callback asks for what the module lacks. Errors about tensors may be anybody's, whoever raises them.
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
