"""A progress bar with the time left, and lines where nobody watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, float, float], None]]:
    """Gives what to call with what is being done, how much is done and how much there is.

    On a terminal it is a bar; elsewhere a line for each new thing, with the percentage.
    """
    if not console.is_terminal:
        yield _Lines(console)
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


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console, self._last = console, ""

    def __call__(self, what: str, done: float, total: float) -> None:
        if what != self._last:
            self._last = what
            self._console.print(f"{done / total:4.0%}  {what}", highlight=False, soft_wrap=True)
