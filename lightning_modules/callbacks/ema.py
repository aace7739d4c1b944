"""Moving averages of networks whose layers are factorized, or change their rank."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from tnlayers import FactorizedLayer

__all__ = ["EMA"]


class EMA(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging` (same arguments), made of the net as it is once it has been tensorized or restored.

    Lightning's own copies the module before its `setup`, which is where layers are factorized. Its exchange of weights for their
    averages follows `eval()` and writes through `.data`, which layers do not see.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.setup(stage)
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        _merge_again(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        _merge_again(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:
            super().setup(trainer, pl_module, "fit")  # the structure is the checkpoint's now
        super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _merge_again(module: LightningModule) -> None:
    for layer in module.modules():
        if isinstance(layer, FactorizedLayer):
            layer.train(layer.training)
