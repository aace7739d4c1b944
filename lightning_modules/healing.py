"""Healing as a stage of `compress`: on the run's device, in its precision and layout, from unlabelled training pictures."""

from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_modules.classifier import ImageClassifier
from lightning_modules.console import progress_of
from lightning_modules.data import ImageData
from tnlayers import Healed, heal
from tnlayers.errors import UserError

__all__ = ["Healing", "heal_slices", "healed_sentence"]

_FEWEST = 4  # two batches, each of which has a variance


@dataclass(frozen=True)
class Healing:
    """How a compressed net learns from the dense one, slice by slice, without labels; see `tnlayers.heal`.

    Args:
        pictures: how many training pictures it takes; 0 heals nothing, and 1024 is a good number.
        steps: of training each slice; 0 only fits the factors to the outputs of the dense layers.
        rate: the learning rate of the first step.

    Raises:
        UserError: a number below 0.
    """

    pictures: int = 0
    steps: int = 60
    rate: float = 3e-3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise UserError(f"healing.{name} is {value}: expected a number of at least 0")
        if 0 < self.pictures < _FEWEST:
            raise UserError(
                f"healing.pictures is {self.pictures}: expected 0, or at least {_FEWEST} pictures to learn from"
            )


def heal_slices(
    trainer: Trainer, model: ImageClassifier, dense: nn.Module, data: ImageData, healing: Healing
) -> list[Healed]:
    """Heals a classifier's net in place, on the trainer's device; every process does the same.

    Args:
        trainer: its device and precision hold, and a bar shows how far it is where the trainer shows bars.
        model: holds the net, with factorized layers.
        dense: what it was made of.
        data: gives the pictures.
        healing: how.

    Returns:
        What became of each slice.
    """
    wanted = min(healing.pictures, data.num_train)
    if wanted < _FEWEST:
        raise UserError(f"there are {wanted} training pictures; healing needs {_FEWEST} or more")
    drawn = torch.cat(data.calibration_batches(-(-wanted // data.batch_size)))[:wanted]
    parts = drawn.to(model.dtype).tensor_split(max(2, min(round(wanted / data.batch_size), wanted // 2)))
    batches = [part.contiguous(memory_format=torch.channels_last) for part in parts]
    device = trainer.strategy.root_device
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    model.net.to(device)
    dense.to(device)
    with trainer.precision_plugin.forward_context(), progress_of("healing the slices", shown=shown) as progress:
        found = heal(model.net, dense, batches, steps=healing.steps, rate=healing.rate, progress=progress)
    model.net.cpu()
    dense.cpu()
    return found


def healed_sentence(found: list[Healed], healing: Healing, num_train: int) -> str:
    """Tells in one line what healing did to the errors of the slices."""
    stages = [[one.before for one in found], [one.refitted for one in found], [one.after for one in found]]
    before, refitted, after = (f"{sum(errors) / max(len(errors), 1):.3f}" for errors in stages)
    trained = f", {after} after {healing.steps} steps of each" if healing.steps else ""
    return (
        f"healed      {len(found)} slices with {min(healing.pictures, num_train):,} unlabelled pictures: relative squared error of "
        f"their outputs, on average {before}, {refitted} with fitted factors{trained}"
    )
