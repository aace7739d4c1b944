"""The truncation study: what its journal does not have yet is measured, in an order that does not depend on what it has.

Source: Singh, Jahromi and Orús (2024), arXiv 2403.14379; the protocol in detail is ours.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

from lightning_modules.locks import try_lock
from lightning_modules.study.factorizations import LINEAR, REALISED
from lightning_modules.study.findings import points
from lightning_modules.study.journal import Journal
from lightning_modules.study.measurement.subject import Subject
from lightning_modules.study.rows import Row
from tnlayers.errors import UserError

__all__ = ["Progress", "run_study"]

Progress = Callable[[str, float, float], None]
"""Told what is measured, how much is done and how much there is, in evaluations of the whole net on all pictures."""
Tick = Callable[[], None]

_SHARES = (1.0, 0.5, 0.25, 0.0)  # of the tolerance that a layer may use up alone, where all are factorized
Key = tuple[object, ...]


@dataclass(frozen=True)
class _Work:
    """A part of the study.

    Attributes:
        name: for people.
        keys: those of the rows that it gives.
        measure: gives the rows of some of the keys; calls what it is given after each step.
        cost: about how many evaluations of the whole net on all pictures it takes.
        steps: how many steps it takes for all keys.
    """

    name: str
    keys: Sequence[Key]
    measure: Callable[[Sequence[Any], Tick], Iterable[Row]]
    cost: float = 1
    steps: int = 1


def run_study(subject: Subject, path: Path, progress: Progress = lambda *_: None) -> list[Row]:
    """Measures what a journal lacks, and returns all its rows.

    Args:
        subject: the net, the pictures and the protocol.
        path: the study.jsonl, new or begun.
        progress: called at every step.

    Raises:
        ValueError: the journal is of another study, or another process is writing it.
    """
    with try_lock(path) as lock:
        if lock is None:
            raise UserError(f"{path} is being written by another study: wait for it, or give another --out")
        return _run(subject, Journal(path, subject.study()), progress)


def _run(subject: Subject, journal: Journal, progress: Progress) -> list[Row]:
    works = list(_works(subject, journal))
    total, done = sum(work.cost for work in works), 0.0
    for work in works:
        missing = [key for key in work.keys if not journal.has(key)]
        cost = work.cost * len(missing) / len(work.keys)
        done += work.cost - cost
        ticks = count(1)

        def tick(work: _Work = work, done: float = done, cost: float = cost, ticks: Iterator[int] = ticks) -> None:
            progress(work.name, done + cost * next(ticks) / work.steps, total)

        if missing:
            progress(work.name, done, total)
            for row in work.measure(missing, tick):
                journal.add(row)
        done += cost
    progress("done", total, total)
    return journal.rows


def _works(subject: Subject, journal: Journal) -> Iterator[_Work]:
    """Lists all parts in their order: layers one by one, all together, retraining, and what follows from them."""
    protocol = subject.protocol
    for name in subject.kernels:
        yield _Work("spectra", [("layer", name)], _one(partial(subject.layer, name)), cost=0)
    for name, kernel in subject.kernels.items():
        if trials := kernel.trials(protocol.losses):
            cost, steps = len(trials) * subject.shares[name], subject.num_steps(name, len(trials))
            yield _Work(name, trials, partial(subject.singles, name), cost, steps)
    for cuts, eps in product(subject.cut_sets, protocol.losses):
        name = f"all layers, {' '.join(cuts)} at up to {eps:g}"
        yield _Work(name, [("joint", cuts, eps)], _one(partial(subject.joint, cuts, eps)))
    cost, steps = 1 + protocol.epochs * subject.epoch_cost, protocol.epochs + 1
    if protocol.epochs:
        key: Key = ("retrained", (), 0.0, "dense")
        yield _Work("retraining the dense net", [key], _one(subject.untruncated), cost, steps)
        # Of truncations those that a factorization makes are retrained: the linears' where there is nothing else.
        realised = [cuts for cuts in subject.cut_sets if cuts in REALISED] or [LINEAR]
        for cuts, eps, weights in product(realised, protocol.retrain, ("dense", "factors")):
            name, key = f"retraining {' '.join(cuts)} at {eps:g}, {weights}", ("retrained", cuts, eps, weights)
            yield _Work(name, [key], _one(partial(subject.retrained, cuts, eps, weights)), cost, steps)
    for tolerance in dict.fromkeys(share * protocol.tolerance for share in _SHARES):
        name = f"all layers as factors that lose at most {points(tolerance, 2)} alone"
        measure = _one(partial(subject.recommendation, journal.rows, tolerance))
        yield _Work(name, [("recommendation", tolerance)], measure, cost, steps)


def _one(measure: Callable[[Tick], Row]) -> Callable[[Sequence[Key], Tick], Iterable[Row]]:
    """Makes a `measure` of what gives a single row."""
    return lambda missing, tick: [measure(tick)]
