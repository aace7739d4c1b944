"""Callbacks that write a run's predictions and its configuration."""

import csv
import io
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
    """Writes a module's predictions to the run's folder.

    Of pictures (`ImageData`) predictions.csv names each one (its file, or its place), its class and the class's probability. Of
    other data predictions.pt has what `predict_step` returned for each batch: a list of (places in the data, prediction).
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        loaders = [predictions] if len(batch_indices) == 1 else predictions
        mine = [pair for each in zip(batch_indices, loaders, strict=True) for pair in zip(*each, strict=True)]
        pairs = _of_all_processes(mine, trainer)
        if not trainer.is_global_zero:
            return
        data, file = trainer.datamodule, io.BytesIO()  # type: ignore[attr-defined]
        if isinstance(data, ImageData):
            write_files(run_folder(trainer), {"predictions.csv": _table(data, pairs)})
        else:
            torch.save(pairs, file)
            write_files(run_folder(trainer), {"predictions.pt": file.getbuffer()})


def _table(data: ImageData, pairs: list[tuple[list[int], Tensor]]) -> str:
    rows: list[tuple[int, int, float]] = []
    for places, probabilities in pairs:
        best, classes = probabilities.max(dim=1)
        rows += zip(places, classes.tolist(), best.tolist(), strict=True)
    names, pictures = data.class_names, data.picture_names()
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("picture", "class", "probability"))
    for place, label, probability in sorted(rows):
        if place < len(pictures):  # the others are padding
            writer.writerow((pictures[place], names[label], round(probability, 6)))
    return file.getvalue()


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
