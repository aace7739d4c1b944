"""The callback that truncates during training: when ranks fall, and what has to follow."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_modules.callbacks.compression_log import CompressionLog
from lightning_modules.callbacks.rank_steps import Step, steps_of
from lightning_modules.callbacks.replaced_parameters import (
    callbacks_of,
    check_strategy,
    follow_average,
    follow_optimizers,
    follow_strategy,
    reset_scores,
)
from lightning_modules.run_folders import newest_checkpoint
from lightning_modules.tensorized import (
    TensorizedCheckpoint,
    budget_rules,
    copied,
    example_input,
    tensorized_net,
)
from tnlayers import CheckpointError, MacsKept, ParamsKept, Rule, fraction_kept, rules_from_plain, truncate
from tnlayers.errors import UserError, about, as_checkpoint_error, message, shortened
from tnlayers.tracing import factorized_layers

__all__ = ["RankSchedule"]


class RankSchedule(Callback):
    """Truncates the factorized layers at the start of epochs, and training goes on with the smaller factors.

    It works on any LightningModule; `lightning_modules.tensorized` says what a module may tell it. Layers that the module's rules
    match, and that its first budget left dense, are factorized once a later budget wants it.

    Optimizer and schedulers stay; the moments of factors that changed begin anew, and so do their moving averages (`EMA`),
    the best checkpoint, early stopping and plateaus. Under DDP the ranks are decided once. A resumed run goes on where
    the schedule was.

    Args:
        ranks: {epoch: rank}, epochs counted from 0 as Lightning does, so that at 2 two epochs have been trained. A rank is
            an int, `ParamsKept(0.5)`, `MacsKept(0.5)` (fractions of the dense layers), `RelativeError(0.1)` or
            `AccuracyDrop(0.01)`: as far as the validation accuracy allows. A range "4-8" of epochs goes down to its
            budget gradually, by the same factor in every epoch of it.
        pattern: which layers; `*`, `?` and `[...]` as in file names.

    Raises:
        UserError: an entry that is not understood, or two for the same epoch.
    """

    def __init__(self, ranks: dict[int | str, int | str] | None = None, pattern: str = "*") -> None:
        self.pattern = pattern
        self.steps = steps_of(ranks or {})
        self.applied: dict[int, str] = {}

    @property
    def state_key(self) -> str:
        # There may be one for each kind of layer, beside the one of the command line that does nothing unless asked.
        return self._generate_state_key(pattern=self.pattern if self.steps else None)

    def state_dict(self) -> dict[str, Any]:
        return {"applied": dict(self.applied)} if self.steps else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with as_checkpoint_error(
            "the checkpoint has a rank schedule that is not understood", Exception
        ):  # whatever it may hold
            self.applied = {int(epoch): shortened(str(step), 60) for epoch, step in state_dict["applied"].items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not self.steps:
            return
        if not isinstance(pl_module, TensorizedCheckpoint):
            rank_zero_warn(
                f"checkpoints of {type(pl_module).__name__} will not say which layers RankSchedule has truncated: make "
                "lightning_modules.TensorizedCheckpoint the first of its bases"
            )
        check_strategy(trainer, "RankSchedule")
        late = [epoch for epoch in self.steps if trainer.max_epochs not in (None, -1) and epoch >= trainer.max_epochs]
        if late:
            raise UserError(
                f"RankSchedule has epoch {late[0]}, and training ends before it: max_epochs {trainer.max_epochs}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what cannot be done before training, rather than when its epoch comes."""
        if self.steps and any(isinstance(each, torch.optim.LBFGS) for each in trainer.optimizers):
            raise UserError(
                "RankSchedule cannot change ranks under LBFGS, which keeps one vector of all parameters; train with another optimizer, "
                "or truncate between runs"
            )
        for epoch, step in self.steps.items():
            if epoch in self.applied or epoch < trainer.current_epoch:
                if self.applied.get(epoch) != str(step):
                    raise UserError(
                        f"RankSchedule has {step} at epoch {epoch}, and this run is at epoch {trainer.current_epoch}, having "
                        f"had {self.applied.get(epoch, 'no truncation')} there; change the epochs that are still to come"
                    )
                continue
            with about(f"RankSchedule at epoch {epoch}"):
                step.check(pl_module, self.pattern)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heed(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Does the same: a run that goes on from the end of an epoch may have no `on_train_epoch_start`."""
        self._heed(trainer, pl_module)

    def _heed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch not in self.steps or epoch in self.applied:
            return
        rules = self._decided(trainer, pl_module, self.steps[epoch])
        self.applied[epoch] = str(self.steps[epoch])
        if rules:
            _apply(trainer, pl_module, rules)
        else:
            rank_zero_info(f"epoch {epoch}: nothing to truncate, {self.steps[epoch]} is kept already")

    def _decided(self, trainer: Trainer, module: LightningModule, step: Step) -> list[Rule]:
        """Returns the same rules in every process: rank 0 decides."""
        rules: list[dict[str, Any]] = []
        problem: Exception | None = None
        if trainer.is_global_zero:
            try:
                with about(f"RankSchedule at epoch {trainer.current_epoch}"):
                    _check_finite(trainer, module)
                    rules = [rule.to_plain() for rule in step.resolve(module, self.pattern)]
            except Exception as error:  # whatever it is, the other processes must not wait for rules
                problem = error
        rules, said = trainer.strategy.broadcast((rules, message(problem) if problem else None))
        if said is not None:
            raise problem or UserError(said)
        return rules_from_plain(rules)


def _check_finite(trainer: Trainer, module: LightningModule) -> None:
    """Checks that a training has not diverged, after which there is nothing to truncate.

    Raises:
        UserError: it has; the message names a layer and the newest checkpoint from before.
    """
    net = tensorized_net(module)
    spoilt = _not_finite(dict(net.named_parameters()))  # a buffer may be infinite from the start, as masks are
    if spoilt is None:
        return
    buffers = [name for name, _ in module.named_buffers()]
    found = {getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks}
    folders = [Path(folder) for folder in found if folder]
    good, fix = None, "no checkpoint whose weights are finite was kept, so begin anew"
    with suppress(CheckpointError):
        good = newest_checkpoint(folders, lambda checkpoint: _has_finite_weights(checkpoint, buffers))
    if good:
        fix = f"go on from {good.path}, the newest checkpoint whose weights are finite"
    layer, _, weight = spoilt.partition(".factors.") if ".factors." in spoilt else spoilt.rpartition(".")
    raise UserError(
        f"{layer or type(net).__name__}: the values of its {weight} are not finite any more, the training has diverged; {fix}, with "
        "a smaller learning rate"
    )


def _has_finite_weights(checkpoint: dict[str, Any], buffers: Sequence[str]) -> bool:
    state = checkpoint["state_dict"]
    if not isinstance(state, Mapping):
        return False
    return _not_finite({key: value for key, value in state.items() if key not in buffers}) is None


def _not_finite(state: Mapping[str, Any]) -> str | None:
    """Returns the first key whose values are not all finite."""
    tensors = ((key, value) for key, value in state.items() if isinstance(value, Tensor))
    return next((key for key, value in tensors if not torch.isfinite(value).all()), None)


def _apply(trainer: Trainer, module: LightningModule, rules: list[Rule]) -> None:
    """Truncates the net, and lets everything follow that holds its parameters."""
    net = tensorized_net(module)
    reference, before = copied(net), dict(module.named_parameters())
    errors = truncate(net, rules)
    after = dict(module.named_parameters())
    present = {name: layer.spec for name, layer in factorized_layers(reference).items()}  # some change their plan alone
    layers = factorized_layers(net)
    truncated = [layers[name] for name in errors if present.get(name) != layers[name].spec]
    factors = {factor for layer in truncated for factor in layer.factors.values()}
    follow_optimizers(trainer.optimizers, before, after, {name for name, value in after.items() if value in factors})
    follow_strategy(trainer)
    follow_average(trainer, errors)
    reset_scores(trainer)
    torch.compiler.reset()  # or a compiled net would give up after some distinct ranks, and run uncompiled
    for callback in callbacks_of(trainer):
        if isinstance(callback, CompressionLog):
            callback.truncated(trainer, module, reference, trainer.current_epoch)
    worst, example, of = max(errors, key=errors.__getitem__), example_input(module), budget_rules(module)
    params, macs = (fraction_kept(net, by, example, rules=of) for by in (ParamsKept, MacsKept))
    rank_zero_info(
        f"epoch {trainer.current_epoch}: truncated {', '.join(errors)}; of the layers under rules {params:.1%} of the parameters "
        f"and {macs:.1%} of the MACs are left; largest relative error {errors[worst]:.3f} ({worst})"
    )
