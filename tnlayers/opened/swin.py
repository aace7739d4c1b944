"""torchvision's attention of Swin, which gives the weights of its layers to a function: `F.linear(x, self.qkv.weight)`.

A factorized layer in its place would build the dense weight for that at every call, so that parameters would be saved and
time would not. The opened attention gives that function what stands for the layers themselves.
"""

import sys
from collections.abc import Callable
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.opened.opened import Opened, State, twin

__all__ = ["OpenedWindowAttention", "is_window_attention"]


def is_window_attention(module: nn.Module) -> bool:
    """Tells whether a module is one of torchvision's two, without importing torchvision."""
    library = sys.modules.get("torchvision.models.swin_transformer")
    names = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
    return library is not None and any(type(module) is getattr(library, name, None) for name in names)


class OpenedWindowAttention(Opened):
    """Drop-in for torchvision's `ShiftedWindowAttention` and its V2; its linears are `qkv` and `proj`, the very same layers."""

    qkv: nn.Module
    proj: nn.Module
    _kind: Any  # torchvision's class

    @classmethod
    def of(cls, dense: nn.Module) -> Self:
        opened = twin(dense, cls)
        opened._kind = type(dense)
        return opened

    def closed(self) -> nn.Module:
        self._check_plain()
        dense = twin(self, self._kind)
        del dense._kind
        return dense

    def renamed(self, state: State) -> State:
        return state

    @property
    def linears(self) -> dict[str, nn.Module]:
        return {"qkv": self.qkv, "proj": self.proj}

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.models.swin_transformer import shifted_window_attention  # there is no such module without it

        return shifted_window_attention(
            x,
            _Weight(self.qkv),
            _Weight(self.proj),
            self._kind.get_relative_position_bias(self),
            self.window_size,
            self.num_heads,
            shift_size=self.shift_size,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            qkv_bias=self.qkv.bias,
            proj_bias=self.proj.bias,
            logit_scale=getattr(self, "logit_scale", None),
            training=self.training,
        )


class _Weight:
    """Stands for the weight of a layer where it is given to `F.linear`, which then calls the layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        assert function is F.linear, f"{function} takes no layer for a weight"
        assert not kwargs
        x, weight, bias = args
        y, own = weight.layer(x), weight.layer.bias
        return y if bias is own else y + (bias - own)  # the second version leaves a part of the bias out
