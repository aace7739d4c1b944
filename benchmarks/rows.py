"""Rows of measurements in a file that a later run goes on with."""

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

__all__ = ["LostDevice", "Row", "Rows", "Setting", "deadlines"]


@dataclass(frozen=True)
class Setting:
    """Where and on what to measure.

    Attributes:
        device: where.
        tiny: whether everything is tiny, for a test of the script.
        data: the archive of the pictures, train/<class>/*.jpg and test/<class>/*.jpg; None leaves out the trainings.
        checkpoint: the published ResNet-20; None leaves out its retraining.
    """

    device: torch.device
    tiny: bool = False
    data: Path | None = None
    checkpoint: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That in which nets are run on such a device."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Row:
    """A measurement that is still to be made.

    Attributes:
        name: its name within the part.
        guess: the seconds that it should take; only the guesses' ratios within a part matter after its first row.
        make: makes it.
    """

    name: str
    guess: float
    make: Callable[[], dict[str, Any]]


def deadlines(shares: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Returns when each part ends, in seconds from now; what a part leaves of its share is the next one's."""
    return dict(
        zip(shares, (seconds * share / sum(shares.values()) for share in accumulate(shares.values())), strict=True)
    )


class LostDevice(RuntimeError):
    """The device answers no call any more, so only a new process can go on."""


@dataclass
class Rows:
    """The rows of one file, which is written after each of them.

    Attributes:
        path: the JSON file; rows that it has already are not made again.
        about: what the figures depend on.
        device: where they are measured.
        rows: what is known.
        left_out: the names of the rows for which no time was left.
        known_commit: that of the rows that the file has already.
    """

    path: Path
    about: dict[str, Any]
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    known_commit: str | None = None

    def __post_init__(self) -> None:
        if self.path.exists():
            known = json.loads(self.path.read_text())
            self.rows, self.known_commit = known["rows"], known.get("commit")

    def forget_errors(self) -> None:
        self.rows = [row for row in self.rows if "error" not in row]

    def fill(self, part: str, rows: Iterable[Row], until: float) -> None:
        """Makes the rows of a part that are not there, as long as each is expected to end in time.

        Args:
            part: its name.
            rows: what to make.
            until: when the part ends, on the clock of `time.monotonic`.

        Raises:
            LostDevice: no row can be made in this process any more.
        """
        known = {row["name"] for row in self.rows if row["part"] == part}
        guessed = taken = 0.0
        for row in _unless_raised(rows):
            if row.name in known:
                continue
            expected = row.guess * (1.2 * taken / guessed if guessed else 1.0)
            if time.monotonic() + expected > until:
                self.left_out.append(f"{part}: {row.name}")
                continue
            start = time.monotonic()
            made = self._make(row)
            guessed, taken = guessed + row.guess, taken + time.monotonic() - start
            measured_by = {"seconds": round(time.monotonic() - start, 2), "load": round(os.getloadavg()[0], 1)}
            self.rows.append({"part": part, "name": row.name} | made | measured_by)
            self.write()
            print(f"{part}: {row.name}: {made.get('error', 'done')}", flush=True)
            if "error" in made and self._lost():
                raise LostDevice(made["error"])

    def _make(self, row: Row) -> dict[str, Any]:
        """Returns what the row measures, or its error."""
        try:
            return row.make()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:500]}", "at": traceback.format_exc()[-1500:]}
        finally:
            gc.collect()
            if self.device.type == "cuda" and torch.cuda.is_initialized():
                try:
                    torch.cuda.empty_cache()
                except RuntimeError as error:
                    print(f"{row.name}: {error}", flush=True)

    def _lost(self) -> bool:
        if self.device.type != "cuda":
            return False
        try:
            torch.ones(1, device=self.device).item()
        except RuntimeError:
            return True
        return False

    def write(self) -> None:
        """Writes the file, each row on a line of its own."""
        head = json.dumps(self.about | {"left_out": self.left_out}, indent=1).removesuffix("\n}")
        rows = ",\n".join(map(json.dumps, self.rows))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n')
        part.replace(self.path)


def _unless_raised(rows: Iterable[Row]) -> Iterator[Row]:
    """Yields the rows; what prevents all further ones becomes a row of its own."""
    try:
        yield from rows
    except Exception as error:
        raised = error

        def fail() -> dict[str, Any]:
            raise raised

        yield Row("further rows", 0.0, fail)
