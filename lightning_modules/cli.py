"""The command `tnlayers`. Commands that need only a checkpoint start without Lightning's command line."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lightning_modules.ctrl_c import TERMINATED, interruptible

__all__ = ["main"]

_LENGTH = 960
# By name, since importing Lightning and torch would take seconds.
_TOLD = {"ArgumentError", "MemoryError", "MisconfigurationException", "OutOfMemoryError"}

_COMMANDS = {
    "quickstart": "train, compress and retrain a small CNN on scikit-learn's digits, in less than a minute",
    "compress": "a checkpoint in; a smaller one, its configuration and a report out",
    "study": "how compressible a trained net is: every cut of every layer truncated, measured and retrained",
    "fit": "train: from scratch, or a compressed checkpoint",
    "test": "accuracy on the test pictures",
    "validate": "accuracy on the validation pictures",
    "predict": "a class and its probability for every test picture, as predictions.csv",
    "report": "the per-layer table of a checkpoint",
    "export": "a checkpoint's net as .safetensors, with its structure",
    "methods": "the table of factorizations: layers, weights, ranks, options, papers",
    "configs": "the configurations that -c takes by name, or one of them: tnlayers configs experiment/digits",
}
_PLAIN = ("quickstart", "report", "export", "methods", "configs")
_HELP = f"""usage: tnlayers COMMAND [options]      (tnlayers COMMAND --help lists a command's options)

Train networks with tensorized layers, or compress trained ones and retrain them.

{"".join(f"  {name:11}  {text}{chr(10)}" for name, text in _COMMANDS.items())}
example: tnlayers compress -c experiment/cifar10_resnet20 --checkpoint resnet20.th --out runs/tucker
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
        line = _told_in_one_line(error)
        if line is None:
            raise
        print(f"tnlayers: error: {line}", file=sys.stderr)
        return 2


def _unread() -> bool:
    """Returns whether whoever read the output has enough of it, as `head` has."""
    try:
        print(flush=True)  # whether or not what broke was already taken out of the buffer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try once more, and complain
        return True
    return False


@contextmanager
def _terminable() -> Iterator[None]:
    """Ends the command at once and silently at a SIGTERM, wherever nothing else is said of it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(name: str) -> Callable[[list[str]], int]:
    if name in _PLAIN:
        from lightning_modules.commands import run as run_plain

        return run_plain
    if name in (*_COMMANDS, "-c", "--config"):
        from lightning_modules.lightning_cli import run

        return run
    import difflib

    from tnlayers.errors import UserError

    near = difflib.get_close_matches(name, _COMMANDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(_COMMANDS)}"
    raise UserError(f"unknown command {name!r}{hint}")


def _told_in_one_line(error: BaseException | None) -> str | None:
    """Returns the line for the user where an error, or one that it was raised from, is a user's; None where it is a bug."""
    from tnlayers.errors import UserError, message

    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__  # not its context: code that handles an error may have a bug of its own
    told: list[BaseException] = [link for link in chain if isinstance(link, UserError)]
    told = told or [link for link in chain if _is_of_use(link)]
    if not told:
        return None
    line = message(told[0])
    # The beginning of a long one says what and where, its end how to mend it.
    return line if len(line) <= _LENGTH else f"{line[: _LENGTH // 2]} ... {line[-_LENGTH // 2 + 5 :]}"


def _is_of_use(error: BaseException) -> bool:
    """Returns whether a library's error tells a user what to do: an option is wrong, or the memory or a disk is full."""
    names = {base.__name__ for base in type(error).__mro__}
    full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return full_disk or not names.isdisjoint(_TOLD)


if __name__ == "__main__":
    sys.exit(main())
