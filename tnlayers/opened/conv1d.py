"""The `Conv1D` of Hugging Face's transformers (GPT-2), which is a linear layer whose weight is (inputs, outputs)."""

import sys
from typing import Any, Self

import torch
from torch import Tensor, nn

from tnlayers.opened.opened import Opened, State, linear

__all__ = ["OpenedConv1D", "is_conv1d"]


def is_conv1d(module: nn.Module) -> bool:
    """Tells whether a module is transformers' `Conv1D`, without importing transformers."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is getattr(library, "Conv1D", None)


class OpenedConv1D(Opened):
    """Drop-in for transformers' `Conv1D`, (..., i) in, (..., o) out; its one linear is `linear`.

    The linear's weight is the transposed view of the same memory, in a Parameter of its own; its bias is the very Parameter.
    """

    linear: Any
    _kind: Any  # transformers' class

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.nx, self.nf, self._kind = dense.nx, dense.nf, type(dense)

    @classmethod
    def of(cls, dense: Any) -> Self:
        opened = cls(dense)
        weight = nn.Parameter(dense.weight.detach().t(), requires_grad=dense.weight.requires_grad)
        opened.linear = linear(weight, dense.bias)
        return opened.train(dense.training)

    def closed(self) -> nn.Module:
        self._check_plain()
        with torch.device("meta"):
            dense = self._kind(self.nf, self.nx)
        weight = self.linear.weight
        # Files of safetensors hold contiguous tensors only; what was opened from one still shares its memory.
        dense.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
        dense.bias = self.linear.bias
        return dense.train(self.training)

    def renamed(self, state: State) -> State:
        own = {key: value for key, value in state.items() if key not in ("weight", "bias")}
        if "weight" in state:
            own["linear.weight"] = state["weight"].t()
        if "bias" in state:
            own["linear.bias"] = state["bias"]
        return own

    @property
    def weight(self) -> Tensor:
        """The dense weight (i, o), as transformers' module has it."""
        return self.linear.weight.t()

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
