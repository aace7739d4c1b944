"""The drop-in layers for every method. A class under one of them that names its `method` takes that method's options."""

from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.factorized import FactorizedLayer
from tnlayers.method import Factorization
from tnlayers.plan import PlanChoice

__all__ = ["FactorizedConv2d", "FactorizedLinear", "layer_type", "named_layers"]


class FactorizedConv2d(FactorizedLayer):
    """Signature and attributes of `nn.Conv2d`, plus `method` and `plan`; (n, i, h, w) or (i, h, w) in, (n, o, h', w') out.

    Args:
        plan: "auto" (the cheapest), "factors", "dense", or groups of factor names.
        options: the method, or the method's own options where the class fixes it: `rank` (an int, one int a bond,
            `ParamsKept`, `MacsKept` or `RelativeError`, the last from dense only), and others, such as `order` of MPS.

    Raises:
        ValueError: what nn.Conv2d refuses, a rank below 1, a bare float, a plan that is no partition of the factors.
    """

    dense_type = nn.Conv2d
    transposed = False
    output_padding = (0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        plan: PlanChoice = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        template = nn.Conv2d(*geometry, device="meta")  # type: ignore[arg-type]
        self._draw(template, self._method(**options), plan, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.plan(input.unsqueeze(0), self._weights(), self.bias).squeeze(0)
        return self.plan(input, self._weights(), self.bias)


class FactorizedLinear(FactorizedLayer):
    """Signature and attributes of `nn.Linear`, plus `method` and `plan`; (..., i) in, (..., o) out.

    Args:
        plan: "auto" (the cheapest), "factors", "dense", or groups of factor names.
        options: as of `FactorizedConv2d`; another is `in_shape` of TT.

    Raises:
        ValueError: a rank below 1, a bare float, an option that makes no sense for these features.
    """

    dense_type = nn.Linear
    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        plan: PlanChoice = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        template = nn.Linear(in_features, out_features, bias, device="meta")
        self._draw(template, self._method(**options), plan, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.plan(input.reshape(-1, self.in_features), self._weights(), self.bias)
        return rows.reshape(*input.shape[:-1], self.out_features)


def layer_type(method: Factorization, dense_type: type[nn.Module]) -> type[FactorizedLayer]:
    """Returns the layer of a method in place of a torch layer: this package's that names it, else the one for all methods.

    Raises:
        UnsupportedLayer: the method replaces no such layers.
    """
    method.check_replaces(dense_type)
    generic = [layer for layer in (FactorizedConv2d, FactorizedLinear) if layer.dense_type is dense_type]
    named = [layer for layer in named_layers() if layer.method is type(method) and layer.dense_type is dense_type]
    return (named + generic)[0]


def named_layers() -> list[type[FactorizedLayer]]:
    """Returns the drop-in layers that name a method of this package."""
    every = [*FactorizedConv2d.__subclasses__(), *FactorizedLinear.__subclasses__()]
    return [layer for layer in every if layer.__module__.startswith("tnlayers.")]
