"""The loggers of runs: CSV that goes on, W&B that never stands in the way, and what all loggers are given alike.

A run's folder is <save_dir>/<name>/<version>/ with every logger; the checkpoints are in it.
"""

import csv
import io
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from tnlayers.files import append, write_files
from tnlayers.markdown import markdown_table

__all__ = ["CSV", "WandB", "log_config", "log_pictures", "log_table", "run_folder"]

_log = logging.getLogger(__name__)
_CONNECT_SECONDS = 3.0


def run_folder(trainer: Trainer) -> Path:
    """Returns the run's folder, in the first process alone: the others do not know which version it is."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, logger.name or "", version)


def log_config(logger: Logger, name: str, text: str) -> None:
    """Hands a configuration in YAML to a logger that shows such things."""
    if isinstance(logger, WandbLogger):
        logger.experiment.config.update({name: yaml.safe_load(text)}, allow_val_change=True)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, f"```yaml\n{text}\n```")


def log_table(logger: Logger, name: str, headings: list[str], rows: list[list[str]], step: int) -> None:
    """Hands a table to a logger that shows such things."""
    if isinstance(logger, WandbLogger):
        logger.log_table(name, columns=headings, data=rows, step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, markdown_table(headings, rows), step)


def log_pictures(logger: Logger, name: str, paths: list[Path], step: int) -> None:
    """Hands picture files to a logger that shows such things."""
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [str(path) for path in paths], step=step)
    elif isinstance(logger, TensorBoardLogger):
        for path in paths:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image(f"{name}/{path.stem}", pixels, step, dataformats="HWC")


class CSV(CSVLogger):
    """Logs like Lightning's `CSVLogger`, but goes on with the metrics.csv of its version instead of deleting it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drops the rows of this step and of later ones: they are about to be logged again."""
        self.experiment.rewind(step)


class _Rows(ExperimentWriter):
    """Writes metrics.csv: it appends rows, and replaces the file by a whole one where there is more to change.

    A disk that is full leaves the rows that are there.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        if rows := self._read():
            self.metrics_keys = list(rows[0])
            self._write(rows, self.metrics_keys)  # an unfinished one is gone

    def _check_log_dir_exists(self) -> None:
        """Leaves what is there, which Lightning would delete."""

    def rewind(self, step: int) -> None:
        rows = self._read()
        if kept := [row for row in rows if int(row["step"]) < step]:
            self._write(kept, self.metrics_keys)
        elif rows:
            Path(self.metrics_file_path).unlink()
            self.metrics_keys = []

    def save(self) -> None:
        """Writes the rows that were logged since the last time, under more headings where they have some."""
        names = sorted({*self.metrics_keys, *chain(*self.metrics)})
        if not self.metrics:
            return
        if names == self.metrics_keys:
            append(Path(self.metrics_file_path), _lines(self.metrics, names))
        else:
            self._write([*self._read(), *self.metrics], names)
        self.metrics, self.metrics_keys = [], names

    def _read(self) -> list[dict[str, str]]:
        """Returns the rows, without one that a killed process has left unfinished."""
        path = Path(self.metrics_file_path)
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return list(csv.DictReader(line for line in lines if line.endswith("\n")))

    def _write(self, rows: Sequence[Mapping[str, Any]], names: list[str]) -> None:
        headings = _lines([dict(zip(names, names, strict=True))], names)
        write_files(Path(self.log_dir), {self.NAME_METRICS_FILE: headings + _lines(rows, names)})


def _lines(rows: Sequence[Mapping[str, Any]], names: list[str]) -> str:
    file = io.StringIO()
    csv.DictWriter(file, names).writerows(rows)
    return file.getvalue()


class WandB(WandbLogger):
    """Logs like Lightning's `WandbLogger`, and offline where W&B cannot be reached.

    Args:
        project: the W&B project.
        name: the run's name; W&B invents one by default.
        save_dir: where the files go.
        offline: True or False to insist; None goes offline when there is no key, or no connection. `WANDB_MODE` wins.
        version: the run's id, with which a run goes on; by default a new one.
        kwargs: what else `WandbLogger` and `wandb.init` take.
    """

    def __init__(
        self,
        project: str = "tnlayers",
        name: str | None = None,
        save_dir: str = "runs",
        offline: bool | None = None,
        version: str | None = None,
        **kwargs: Any,
    ) -> None:
        mode = os.environ.get("WANDB_MODE")
        if offline is None and mode is None and (reason := _unreachable()):
            offline, sync = True, f"wandb sync {save_dir}/wandb/offline-run-*"
            rank_zero_only(_log.warning)("W&B is offline (%s); upload later with: %s", reason, sync)
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        # The mode goes to wandb.init alone: WandbLogger(offline=True) would set an environment variable for the process.
        settings = kwargs if mode is not None else {"mode": "offline" if offline else "online", **kwargs}
        settings = {"settings": _flushing_often(), **settings}
        super().__init__(project=project, name=name, save_dir=save_dir, version=version, **settings)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it whatever it is, and Lightning always gives it


def _flushing_often() -> dict[str, float]:
    """Lets W&B's file lack the last second of a killed process, rather than the last fifteen."""
    import wandb

    name = "x_transaction_log_flush_interval"  # not in every version
    return {name: 1.0} if name in wandb.Settings.model_fields else {}


def _unreachable() -> str:
    """Says why W&B cannot be used online; empty if it can."""
    from requests.utils import get_netrc_auth  # wandb brings it along

    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not os.environ.get("WANDB_API_KEY") and not get_netrc_auth(address):
        return "no API key; `wandb login` sets one"
    url = urlparse(address)
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return ""
    except OSError as error:
        return f"{host} cannot be reached: {error}"
