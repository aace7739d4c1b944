"""What a command says on the terminal: lines, a progress bar, and of what libraries say what concerns its user."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["only_what_matters", "progress_bar", "say", "shown_path", "silenced_lightning"]

_HARMLESS = (
    ".*LeafSpec.*",  # Lightning's own use of torch
    ".*does not have many workers.*",  # pictures in memory need none
    "Total length of `list` across ranks is zero",  # val_fraction: 0
    ".*is smaller than the logging interval.*",  # metrics are logged by epoch
    "You requested to overfit",  # Lightning's words on samplers that are not its own
    "It is recommended to use `self.log.'(compress/|train/lr)",  # the same in every process
    "LightningCLI's args parameter",  # which names of configurations have become paths in
    "The dirpath has changed from",  # a test of a checkpoint writes none
    "Checkpoint directory .* exists and is not empty",
)


def say(text: str, *, stderr: bool = False) -> None:
    """Prints a text as it is: no colours for numbers, no markup, no line broken where it is to be copied."""
    Console(stderr=stderr).print(text, highlight=False, markup=False, soft_wrap=True)


def shown_path(path: str | Path) -> str:
    """Returns a path as it is shown: relative to the current folder where it lies in it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@contextmanager
def only_what_matters() -> Iterator[None]:
    """Shows tnlayers' own log, prints each warning on one line, hides harmless ones."""
    logger, handler = logging.getLogger("tnlayers"), logging.StreamHandler()
    advertising = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level, propagate = logger.level, logger.propagate
    advertising.addFilter(_is_no_advertising)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            for message in _HARMLESS:
                warnings.filterwarnings("ignore", message=message)
            warnings.showwarning = _show_in_one_line
            yield
    finally:
        advertising.removeFilter(_is_no_advertising)
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _is_no_advertising(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _show_in_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning without the file and the line of code that it comes from."""
    print(f"tnlayers: warning: {' '.join(str(message).split())}", file=file or sys.stderr)


@contextmanager
def silenced_lightning() -> Iterator[None]:
    """Within this block Lightning says only what is wrong, and nobody warns.

    It is for training inside of a longer job, whose own words the notes on devices, workers and epochs would hide.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, float, float], None]]:
    """Gives a function to call with what is being done, how much of it is done and how much there is.

    On a terminal it moves a bar with the time that is left; elsewhere it prints a line for each new thing, with the percentage.
    """
    if not console.is_terminal:
        shown = ""

        def show(what: str, done: float, total: float) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                console.print(f"{done / total:4.0%}  {what}", highlight=False, soft_wrap=True)

        yield show
        return
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.description}"), console=console, speed_estimate_period=300) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


@contextmanager
def progress_of(what: str, *, shown: bool) -> Iterator[Callable[[str, float, float], None]]:
    """Gives a function as `progress_bar` does, which shows one name whatever is being done, and nothing unless `shown`.

    So there is one line where there is no terminal.
    """
    if not shown:
        yield lambda *_: None
        return
    with progress_bar(Console(stderr=True)) as bar:
        yield lambda _, done, total: bar(what, done, total)
