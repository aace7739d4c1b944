"""Interruption by Ctrl-C, wherever it comes."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["TERMINATED", "interruptible"]

TERMINATED = 143
"""The exit code after SIGTERM."""
_SECONDS = 0.01


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the block by KeyboardInterrupt, whatever libraries make of it.

    Python lets no exception out of a weak reference's callback or a `__del__`: while matplotlib draws, one Ctrl-C in twenty
    comes in one of them, and would be lost. It is sent again right after, as a SIGTERM is. Compiled code may raise an error of its own
    instead, and Lightning makes an exit code of 1 of it: KeyboardInterrupt takes their place. Where SIGINT is ignored, as in a
    shell's background jobs, or somebody else's, it stays so.
    """
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if before is not signal.default_int_handler:
        yield
        return
    noted, again = False, list[threading.Timer]()

    def note(*_: Any) -> None:
        nonlocal noted
        noted = True
        raise KeyboardInterrupt

    def send_again(lost: "sys.UnraisableHookArgs") -> None:
        terminated = isinstance(lost.exc_value, SystemExit) and lost.exc_value.code == TERMINATED
        if not (terminated or issubclass(lost.exc_type, KeyboardInterrupt)):
            return hook(lost)
        number = signal.SIGTERM if terminated else signal.SIGINT
        again.append(threading.Timer(_SECONDS, signal.raise_signal, [number]))
        again[-1].start()

    signal.signal(signal.SIGINT, note)
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook
        for timer in again:
            timer.cancel()
            timer.join()
        if noted:
            raise KeyboardInterrupt from None
