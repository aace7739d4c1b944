"""Files and folders that one process at a time works on."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "alone", "check_unused", "claimed", "first_unused", "is_abandoned"]

LOCK = ".lock"
"""The file in a folder that is locked while a job writes there. It alone does not make a folder a used one."""


@contextmanager
def alone(path: Path) -> Iterator[IO[str] | None]:
    """The file, made where it is new and locked; None where another process has it.

    The lock is gone with the process, killed or not, unless it has handed the file on to another program. Where there are no
    locks (on Windows, on some network file systems) nobody is kept out.
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
    os.register_at_fork(after_in_child=file.close)  # the workers that load data outlive a killed process by seconds
    return True


@contextmanager
def claimed(folder: Path, option: str = "--out", shown: Path | None = None) -> Iterator[Path]:
    """The folder for this job alone, from before it writes there until it ends; made where it is new, gone if it stays empty.

    Args:
        folder: where the job writes.
        option: that says so.
        shown: what the user knows it by.

    Raises:
        BlockingIOError: another job has it.
        OSError: it cannot be made, or written to.
    """
    shown, path = shown or folder, folder / LOCK
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(alone(path))
                while lock and not _is(lock, path):  # its last holder has just taken it away
                    stack.close()
                    lock = stack.enter_context(alone(path))
            except OSError as error:
                verb = "written to" if folder.is_dir() else "made"
                raise OSError(f"{shown} cannot be {verb}: {error.strerror}; give another {option}") from None
            if lock is None:
                raise BlockingIOError(
                    f"{shown} is being written by another job: wait for it to end, or give another {option}"
                )
            try:
                yield folder
            finally:
                if _is(lock, path):  # else the folder has got another name
                    path.unlink()
    finally:
        with suppress(OSError):
            for each in new:
                each.rmdir()


def _is(file: IO[str], path: Path) -> bool:
    """Whether a file that is open still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def is_abandoned(folder: Path) -> bool:
    """Whether a job that was killed, or one that has just begun, has come to nothing there but its lock."""
    return folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]


def check_unused(folder: Path, option: str = "--out") -> None:
    """
    Raises:
        FileExistsError: something is in the folder, or it is a file.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise FileExistsError(f"{folder} already holds a run; give another {option}, or remove it first")


@contextmanager
def first_unused(folders: Iterable[Path], option: str = "--out") -> Iterator[Path]:
    """Of the folders the first one that nothing is in and that no other job has, for this job alone."""
    with ExitStack() as stack:
        for folder in folders:
            with suppress(BlockingIOError, FileExistsError), ExitStack() as attempt:
                check_unused(folder, option)
                attempt.enter_context(claimed(folder, option))
                check_unused(folder, option)  # its last holder may have just filled it
                stack.enter_context(attempt.pop_all())
                break
        yield folder
