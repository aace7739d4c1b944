"""The followers of a network's parameters, when these are replaced during training: optimizers, replicas, averages and records."""

import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_modules.tensorized import tensorized_net
from tnlayers.errors import UserError

__all__ = [
    "callbacks_of",
    "check_replicas",
    "check_strategy",
    "follow_average",
    "follow_optimizers",
    "follow_strategy",
    "keeps_whole_parameters",
    "reset_scores",
]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns all of a trainer's callbacks, which Lightning's types do not tell."""
    return trainer.callbacks  # type: ignore[attr-defined]


def keeps_whole_parameters(strategy: Strategy) -> bool:
    """Tells whether every process holds all the parameters, as plain tensors. DeepSpeed's strategy is a DDP by inheritance alone."""
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    return whole and not isinstance(strategy, DeepSpeedStrategy)


def check_strategy(trainer: Trainer, what: str) -> None:
    """Checks that parameters can be replaced during training.

    Raises:
        ValueError: the strategy shards them, or averages them in a way that holds on to the old ones.
    """
    if not keeps_whole_parameters(trainer.strategy):
        raise UserError(
            f"{what} cannot change ranks under {type(trainer.strategy).__name__}, which shards the parameters; train with "
            "--trainer.strategy ddp, or truncate between runs: tnlayers compress, then fit"
        )
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks_of(trainer)):
        raise UserError(
            f"{what} cannot change ranks under StochasticWeightAveraging; average by lightning_modules.callbacks.EMA"
        )


def follow_optimizers(
    optimizers: Sequence[Optimizer],
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    changed: Collection[str],
) -> None:
    """Puts the new parameters into the places of the old ones, in the same optimizers.

    Factors take the place of the dense weight that they make. The order is the one in which the optimizer would be made anew,
    since a checkpoint tells its parameters by their places. The state of what changed (moments, momentum) is dropped: it is about a
    basis that is no longer there. Everything else keeps its state, and schedulers keep their optimizer.

    Args:
        optimizers: changed in place.
        before: all parameters by name.
        after: the same, with new ones where shapes changed.
        changed: names in `after` of those whose values are new.
    """
    names: dict[Any, str] = {parameter: name for name, parameter in before.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            now = _in_place(group["params"], group.get("param_names"), names, after)
            group["params"][:] = [parameter for _, parameter in now]  # in place, for optimizers that keep the list
            if "param_names" in group:
                group["param_names"] = [name for name, _ in now]
        state = {name: optimizer.state.pop(old) for old, name in names.items() if old in optimizer.state}
        for name in state.keys() & after.keys() - set(changed):
            optimizer.state[after[name]] = state[name]


def _in_place(
    group: Sequence[Any], labels: Sequence[str] | None, names: Mapping[Any, str], after: Mapping[str, nn.Parameter]
) -> list[tuple[str, Any]]:
    """Returns (label, parameter) for a group of an optimizer: those of a layer that is factorized now in the layer's own order.

    What is no parameter of the module (a loss may have its own) stays as it is.
    """
    held = {names[parameter] for parameter in group if parameter in names}
    factorized, placed = {_layer(name) for name in held - after.keys()}, set[str]()
    now: list[tuple[str, Any]] = []
    for label, old in zip(labels or [names.get(old, "") for old in group], group, strict=True):
        name = names.get(old)
        if name is None or _layer(name) not in factorized:
            now.append((label, after[name] if name else old))
        elif (layer := _layer(name)) not in placed:  # at the first of the layer's old parameters
            placed.add(layer)
            mine = [each for each in after if _layer(each) == layer and {each, _weight_of(each)} & held]
            now += [(each, after[each]) for each in mine]
    return now


def _weight_of(name: str) -> str:
    """Returns the name of the dense weight that a factor makes, or the name itself."""
    layer, is_factor, _ = name.rpartition(".factors.")
    return f"{layer}.weight" if is_factor else name


def _layer(name: str) -> str:
    return _weight_of(name).rpartition(".")[0]


def follow_strategy(trainer: Trainer) -> None:
    """Wraps the module anew under DDP, whose reducer holds the old parameters. This also sends rank 0's weights to all."""
    strategy, module = trainer.strategy, trainer.lightning_module
    if isinstance(strategy, DDPStrategy):
        strategy.model = module  # the old wrapper goes first, and takes its hooks along
        strategy.configure_ddp()
        check_replicas(trainer, module)


def check_replicas(trainer: Trainer, module: nn.Module) -> None:
    """Checks that every process has the same weights, bit for bit.

    Raises:
        RuntimeError: they differ; training on would diverge silently.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    same = trainer.strategy.broadcast(digest.hexdigest()) == digest.hexdigest()
    if not trainer.strategy.reduce_boolean_decision(same, all=True):
        raise RuntimeError(
            "the processes have different weights after a truncation; this is a bug in tnlayers, please report it"
        )


def follow_average(trainer: Trainer, layers: Collection[str]) -> None:
    """Lets moving averages begin anew: averages of truncated factors are in another basis, and the others belong to them."""
    module = trainer.lightning_module
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model.module
            assert isinstance(average, LightningModule)
            net, averages = tensorized_net(module), tensorized_net(average)
            for name in layers:
                device = next(averages.get_submodule(name).parameters()).device
                averages.set_submodule(name, copy.deepcopy(net.get_submodule(name)).to(device))
            average.load_state_dict(module.state_dict())


def reset_scores(trainer: Trainer) -> None:
    """Begins a new record for checkpoints, early stopping and plateau schedulers: what was best before belongs to a larger net.

    Checkpoints that were the best so far stay on the disk.
    """
    for callback in callbacks_of(trainer):
        if not isinstance(callback, (ModelCheckpoint, EarlyStopping)):
            continue
        worst = torch.tensor(_worst(callback.mode))
        if isinstance(callback, EarlyStopping):
            callback.wait_count, callback.best_score = 0, worst
        elif callback.monitor is not None:
            callback.best_k_models, callback.kth_value = {}, worst
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = callback.current_score = None
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.best = _worst(config.scheduler.mode)
            config.scheduler.num_bad_epochs = config.scheduler.cooldown_counter = 0


def _worst(mode: str) -> float:
    return float("inf" if mode == "min" else "-inf")
