"""The list that the conformance suite runs over: a new layer adds a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers import CPConv2d, FactorizedLayer, MPSConv2d, TTLinear, TuckerConv2d

FULL = 10**6
"""A rank above every attainable one: the layer is exact."""


@dataclass(frozen=True)
class Case:
    """A layer, a rank that compresses, and the ranks and state-dict keys that are its contract."""

    layer: type[FactorizedLayer]
    rank: Any
    smaller_rank: Any
    keys: tuple[str, ...]

    @property
    def is_conv(self) -> bool:
        return self.layer.dense_type is nn.Conv2d

    def dense(self, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        """A dense layer with uneven, partly prime sizes."""
        if self.is_conv:
            return nn.Conv2d(**{"in_channels": 8, "out_channels": 12, "kernel_size": (3, 2)} | options, dtype=dtype)
        return nn.Linear(**{"in_features": 30, "out_features": 28} | options, dtype=dtype)

    def input(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(batch, 8, 9, 7, dtype=dtype) if self.is_conv else torch.randn(batch, 30, dtype=dtype)


CASES = (
    Case(TuckerConv2d, (5, 4), (3, 2), ("input", "core", "output")),
    Case(CPConv2d, 9, 4, ("input", "height", "width", "output")),
    Case(MPSConv2d, (4, 6, 5), (3, 3, 3), ("input", "height", "width", "output")),
    Case(TTLinear, (4, 5), (2, 3), ("core1", "core2", "core3")),
)

GEOMETRIES: tuple[dict[str, Any], ...] = (
    {},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"groups": 4, "bias": False, "padding": 1},
    {"padding": "same", "dilation": (2, 1)},
    {"padding": "valid", "stride": 3},
    {"padding": 1, "padding_mode": "circular", "stride": 2},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": (2, 0), "padding_mode": "replicate", "groups": 2},
    {"kernel_size": 1},
    {"in_channels": 8, "out_channels": 8, "groups": 8, "padding": 1},
)

Builder = Callable[[], nn.Module]
