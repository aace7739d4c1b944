"""Moving averages of networks whose layers are factorized, or change their rank."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from tnlayers import FactorizedLayer
from tnlayers.errors import as_checkpoint_error

__all__ = ["EMA"]


class EMA(EMAWeightAveraging):
    """Averages like Lightning's `EMAWeightAveraging` (same arguments), starting from the module as it goes into training.

    Lightning's own copies the module before the module's `setup` and before a checkpoint is restored, which both may factorize
    layers. Its exchange of weights for their averages follows `eval()` and writes through `.data`, which layers do not see.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._average_model = None
        self._restored: dict[str, Any] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._restored = checkpoint
        else:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")
        if self._restored:
            with as_checkpoint_error("the checkpoint has averages that do not fit; begin anew without them", Exception):
                super().on_load_checkpoint(trainer, pl_module, self._restored)
            self._restored = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        _merge_again(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        _merge_again(pl_module)


def _merge_again(module: LightningModule) -> None:
    for layer in module.modules():
        if isinstance(layer, FactorizedLayer):
            layer.train(layer.training)
