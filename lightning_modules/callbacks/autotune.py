"""The callback that measures how a run computes its layers the fastest, before it begins."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.callbacks.replaced_parameters import keeps_whole_parameters
from lightning_modules.tensorized import budget_rules, tensorized_net, training_input
from lightning_modules.timing_report import timed
from lightning_modules.tuning import tune
from tnlayers.errors import UserError
from tnlayers.tracing import factorized_layers

__all__ = ["Autotune"]


class Autotune(Callback):
    """Measures each factorized layer where it will run, and has it computed in the fastest way; see `tnlayers.autotune`.

    `fit` does so before its first step, on its device, in its precision and with its batch, and `compress` before it reports. No value
    changes by more than rounding; two runs with the same seed may therefore differ by that. A plan that a rule names stays. A run
    that is resumed measures nothing, so that it goes on exactly with the plans that its checkpoint has.

    It works on any LightningModule; `lightning_modules.tensorized` says what a module may tell it.

    Args:
        enabled: whether to measure. Under `--trainer.deterministic` nothing is measured in any case, and where the strategy
            shards the parameters nothing can be.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled, self._resumed = enabled, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._resumed = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = True

    def measures(self, trainer: Trainer) -> bool:
        """Tells whether it has anything to do in a run of this trainer."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        return self.enabled and not deterministic and keeps_whole_parameters(trainer.strategy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = tensorized_net(pl_module)
        if self._resumed or not self.measures(trainer) or not factorized_layers(net):
            return
        try:
            example = training_input(pl_module)
        except UserError as error:
            rank_zero_info(f"layers are not timed: {error}")
            return
        found = tune(trainer, net, budget_rules(pl_module), example)
        rank_zero_info(f"timed       {timed(found) if found else 'nothing: the rules name the plans of all layers'}")
