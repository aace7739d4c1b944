"""The truncation study: what its journal does not have yet is measured, in an order that does not depend on what it has.

Source: Singh, Jahromi and Orús (2024), arXiv 2403.14379; the protocol in detail is ours.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from pathlib import Path

from lightning_modules.alone import alone
from lightning_modules.study.factors import REALISED
from lightning_modules.study.findings import points
from lightning_modules.study.grid import Trial
from lightning_modules.study.journal import Journal
from lightning_modules.study.rows import Row
from lightning_modules.study.subject import Subject
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
        keys: of the rows that it gives.
        cost: about how many evaluations of the whole net on all pictures it takes, and in how many `steps` it tells of progress.
        rows: measures those of the given keys; calls what it is given after each step.
    """

    name: str
    keys: tuple[Key, ...]
    cost: float
    steps: int
    rows: Callable[[Sequence[Key], Tick], Iterable[Row]]


def run_study(subject: Subject, path: Path, progress: Progress = lambda *_: None) -> list[Row]:
    """Measures what a journal lacks, and returns all its rows.

    Args:
        subject: the net, the pictures and the protocol.
        path: the study.jsonl, new or begun.
        progress: called at every step.

    Raises:
        ValueError: the journal is of another study, or another process is writing it.
    """
    with alone(path) as lock:
        if lock is None:
            raise UserError(f"{path} is being written by another study: wait for it, or give another --out")
        return _run(subject, Journal(path, subject.study()), progress)


def _run(subject: Subject, journal: Journal, progress: Progress) -> list[Row]:
    works = list(_works(subject, journal))
    total, done = sum(work.cost for work in works), 0.0
    for work in works:
        missing = [key for key in work.keys if not journal.has(key)]
        step = work.cost * len(missing) / len(work.keys) / work.steps
        done += work.cost - step * work.steps
        ticks = count(1)

        def tick(name: str = work.name, done: float = done, step: float = step, ticks: Iterator[int] = ticks) -> None:
            progress(name, done + step * next(ticks), total)

        if missing:
            progress(work.name, done, total)
            for row in work.rows(missing, tick):
                journal.add(row)
        done += step * work.steps
    progress("done", total, total)
    return journal.rows


def _works(subject: Subject, journal: Journal) -> Iterator[_Work]:
    """All parts in their order: layers one by one, all together, retraining, and what follows from them."""
    protocol = subject.protocol
    for name in subject.kernels:
        yield _Work("spectra", (("layer", name),), 0, 1, partial(_layer, subject, name))
    for name, kernel in subject.kernels.items():
        trials = kernel.trials(protocol.losses)
        if trials:
            keys, cost = tuple(trial.key for trial in trials), len(trials) * subject.shares[name]
            steps = subject.num_steps(name, len(trials))
            yield _Work(name, keys, cost, steps, partial(_singles, subject, name, trials))
    for cuts in subject.cut_sets:
        for eps in protocol.losses:
            name = f"all layers, {' '.join(cuts)} at up to {eps:g}"
            yield _Work(name, (("joint", cuts, eps),), 1, 1, partial(_joint, subject, cuts, eps))
    cost, steps = 1 + protocol.epochs * subject.epoch_cost, protocol.epochs + 1
    if protocol.epochs:
        yield from _retrainings(subject, cost, steps)
    for tolerance in dict.fromkeys(share * protocol.tolerance for share in _SHARES):
        name = f"all layers as factors that lose at most {points(tolerance, 2)} alone"
        keys = (("recommendation", tolerance),)
        yield _Work(name, keys, cost, steps, partial(_recommended, subject, journal, tolerance))


def _retrainings(subject: Subject, cost: float, steps: int) -> Iterator[_Work]:
    """Of the dense net, and of joint truncations that a factorization makes: of the linears' where there is nothing else."""
    keys: tuple[Key, ...] = (("retrained", (), 0.0, "dense"),)
    yield _Work("retraining the dense net", keys, cost, steps, partial(_untruncated, subject))
    for cuts in [cuts for cuts in subject.cut_sets if cuts in REALISED] or [("i",)]:
        for eps, weights in product(subject.protocol.retrain, ("dense", "factors")):
            name = f"retraining {' '.join(cuts)} at {eps:g}, {weights}"
            keys = (("retrained", cuts, eps, weights),)
            yield _Work(name, keys, cost, steps, partial(_retrained, subject, cuts, eps, weights))


def _layer(subject: Subject, name: str, missing: Sequence[Key], tick: Tick) -> list[Row]:
    return [subject.layer(name)]


def _singles(subject: Subject, name: str, trials: Sequence[Trial], missing: Sequence[Key], tick: Tick) -> Iterable[Row]:
    return subject.singles(name, [trial for trial in trials if trial.key in missing], tick)


def _joint(subject: Subject, cuts: tuple[str, ...], eps: float, missing: Sequence[Key], tick: Tick) -> list[Row]:
    return [subject.joint(cuts, eps)]


def _untruncated(subject: Subject, missing: Sequence[Key], tick: Tick) -> list[Row]:
    return [subject.untruncated(tick)]


def _retrained(
    subject: Subject, cuts: tuple[str, ...], eps: float, weights: str, missing: Sequence[Key], tick: Tick
) -> list[Row]:
    return [subject.retrained(cuts, eps, weights, tick)]


def _recommended(subject: Subject, journal: Journal, tolerance: float, missing: Sequence[Key], tick: Tick) -> list[Row]:
    return [subject.recommendation(journal.rows, tolerance, tick)]
