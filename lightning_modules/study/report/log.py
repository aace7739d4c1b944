"""A finished study to the loggers: its figures, its rows as tables and its plots."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger

from lightning_modules.loggers import log_pictures, log_table
from lightning_modules.study.findings import Findings
from lightning_modules.study.rows import Joint, Recommendation, Retrained, Row, Single

__all__ = ["log_study"]

_ALL_LAYERS = {"cuts": "cuts", "norm loss at most": "target"}
_EPOCHS = {"accuracy before and after each epoch": "accuracy"}
_KEPT = {"parameters kept": "params_kept", "MACs kept": "macs_kept"}
_MEASURED = {"norm loss": "eps", "accuracy": "accuracy"}
_TABLES: dict[str, tuple[type[Row], dict[str, str]]] = {
    "layers": (Single, {name: name for name in ("layer", "cuts", "bonds", "control")} | _MEASURED),
    "all_layers": (Joint, _ALL_LAYERS | _MEASURED),
    "retrained": (Retrained, _ALL_LAYERS | {"weights": "weights"} | _EPOCHS),
    "factors": (Recommendation, {"lost by a layer alone, at most": "tolerance"} | _KEPT | _EPOCHS),
}
"""Table -> the kind of its rows, and heading -> the field under it."""


def log_study(loggers: Iterable[Logger], rows: Sequence[Row], folder: Path) -> None:
    """Gives each logger what it takes; the plots are those in the report's folder."""
    pictures = sorted(folder.glob("*.png"))
    for logger in loggers:
        logger.log_metrics(_metrics(rows), step=0)
        for name, (kind, columns) in _TABLES.items():
            cells = [[_text(getattr(row, field)) for field in columns.values()] for row in rows if type(row) is kind]
            log_table(logger, f"study/{name}", list(columns), cells, step=0)
        log_pictures(logger, "study/plots", pictures, step=0)
        logger.save()


def _metrics(rows: Sequence[Row]) -> dict[str, float]:
    findings = Findings(rows)
    metrics = {"study/accuracy_dense": findings.study.accuracy}
    if found := findings.recommendation:
        metrics |= {
            "study/recommended/accuracy_right_after": found.accuracy[0],
            "study/recommended/accuracy_retrained": found.accuracy[-1],
            "study/recommended/params_kept": found.params_kept,
            "study/recommended/macs_kept": found.macs_kept,
        }
    return metrics


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{round(value, 4):g}" if isinstance(value, float) else str(value)
