"""The command `tnlayers`. Commands that need only a checkpoint start without Lightning's command line."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_modules.errors import FOR_USERS, OURS, raised_in
from lightning_modules.interrupts import TERMINATED, interruptible
from tnlayers.errors import UserError

__all__ = ["main"]

_LENGTH = 960
# The last of them says that a module lacks what a callback asks of it.
_MADE_BY_OPTIONS = ("lightning.", "torch.optim.", "torch.nn.modules.module")

_HELP = """usage: tnlayers COMMAND [options]      (tnlayers COMMAND --help lists a command's options)

Train networks with tensorized layers, or compress trained ones and retrain them.

  quickstart   train, compress and retrain a small CNN on scikit-learn's digits, in less than a minute
  compress     a checkpoint in; a smaller one, its configuration and a report out
  study        how compressible a trained net is: every cut of every layer truncated, measured and retrained
  fit          train: from scratch, or a compressed checkpoint
  test         accuracy on the test pictures
  validate     accuracy on the validation pictures
  predict      a class and its probability for every test picture, as predictions.csv
  report       the per-layer table of a checkpoint
  export       a checkpoint's net as .safetensors, with its structure
  methods      the table of factorizations: layers, weights, ranks, options, papers

example: tnlayers compress -c configs/experiment/cifar10_resnet20.yaml --checkpoint resnet20.th --out runs/tucker
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 for a user's error, which is one line on stderr; 130 after Ctrl-C; 141 where its output is read no more; 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    try:
        with _terminable(), interruptible():
            code = _command(arguments[0])(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print("tnlayers: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 141
        users = _users_error(error)
        if users is None:
            raise
        print(f"tnlayers: error: {_one_line(users)}", file=sys.stderr)
        return 2


def _unread() -> bool:
    """Whether whoever read the output has enough of it, as `head` has."""
    try:
        print(flush=True)  # whether or not what broke was already taken out of the buffer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try once more, and complain
        return True
    return False


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command at once and silently, wherever nothing else is said of it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(name: str) -> Callable[[list[str]], int]:
    if name in ("fit", "validate", "test", "predict", "compress", "study", "-c", "--config"):
        from lightning_modules.lightning_cli import run

        return run
    if name in ("quickstart", "report", "export", "methods"):
        from lightning_modules.commands import run as run_plain

        return run_plain
    import difflib

    known = ("quickstart", "compress", "study", "fit", "test", "validate", "predict", "report", "export", "methods")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"
    raise UserError(f"unknown command {name!r}{hint}")


def _users_error(error: BaseException | None) -> BaseException | None:
    """The message to the user among an error and its causes; None where it is a bug, which keeps its traceback.

    It is one if our packages, or Lightning, raised it, of a kind that is raised for users; libraries wrap it in theirs.
    """
    from jsonargparse import ArgumentError

    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for packages in (OURS, ("lightning",)):
        for link in chain:
            # A kind of error that is ours may be raised by others: torch does it with what a worker raised.
            ours = {raised_in(link), type(link).__module__.partition(".")[0]}
            if isinstance(link, FOR_USERS) and not ours.isdisjoint(packages):
                return link
    refused = (ArgumentError, MemoryError)
    found = next(
        (link for link in chain if isinstance(link, refused) or _is_misconfiguration(link) or _is_disk(link)), None
    )
    return found or next((_Refused(link) for link in chain if _by_options_alone(link)), None)


class _Refused(Exception):
    """An error of a library in what it was made of by options."""

    def __str__(self) -> str:
        error = self.args[0]
        place = _places(error)[-1]
        name = type(place["self"]).__name__ if "self" in place else place["__name__"]
        return f"{name} does not work with the options given to it, {type(error).__name__}: {error}"


def _by_options_alone(error: BaseException) -> bool:
    """Whether Lightning or an optimizer stopped where no line of ours had called it: only options have made it what it is.

    What torch's other parts raise may be about tensors that are ours, also where none of our lines is (a backward pass).
    """
    names = [place["__name__"] for place in _places(error)]
    entered = next((number for number, name in enumerate(names) if name.startswith("lightning.pytorch.trainer.")), None)
    if entered is None or isinstance(error, AssertionError):
        return False
    called = {name.partition(".")[0] for name in names[entered:]}
    return called.isdisjoint(OURS) and names[-1].startswith(_MADE_BY_OPTIONS)


def _places(error: BaseException) -> list[dict[str, Any]]:
    """The functions on the way to an error, outermost first: their module's name, and `self` where they have one."""
    found, place = [], error.__traceback__
    while place is not None:
        frame = place.tb_frame
        own = {"self": frame.f_locals["self"]} if "self" in frame.f_locals else {}
        found.append({"__name__": frame.f_globals.get("__name__", ""), **own})
        place = place.tb_next
    return found


def _one_line(error: BaseException) -> str:
    """Of bounded length: the beginning says what and where, the end how to mend it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH // 2]} ... {text[-_LENGTH // 2 + 5 :]}"


def _is_disk(error: BaseException) -> bool:
    """Whether a disk is full or may only be read, whoever comes upon it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _is_misconfiguration(error: BaseException) -> bool:
    return type(error).__name__ == "MisconfigurationException"  # Lightning's; importing it would take seconds


if __name__ == "__main__":
    sys.exit(main())
