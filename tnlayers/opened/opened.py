"""What all opened modules share: children that are linears, and a state dict that may also be the closed module's."""

from abc import abstractmethod
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from tnlayers.errors import UserError
from tnlayers.leaf import Leaf

__all__ = ["Opened", "State", "linear", "stacked", "twin"]

M = TypeVar("M", bound=nn.Module)
State = dict[str, Tensor]


class Opened(Leaf):
    """A module that computes what another one does, whose linears are children of its own.

    The children are plain `nn.Linear` layers until somebody replaces them, by layers with the same call. Where nothing else
    is said they hold the very Parameters of the module that was opened.

    Attributes:
        kind: the name of the type of that module.
        folded: how many parameters of that module the children do without.
        in_view: whether it stands in a view, so that the model still has that module.
    """

    kind: str = ""
    folded: int = 0
    in_view: bool = False

    @classmethod
    @abstractmethod
    def of(cls, dense: Any) -> Self | None:
        """Opens a module, which is not changed: the same parameters, mode, device and dtype; None if it cannot be opened."""

    @abstractmethod
    def closed(self) -> nn.Module:
        """Returns the module that was opened, with the parameters that the children have now.

        Raises:
            UserError: a child is no plain `nn.Linear`.
        """

    @abstractmethod
    def renamed(self, state: State) -> State:
        """Translates a state dict of the closed module to the children's keys; keys that are theirs already stay."""

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The children that take part as linears, by name."""
        return dict(self.named_children())

    @property
    def is_plain(self) -> bool:
        """Whether it can be closed: every linear is torch's own."""
        return all(type(layer) is nn.Linear for layer in self.linears.values())

    def _check_plain(self) -> None:
        for name, layer in self.linears.items():
            if type(layer) is not nn.Linear:
                raise UserError(
                    f"{name} is a {type(layer).__name__}, which no closed module holds: make it dense first"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes a state of the closed module too."""
        keys = [key for key in state_dict if key.startswith(prefix)]
        given = {key.removeprefix(prefix): state_dict.pop(key) for key in keys}
        state_dict.update({prefix + key: value for key, value in self.renamed(given).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Makes a layer (..., i) -> (..., o) that holds these very parameters: a weight (o, i) and a bias (o,)."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def stacked(parts: list[nn.Parameter]) -> nn.Parameter:
    """Joins parameters along their first axis in a new one, which trains if one of them does."""
    trains = any(part.requires_grad for part in parts)
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=trains)


def twin(module: nn.Module, kind: type[M]) -> M:
    """Makes a shallow copy of a module, of a class: the same children, parameters and buffers, in dicts of its own."""
    made = kind.__new__(kind)
    own = ("_modules", "_parameters", "_buffers")
    made.__dict__.update({key: dict(value) if key in own else value for key, value in module.__dict__.items()})
    return made
