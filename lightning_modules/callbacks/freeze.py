"""The callback that trains a part of a net and leaves the rest as it is."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_modules.tensorized import tensorized_net
from tnlayers.errors import UserError

__all__ = ["Freeze"]


class Freeze(Callback):
    """Leaves modules of a net untrained, with all that is in them, and in evaluation mode.

    BatchNorm's statistics stay as well, and weights that factors make are made once. Lightning's `BaseFinetuning` lets
    BatchNorm normalise by the batch, which is not how the net is evaluated.

    Args:
        patterns: the modules' names in the net that is tensorized, such as "features"; `*`, `?` and `[...]` as in file names.

    Raises:
        ValueError: a pattern that no module has, when training starts.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Before the optimizer is made of what requires a gradient; layers that are factorized after this keep it so.
        for module in self._modules(pl_module):
            module.requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not at the start of each epoch, which a run that goes on in the middle of one does not see.
        for module in self._modules(pl_module):
            module.eval()

    def _modules(self, pl_module: LightningModule) -> list[nn.Module]:
        named = dict(tensorized_net(pl_module).named_modules())
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise UserError(
                    f"patterns: no module is called {pattern!r}; expected one of {', '.join(list(named)[1:])}"
                )
        return [module for name, module in named.items() if any(fnmatchcase(name, each) for each in self.patterns)]
