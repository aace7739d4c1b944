"""Files that are there in whole or not at all, whatever kills the process that writes them or fills the disk."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tnlayers.errors import UserError

__all__ = ["PARTIAL", "append", "beside", "sync", "write_files"]

PARTIAL = ".partial"
"""The end of the hidden name of what is not whole yet."""


def write_files(folder: Path, files: Mapping[str, str | bytes | memoryview]) -> None:
    """Puts files into a folder, which is made where it is new.

    All of them go to the disk beside their places before the first one gets there.

    Args:
        folder: the place of the files.
        files: name -> content.

    Raises:
        UserError: one of them cannot be written; what was there stays, and nothing else.
    """
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            with open(beside(path), "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            path = folder / name
            os.replace(beside(path), os.path.realpath(path))
        sync(folder)
    except BaseException as error:
        with suppress(OSError):
            for name in files:
                beside(folder / name).unlink(missing_ok=True)
            for each in new:
                each.rmdir()
        if isinstance(error, OSError):
            raise _unwritten(path, error) from error
        raise


def append(path: Path, text: str, *, synced: bool = False) -> None:
    """Adds text to the end of a file, new or not.

    Args:
        path: the file; its folder is there.
        text: whole lines.
        synced: waits until the text is on the disk, which takes its time.

    Raises:
        UserError: it cannot be written; what was there stays, and nothing else.
    """
    size = path.stat().st_size if path.exists() else None
    try:
        with open(path, "a", newline="") as file:
            file.write(text)
            file.flush()
            if synced:
                os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink() if size is None else os.truncate(path, size)
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; what was there before is intact")


def beside(path: Path) -> Path:
    """Returns where a file or a folder is until it is whole: beside its place."""
    place = Path(os.path.realpath(path))
    return place.with_name(f".{place.name}{PARTIAL}")


def sync(path: Path) -> None:
    """Sees to it that a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
