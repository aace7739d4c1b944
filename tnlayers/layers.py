"""The drop-in layers. A new one is a class that names its method, and its place in `LAYERS`."""

import torch
from torch import Tensor, nn

from tnlayers.factorizations import CP, MPS, TT, Factorization, Tucker
from tnlayers.factorized import FactorizedLayer
from tnlayers.plan import PlanChoice
from tnlayers.ranks import Rank

__all__ = ["LAYERS", "CPConv2d", "MPSConv2d", "TTLinear", "TuckerConv2d", "layer_type"]


class _FactorizedConv2d(FactorizedLayer):
    """Signature and attributes of `nn.Conv2d`, plus `rank` and `plan`; (n, i, h, w) or (i, h, w) in, (n, o, h', w') out.

    Args:
        rank: an int, one int a bond, `ParamsKept`, `MacsKept` or `RelativeError` (the last from dense only).
        plan: "auto" (the cheapest), "factors", "dense", or groups of factor names.

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
        rank: Rank,
        plan: PlanChoice = "auto",
    ) -> None:
        super().__init__()
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._build(nn.Conv2d(*geometry, device="meta"), type(self).method(rank, plan), device, dtype)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.plan(input.unsqueeze(0), self._weights(), self.bias).squeeze(0)
        return self.plan(input, self._weights(), self.bias)


class TuckerConv2d(_FactorizedConv2d):
    """Tucker-2 convolution: W = core x output x input; `rank=(rank_out, rank_in)`. See `tnlayers.Tucker` and `nn.Conv2d`."""

    method = Tucker


class CPConv2d(_FactorizedConv2d):
    """CP convolution: a sum of rank-one kernels; `rank` is how many. See `tnlayers.CP` and `nn.Conv2d`."""

    method = CP


class MPSConv2d(_FactorizedConv2d):
    """MPS convolution over (i, h, w, o); `rank` are its three bonds in that order. See `tnlayers.MPS` and `nn.Conv2d`."""

    method = MPS


class TTLinear(FactorizedLayer):
    """Tensor-train linear with the signature and attributes of `nn.Linear`; (..., i) in, (..., o) out.

    Args:
        rank: an int, one int for each of the d - 1 bonds, `ParamsKept`, `MacsKept` or `RelativeError`.
        plan: "auto" (the cheapest), "factors", "dense", or groups of factor names.
        in_shape, out_shape: the d modes that the features are split into; three balanced ones by default.

    Raises:
        ValueError: a rank below 1, a bare float, shapes that do not multiply to the features.
    """

    method = TT
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
        rank: Rank,
        plan: PlanChoice = "auto",
        in_shape: tuple[int, ...] | None = None,
        out_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        template = nn.Linear(in_features, out_features, bias, device="meta")
        self._build(template, TT(rank, plan, in_shape, out_shape), device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.plan(input.reshape(-1, self.in_features), self._weights(), self.bias)
        return rows.reshape(*input.shape[:-1], self.out_features)


LAYERS: tuple[type[FactorizedLayer], ...] = (TuckerConv2d, CPConv2d, MPSConv2d, TTLinear)


def layer_type(factorization: Factorization) -> type[FactorizedLayer]:
    """The layer of a method."""
    return next(layer for layer in LAYERS if layer.method is type(factorization))
