"""Files and folders that one process at a time works on."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO
from weakref import WeakSet

from filelock import lock_descriptor

from tnlayers.errors import UserError

__all__ = ["LOCK", "FolderInUse", "check_unused", "claimed", "first_unused", "is_abandoned", "try_lock"]

LOCK = ".lock"
"""The file in a folder that is locked while a job writes there. A folder that holds nothing else is unused."""


class FolderInUse(UserError):
    """A folder that another job is writing, or that holds the files of one."""


@contextmanager
def try_lock(path: Path) -> Iterator[IO[str] | None]:
    """Opens a file, which is made where it is new, and locks it; gives None where another process has the lock.

    The lock is gone with the process, killed or not, unless the process has handed the file on to another program. On a
    file system without locks nobody is kept out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            locked = lock_descriptor(file.fileno(), blocking=False)
        except OSError:  # a file system without locks
            locked = True
        if locked:
            _locked_files().add(file)
        yield file if locked else None


@cache
def _locked_files() -> WeakSet[IO[str]]:
    """Returns the set of the files that this process has locked, which forks of it close.

    The workers that load data outlive a killed process by seconds, and would keep its locks. Python never forgets a function
    that is to run after a fork, so one serves all the locks.
    """
    files: WeakSet[IO[str]] = WeakSet()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: [file.close() for file in files])
    return files


@contextmanager
def claimed(folder: Path, option: str = "--out", shown: Path | None = None) -> Iterator[Path]:
    """Keeps the folder for this job alone until the block ends; makes it where it is new, and removes it if it stays empty.

    Args:
        folder: where the job writes.
        option: the option that says so.
        shown: the name by which the user knows it.

    Raises:
        FolderInUse: another job has it.
        UserError: it cannot be made, or written to.
    """
    shown, path = shown or folder, folder / LOCK
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(try_lock(path))
                while lock and not _is(lock, path):  # its last holder has just taken it away
                    stack.close()
                    lock = stack.enter_context(try_lock(path))
            except OSError as error:
                verb = "written to" if folder.is_dir() else "made"
                raise UserError(f"{shown} cannot be {verb}: {error.strerror}; give another {option}") from None
            if lock is None:
                raise FolderInUse(
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
    """Returns whether a file that is open still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def is_abandoned(folder: Path) -> bool:
    """Returns whether the folder holds its lock alone: a job has just begun there, or was killed before it wrote anything."""
    return folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]


def check_unused(folder: Path, option: str = "--out") -> None:
    """
    Raises:
        FolderInUse: something is in the folder, or it is a file.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise FolderInUse(f"{folder} already holds a run; give another {option}, or remove it first")


@contextmanager
def first_unused(folders: Iterable[Path], option: str = "--out") -> Iterator[Path]:
    """Keeps for this job alone the first of the folders that nothing is in and that no other job has."""
    with ExitStack() as stack:
        for folder in folders:
            with suppress(FolderInUse), ExitStack() as attempt:
                check_unused(folder, option)
                attempt.enter_context(claimed(folder, option))
                check_unused(folder, option)  # its last holder may have just filled it
                stack.enter_context(attempt.pop_all())
                break
        yield folder
