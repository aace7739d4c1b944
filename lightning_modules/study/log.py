"""A finished study to the loggers: its figures, its rows as tables and its plots."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger

from lightning_modules.loggers import log_pictures, log_table
from lightning_modules.study.findings import Measured
from lightning_modules.study.rows import Joint, Recommendation, Retrained, Row, Single

__all__ = ["log_study"]

_EPOCHS = "accuracy before and after each epoch"


def log_study(loggers: Iterable[Logger], rows: Sequence[Row], folder: Path) -> None:
    """To each logger what it takes; the plots are those in the report's folder."""
    pictures = sorted(folder.glob("*.png"))
    for logger in loggers:
        logger.log_metrics(_metrics(rows), step=0)
        for name, (headings, cells) in _tables(rows).items():
            log_table(logger, f"study/{name}", headings, cells, step=0)
        log_pictures(logger, "study/plots", pictures, step=0)
        logger.save()


def _metrics(rows: Sequence[Row]) -> dict[str, float]:
    measured = Measured.of(rows)
    metrics = {"study/accuracy_dense": measured.study.accuracy}
    if found := measured.recommendation:
        metrics |= {
            "study/recommended/accuracy_right_after": found.accuracy[0],
            "study/recommended/accuracy_retrained": found.accuracy[-1],
            "study/recommended/params_kept": found.params_kept,
            "study/recommended/macs_kept": found.macs_kept,
        }
    return metrics


def _tables(rows: Sequence[Row]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Name -> headings and rows of text."""
    single = [
        [row.layer, " ".join(row.cuts), " ".join(map(str, row.bonds)), row.control, *_figures(row)]
        for row in rows
        if isinstance(row, Single)
    ]
    joint = [[" ".join(row.cuts), f"{row.target:g}", *_figures(row)] for row in rows if isinstance(row, Joint)]
    retrained = [
        [" ".join(row.cuts), f"{row.target:g}", row.weights, _each(row.accuracy)]
        for row in rows
        if isinstance(row, Retrained)
    ]
    factors = [
        [f"{row.tolerance:g}", f"{row.params_kept:.4f}", f"{row.macs_kept:.4f}", _each(row.accuracy)]
        for row in rows
        if isinstance(row, Recommendation)
    ]
    return {
        "layers": (["layer", "cuts", "bonds", "control", "norm loss", "accuracy"], single),
        "all_layers": (["cuts", "norm loss at most", "norm loss", "accuracy"], joint),
        "retrained": (["cuts", "norm loss at most", "weights", _EPOCHS], retrained),
        "factors": (["lost by a layer alone, at most", "parameters kept", "MACs kept", _EPOCHS], factors),
    }


def _each(accuracies: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in accuracies)


def _figures(row: Single | Joint) -> list[str]:
    return [f"{row.eps:.4f}", f"{row.accuracy:.4f}"]
