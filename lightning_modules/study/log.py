"""A finished study to the loggers: its figures, its rows as tables and its plots."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger

from lightning_modules.loggers import log_pictures, log_table
from lightning_modules.study.rows import Joint, Recommendation, Retrained, Row, Single, Study

__all__ = ["log_study"]


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
    metrics: dict[str, float] = {}
    for row in rows:
        if isinstance(row, Study):
            metrics["study/accuracy_dense"] = row.accuracy
        if isinstance(row, Recommendation):
            metrics |= {
                "study/recommended/accuracy_right_after": row.accuracy[0],
                "study/recommended/accuracy_retrained": row.accuracy[-1],
                "study/recommended/params_kept": row.params_kept,
                "study/recommended/macs_kept": row.macs_kept,
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
        [" ".join(row.cuts), f"{row.target:g}", row.weights, " ".join(f"{value:.4f}" for value in row.accuracy)]
        for row in rows
        if isinstance(row, Retrained)
    ]
    return {
        "layers": (["layer", "cuts", "bonds", "control", "norm loss", "accuracy"], single),
        "all_layers": (["cuts", "norm loss at most", "norm loss", "accuracy"], joint),
        "retrained": (["cuts", "norm loss at most", "weights", "accuracy before and after each epoch"], retrained),
    }


def _figures(row: Single | Joint) -> list[str]:
    return [f"{row.eps:.4f}", f"{row.accuracy:.4f}"]
