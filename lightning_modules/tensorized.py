"""What callbacks ask of a LightningModule with factorized layers, and checkpoints that carry those layers.

Any LightningModule will do: each question has a default. A module answers one itself where it defines

- `tensorized`: the name of the submodule that holds the factorized layers, such as "generator". By default it is the
  LightningModule itself.
- `example_input`: what that module takes, a tensor or a tuple of tensors, with the batch that plans are chosen for. By default
  it is Lightning's `example_input_array`.
- `training_input`: the same with the batch and the memory format of training, for which `Autotune` measures plans. By default it
  is `example_input`.
- `rules`: the list of `tnlayers.Rule` by which it was tensorized. A later budget then counts the layers that they left dense too.
- `accuracy_of(net)`: a method that returns a number from 0 to 1, how good a copy of that module is on validation data. `AccuracyDrop`
  asks for it.
"""

import copy
import inspect
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from tnlayers import Rule
from tnlayers.errors import UserError
from tnlayers.saved_layers import restructure, structure_of
from tnlayers.tracing import Example, map_tensors, tensors_in

__all__ = [
    "TensorizedCheckpoint",
    "budget_rules",
    "checkpoint_path",
    "copied",
    "example_input",
    "tensorized_net",
    "trainer_of",
    "training_input",
]


def tensorized_net(module: LightningModule) -> nn.Module:
    """Returns the module that holds the factorized layers; the names of layers are those that they have in it.

    Raises:
        UserError: the module names a submodule that it does not have.
    """
    name = _said(module, "tensorized", "")
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = ", ".join(child for child, _ in module.named_children())
        raise UserError(
            f"{type(module).__name__}.tensorized is {name!r}, and there is no such submodule; expected a name such as one of {names}"
        ) from None


def example_input(module: LightningModule) -> Example:
    """Returns what `tensorized_net` takes, on the module's device and in its precision.

    Raises:
        UserError: the module has no example.
    """
    given = _said(module, "example_input", None)
    given = module.example_input_array if given is None else given
    if next(tensors_in(given), None) is None:
        raise UserError(
            f"{type(module).__name__}.example_input_array is {'None' if given is None else f'a {type(given).__name__}'}, and "
            "multiply-accumulates are counted with it; expected a tensor or a tuple of tensors, or a dict of keyword "
            "arguments with tensors, such as self.example_input_array = torch.zeros(1, 3, 32, 32) in __init__"
        )
    dtype: Any = module.dtype
    return map_tensors(given, lambda value: value.to(module.device, dtype if value.is_floating_point() else None))


def training_input(module: LightningModule) -> Example:
    """Returns what `tensorized_net` takes in training.

    Raises:
        UserError: the module has no example.
    """
    given = _said(module, "training_input", None)
    return example_input(module) if given is None else given


def budget_rules(module: LightningModule) -> list[Rule]:
    """Returns the rules that say which dense layers a budget counts, none by default."""
    rules = _said(module, "rules", None)
    return [rule for rule in rules if isinstance(rule, Rule)] if isinstance(rules, list | tuple) else []


def _said(module: LightningModule, name: str, default: Any) -> Any:
    """Returns the attribute; a property is called itself, since `nn.Module` takes one that raises an AttributeError for missing."""
    found = inspect.getattr_static(type(module), name, None)
    return found.__get__(module) if isinstance(found, property) else getattr(module, name, default)


def copied(net: nn.Module) -> nn.Module:
    """Copies a net. Results of a step that a LightningModule keeps as attributes, which torch cannot copy, are shared."""
    kept = [value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(net, {id(value): value for value in kept if not value.is_leaf})


def trainer_of(module: LightningModule) -> Trainer | None:
    """Returns the module's trainer; None for a module that has none yet."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def checkpoint_path(module: LightningModule) -> str:
    """Names the checkpoint that a trainer restores the module from, for messages."""
    trainer = trainer_of(module)
    return str((trainer and trainer.ckpt_path) or "the checkpoint")


class TensorizedCheckpoint(LightningModule):
    """A LightningModule whose checkpoints carry its factorized layers, and which takes these from a checkpoint.

    `load_from_checkpoint`, and a `ckpt_path` of the trainer, restore the methods and ranks of a net that was tensorized or
    truncated, whatever the module's constructor and `setup` make of it. Nothing that a file names is imported.

    It stands first among the bases: `class MyModule(TensorizedCheckpoint, TheirModule)` adds it to a class of somebody else's.
    A class that defines `on_save_checkpoint` or `on_load_checkpoint` itself calls those of `super()` there.
    A callback cannot do this: Lightning asks callbacks only after it has loaded the weights, and not at all in
    `load_from_checkpoint`.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["tensorization"] = structure_of(tensorized_net(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        restructure(tensorized_net(self), checkpoint.get("tensorization"), checkpoint_path(self))
