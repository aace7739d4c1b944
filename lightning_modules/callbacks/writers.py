"""When predictions and the configuration are written; what is written comes from elsewhere."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor

from lightning_modules.data import ImageData
from lightning_modules.loggers import log_config, run_folder
from tnlayers.files import write_files

__all__ = ["PredictionWriter", "RunConfig"]


class PredictionWriter(BasePredictionWriter):
    """Writes predictions.csv to the run's folder: the picture (its file, or its place), the class and its probability."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch_and_epoch")
        self._rows: list[tuple[int, int, float]] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert batch_indices is not None
        best, classes = prediction.max(dim=1)
        self._rows += zip(batch_indices, classes.tolist(), best.tolist(), strict=True)

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        rows, self._rows = _of_all_processes(self._rows, trainer), []
        if not trainer.is_global_zero:
            return
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        names, pictures = data.class_names, data.picture_names()
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(("picture", "class", "probability"))
        for place, label, probability in sorted(rows):
            if place < len(pictures):  # the others are padding
                writer.writerow((pictures[place], names[label], round(probability, 6)))
        write_files(run_folder(trainer), {"predictions.csv": file.getvalue()})


def _of_all_processes(rows: list[Any], trainer: Trainer) -> list[Any]:
    if trainer.world_size == 1:
        return rows
    parts: list[list[Any]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


class RunConfig(SaveConfigCallback):
    """Keeps the full configuration with the run: config.yaml in its folder, and what its loggers take.

    A run that goes on with another configuration keeps the first, and gets config-resumed-1.yaml, and so on. Checkpoints
    know the versions of their run's loggers, with which it goes on.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.loggers:
            return
        text = self.parser.dump(self.config, skip_unset=False)
        folder = run_folder(trainer)
        path, number = folder / "config.yaml", 0
        while path.is_file() and path.read_text("utf-8") != text:
            number += 1
            path = folder / f"config-resumed-{number}.yaml"
        write_files(folder, {path.name: text})
        for logger in trainer.loggers:  # again, too: a killed process may not have got it to the disk
            log_config(logger, path.stem.replace("config", "cli", 1), text)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["logger_versions"] = {type(logger).__name__: logger.version for logger in trainer.loggers}
