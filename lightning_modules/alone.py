"""Files that one process at a time works on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone"]


@contextmanager
def alone(path: Path) -> Iterator[IO[str] | None]:
    """The file, made where it is new and locked; None where another process has it.

    The lock is gone with the last process that holds it, killed or not. Where there are no locks (on Windows, on some network
    file systems) nobody is kept out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        yield file if _locked(file) else None


def _locked(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
