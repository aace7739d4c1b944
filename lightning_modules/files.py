"""Files and folders that are there in whole or not at all, whatever kills the process that writes them or fills the disk."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_modules.alone import LOCK, check_unused, claimed

__all__ = ["PARTIAL", "append", "aside", "clear", "whole_folder", "write_files"]

PARTIAL = ".partial"
"""How the hidden name of what is not whole yet ends."""


def write_files(folder: Path, files: Mapping[str, str | bytes | memoryview]) -> None:
    """Puts files into a folder, which is made where it is new. All go to the disk beside their places before the first one
    gets there.

    Args:
        folder: where to.
        files: name -> what is in it.

    Raises:
        OSError: one of them cannot be written; what was there stays, and nothing else.
    """
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            with open(aside(path), "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            path = folder / name
            os.replace(aside(path), os.path.realpath(path))
        _sync(folder)
    except BaseException as error:
        with suppress(OSError):
            for name in files:
                aside(folder / name).unlink(missing_ok=True)
            for each in new:
                each.rmdir()
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror}; what was there before is intact") from error
        raise


def append(path: Path, text: str, *, synced: bool = False) -> None:
    """Adds text to the end of a file, new or not.

    Args:
        path: the file; its folder is there.
        text: whole lines.
        synced: whether it is on the disk when this returns, which takes its time.

    Raises:
        OSError: it cannot be written; what was there stays, and nothing else.
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
        raise OSError(f"cannot write {path}: {error.strerror}; what was there before is intact") from error


@contextmanager
def whole_folder(path: Path, option: str = "--out") -> Iterator[Path]:
    """A folder beside `path` to write a result to: it becomes `path` at the end of the block, and goes where that fails.

    One that a killed process has left there is begun anew.

    Args:
        path: of a folder that is not there yet, or empty.
        option: that says so.

    Raises:
        FileExistsError: it holds files.
        BlockingIOError: another job is writing it.
        OSError: it cannot be written.
    """
    check_unused(path, option)
    place, folder = Path(os.path.realpath(path)), aside(path)
    if place.is_mount() or place == Path.cwd():  # neither can be renamed onto
        what = "where a disk is mounted" if place.is_mount() else "the current folder"
        raise OSError(f"{path} is {what}; give a folder in it: {option} {path / 'run'}")
    if place.is_dir():
        with claimed(place, option, shown=path):  # takes away the lock that a killed job has left
            pass
    with claimed(folder, option, shown=path):
        check_unused(path, option)  # the last one to write it may have just finished
        try:
            clear(folder)
            yield folder
        except BaseException:
            with suppress(OSError):
                clear(folder)
            raise
        _put(folder, place)
        (place / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def clear(folder: Path) -> None:
    """Removes all that is in a folder, but for its lock."""
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each.name != LOCK:
            each.unlink()


def _put(folder: Path, place: Path) -> None:
    """Gives a folder its name, once all of it is on the disk."""
    try:
        for each in folder.rglob("*"):
            _sync(each)
        os.rename(folder, place)
        _sync(place.parent)
    except OSError as error:
        raise OSError(
            f"cannot give {folder} its name {place}: {error.strerror}; the result is whole where it is"
        ) from error


def aside(path: Path) -> Path:
    """Where a file or a folder is until it is whole: beside its place."""
    place = Path(os.path.realpath(path))
    return place.with_name(f".{place.name}{PARTIAL}")


def _sync(path: Path) -> None:
    """Sees to it that a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
