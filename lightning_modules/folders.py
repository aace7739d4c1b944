"""Folders that are there in whole or not at all, whatever kills the process that writes them or fills the disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_modules.locks import LOCK, check_unused, claimed
from tnlayers.errors import UserError
from tnlayers.files import beside, sync

__all__ = ["clear", "whole_folder"]


@contextmanager
def whole_folder(path: Path, option: str = "--out") -> Iterator[Path]:
    """Gives a folder beside `path` to write a result to: it becomes `path` at the end of the block, and goes where that fails.

    One that a killed process has left there is begun anew.

    Args:
        path: a folder that is not there yet, or empty.
        option: the option that says so.

    Raises:
        FolderInUse: it holds files, or another job is writing it.
        UserError: it cannot be written.
    """
    check_unused(path, option)
    place, folder = Path(os.path.realpath(path)), beside(path)
    if place.is_mount() or place == Path.cwd():  # neither can be renamed onto
        what = "where a disk is mounted" if place.is_mount() else "the current folder"
        raise UserError(f"{path} is {what}; give a folder in it: {option} {path / 'run'}")
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
    """Removes all that is in a folder but its lock."""
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each.name != LOCK:
            each.unlink()


def _put(folder: Path, place: Path) -> None:
    """Gives a folder its name, once all of it is on the disk."""
    try:
        for each in folder.rglob("*"):
            sync(each)
        os.rename(folder, place)
        sync(place.parent)
    except OSError as error:
        raise UserError(
            f"cannot give {folder} its name {place}: {error.strerror}; the result is whole where it is"
        ) from error
