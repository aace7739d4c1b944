"""The file that a study writes its rows to: it only grows, and a study that was killed goes on after its last whole line."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_modules.folders import clear
from lightning_modules.locks import check_unused, claimed
from lightning_modules.study.rows import Row, Study, row_from_plain, row_to_plain
from tnlayers.errors import UserError
from tnlayers.files import append, write_files

__all__ = ["JOURNAL", "Journal", "read_rows", "study_folder"]

JOURNAL = "study.jsonl"

_ROUNDED = ("accuracy", "loss")  # of the dense net: not quite the same on another machine, and other pictures show
_ROUNDING = 0.01
_SHOWN = 2


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a study.jsonl; a last line that a kill tore off is left out.

    Raises:
        UserError: another line that is no row of a study.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                rows.append(row_from_plain(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}, line {number}, is not a row of a study: {error}") from None
    return rows


@contextmanager
def study_folder(folder: Path) -> Iterator[Path]:
    """Keeps the folder of a study, new or begun, for this job alone. A new one goes again if nothing is measured.

    The journal is there before all else, so that a folder that a kill has left is known by it.

    Raises:
        FolderInUse: it holds something else, or another job has it.
        UserError: it cannot be written.
    """
    path = folder / JOURNAL
    with claimed(folder):
        begun = path.is_file()
        if not begun:
            check_unused(folder)
            write_files(folder, {JOURNAL: ""})
        try:
            yield folder
        except BaseException:
            if not begun and not path.stat().st_size:
                clear(folder)
            raise


class Journal:
    """The rows of a study so far, and where the next ones go.

    Args:
        path: a study.jsonl, new or begun.
        study: what its rows are of.

    Raises:
        UserError: it is begun, and of another study; it stays as it is.
        UserError: it cannot be written.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self._path = path
        self.rows = read_rows(path) if path.exists() else []
        self._keys = {row.key for row in self.rows}
        if self.rows and (difference := _difference(self.rows[0], study)):
            raise UserError(f"{path} is of another study: {difference}; give another --out, or remove it")
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        if not self.rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.add(study)

    def add(self, row: Row) -> None:
        """Writes a row, which is on the disk when this returns.

        Raises:
            UserError: it is not; the message names the file and says why.
        """
        append(self._path, json.dumps(row_to_plain(row)) + "\n", synced=True)
        self.rows.append(row)
        self._keys.add(row.key)

    def has(self, key: tuple[object, ...]) -> bool:
        return key in self._keys


def _difference(begun: Row, study: Study) -> str:
    """Says what differs between two studies; the text is empty if nothing does."""
    if not isinstance(begun, Study):
        return "its first line does not say of which"
    then, now = _flat(begun), _flat(study)
    found = [
        f"its {name} is {then.get(name)}, not {new}"
        for name, new in now.items()
        if not _same(name, then.get(name), new)
    ]
    return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _flat(study: Study) -> dict[str, Any]:
    """Returns name -> value of all that has to be the same, the most telling first."""
    plain = asdict(study)
    parts = {part: plain.pop(part) for part in ("protocol", "training")}
    return plain | {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def _same(name: str, old: Any, new: Any) -> bool:
    if name not in _ROUNDED:
        return old == new
    return math.isclose(old, new, rel_tol=_ROUNDING) or (math.isnan(old) and math.isnan(new))
