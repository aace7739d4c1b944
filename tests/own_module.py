"""LightningModules in a user's file, which know nothing of image classifiers: a U-Net for segmentation, and two nets that compete.

    python -m tests.own_module FOLDER [STEP]

Trains the U-Net in FOLDER, or goes on there; kills its own process after that step.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.callbacks import EMA, CompressionLog, Interruptible, RankSchedule, RunCheckpoint
from lightning_modules.loggers import CSV, WandB
from lightning_modules.tensorized import TensorizedCheckpoint
from lightning_modules.trainer import CompressionTrainer
from tests.processes import Signalled
from tnlayers import ParamsKept, Rule, Tucker, tensorize

EPOCHS, STEPS = 4, 5  # an epoch has 5 steps
RANKS: dict[int | str, int | str] = {1: "ParamsKept(0.4)", 3: "AccuracyDrop(0.1)"}


def shapes(number: int, seed: int) -> TensorDataset:
    """Pictures of bright discs on noise, float32 (n, 1, 16, 16), and the discs' masks (n, 1, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    x, y, radius = torch.rand(3, number, 1, 1, 1, generator=generator)
    masks = ((rows - 4 - 8 * x) ** 2 + (columns - 4 - 8 * y) ** 2 < (2 + 2 * radius) ** 2).float()
    return TensorDataset(masks + torch.randn(masks.shape, generator=generator) / 2, masks)


class Discs(LightningDataModule):
    """Loaders as most people write them: shuffled by torch's own generator."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(shapes(40, 0), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(shapes(16, 1), batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        convs = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        super().__init__(convs[0], nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout2d(0.1), convs[1], nn.ReLU())


class UNet(TensorizedCheckpoint):
    """Two scales; cross-entropy and the Dice loss. The first budget leaves some convolutions dense."""

    def __init__(self, width: int = 8, kept: float = 0.6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.down, self.bottom, self.up = Block(1, width), Block(width, 2 * width), Block(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)
        self.example_input_array = torch.zeros(8, 1, 16, 16)
        self.rules = [Rule("*.4", Tucker(ParamsKept(kept))), Rule("up.0", Tucker(ParamsKept(kept)))]
        tensorize(self, self.rules, init="random", example_input=self.example_input_array)

    def forward(self, pictures: Tensor) -> Tensor:
        fine = self.down(pictures)
        coarse = F.interpolate(self.bottom(F.max_pool2d(fine, 2)), scale_factor=2)
        return self.head(self.up(torch.cat([fine, coarse], dim=1)))

    def losses(self, batch: list[Tensor]) -> Tensor:
        logits, masks = self(batch[0]), batch[1]
        overlap = 2 * (logits.sigmoid() * masks).sum() / (logits.sigmoid().sum() + masks.sum())
        return F.binary_cross_entropy_with_logits(logits, masks) + 1 - overlap

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.loss = self.losses(batch)  # kept with its graph, as some people do
        self.log("train/loss", self.loss, on_step=True, on_epoch=True)
        return self.loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.losses(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.losses(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).sigmoid()

    def accuracy_of(self, net: nn.Module) -> float:
        """The overlap of the discs that are found with those that are there."""
        pictures, masks = shapes(16, 1).tensors
        found = net(pictures) > 0
        return float((found & masks.bool()).sum() / (found | masks.bool()).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Rivals(LightningModule):
    """A generator of discs and a critic of them, each with an optimizer of its own, which make their steps by hand."""

    tensorized = "generator"
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(4, 32), nn.ReLU(), nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 16, 3, padding=1), nn.ReLU()
        self.generator = nn.Sequential(*layers, nn.Upsample(scale_factor=4), nn.Conv2d(16, 1, 3, padding=1))
        self.critic = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 1))
        self.example_input_array = torch.zeros(8, 4)
        tensorize(self.generator, [Rule("3", Tucker(8))], init="random")

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real, (first, second) = batch[1], self.optimizers()  # type: ignore[misc]
        self.made = self(torch.randn(len(real), 4))
        steps = (first, -self.critic(self.made).mean()), (second, self.critic(self.made.detach()).mean())
        for optimizer, loss in steps:
            loss = loss - self.critic(real).sigmoid().log().mean() if optimizer is second else loss
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train/loss", loss, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.generator, self.critic)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(shapes(40, 0), batch_size=8, shuffle=True)


def train(folder: Path, *callbacks: Callback) -> None:
    last = folder / "last.ckpt"
    seed_everything(0, verbose=False)
    saved = RunCheckpoint(dirpath=folder, save_last=True)
    trainer = CompressionTrainer(
        max_epochs=EPOCHS,
        callbacks=[RankSchedule(RANKS), EMA(decay=0.8), CompressionLog(), Interruptible(), saved, *callbacks],
        logger=[CSV(folder, name="logs", version=""), WandB(save_dir=str(folder), version="one", offline=True)],
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    module, data = UNet(), Discs()
    trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None)
    torch.save(torch.cat(trainer.predict(module, data)), folder / "predictions.pt")  # type: ignore[arg-type]


if __name__ == "__main__":
    from tests import own_module

    own_module.train(Path(sys.argv[1]), *[Signalled("SIGKILL", int(step)) for step in sys.argv[2:]])
