"""The list that the conformance suite runs over: a new layer adds a row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.own_method import Blocks
from tnlayers import (
    CP,
    MPS,
    SVD,
    ADTNConv2d,
    ADTNLinear,
    BlockTerm,
    BlockTermConv2d,
    CPConv2d,
    CPLinear,
    Factorization,
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
    FactorizedLayer,
    FullTuckerConv2d,
    KroneckerConv2d,
    LowRank,
    LowRankConv2d,
    LowRankLinear,
    MPSConv2d,
    SVDConv2d,
    TensorRingConv2d,
    TensorRingLinear,
    TTConv2d,
    TTLinear,
    Tucker,
    TuckerConv2d,
    TuckerLinear,
)

FULL = 10**6
"""A rank above every attainable one: the layer is exact."""


@dataclass(frozen=True)
class Case:
    """A layer, a rank that compresses, and the ranks and state-dict keys that are its contract.

    Attributes:
        options: what else the layer is built with.
        own: the method of a layer that names none.
        exact: whether there is a rank from which on every weight is represented, so that rank rules make sense.
        trained: a rank for tests that train; 0 where another row's will do.
    """

    layer: type[FactorizedLayer]
    rank: Any
    smaller_rank: Any
    keys: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    trained: int = 0
    own: type[Factorization] | None = None

    @property
    def name(self) -> str:
        return "-".join(
            [self.layer.__name__, *([self.own.__name__] if self.own else []), *map(str, self.options.values())]
        )

    @property
    def is_conv(self) -> bool:
        """Whether the geometries below are for the layer."""
        return self.layer.dense_type is nn.Conv2d

    def convert(self, dense: nn.Module, rank: Any) -> FactorizedLayer:
        return self.layer.from_dense(dense, **self.given(rank))

    def method(self, rank: Any) -> Factorization:
        return (self.own or self.layer.method)(rank, **self.options)

    def given(self, rank: Any) -> dict[str, Any]:
        """What the layer is built with beside the dense one's arguments."""
        return {"method": self.method(rank)} if self.own else {"rank": rank} | self.options

    def dense(self, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        """A dense layer with uneven, partly prime sizes."""
        kind = self.layer.dense_type
        return kind(**_DENSE[kind][0] | options, dtype=dtype)

    def input(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(batch, *_DENSE[self.layer.dense_type][1], dtype=dtype)


_CHANNELS = {"in_channels": 8, "out_channels": 12}
_DENSE: dict[type[nn.Module], tuple[dict[str, Any], tuple[int, ...]]] = {
    nn.Conv1d: (_CHANNELS | {"kernel_size": 3, "stride": 2, "padding": 1}, (8, 9)),
    nn.Conv2d: (_CHANNELS | {"kernel_size": (3, 2)}, (8, 9, 7)),
    nn.Conv3d: (_CHANNELS | {"kernel_size": (2, 3, 2), "padding": (0, 1, 1)}, (8, 4, 5, 3)),
    nn.ConvTranspose1d: (_CHANNELS | {"kernel_size": 3, "stride": 2, "groups": 2}, (8, 5)),
    nn.ConvTranspose2d: (
        _CHANNELS | {"kernel_size": (3, 2), "stride": 2, "padding": 1, "output_padding": (0, 1)},
        (8, 5, 4),
    ),
    nn.ConvTranspose3d: (_CHANNELS | {"kernel_size": 2, "dilation": (1, 2, 1)}, (8, 3, 4, 3)),
    nn.Linear: ({"in_features": 30, "out_features": 28}, (30,)),
}
"""The arguments of the dense layers, and the shape of an input without its batch."""

CASES = (
    Case(TuckerConv2d, (5, 4), (3, 2), ("input", "core", "output"), trained=6),
    Case(CPConv2d, 9, 3, ("input", "height", "width", "output"), trained=24),
    Case(MPSConv2d, (4, 6, 5), (3, 3, 3), ("input", "height", "width", "output"), trained=8),
    Case(MPSConv2d, (3, 6, 8), (2, 4, 3), ("height", "width", "input", "output"), {"order": "h w i o"}),
    Case(LowRankConv2d, 6, 3, ("vertical", "horizontal"), trained=12),
    Case(SVDConv2d, 6, 3, ("filters", "output"), trained=12),
    Case(BlockTermConv2d, (5, 3), (3, 2), ("input", "core", "output"), {"blocks": 2}, trained=4),
    Case(KroneckerConv2d, 5, 3, ("kernel", "matrix"), trained=8),
    Case(FactorizedConv2d, 3, 2, ("kernel", "matrix"), {"blocks": 4}, own=Blocks),
    Case(TTConv2d, (4, 6, 3), (3, 3, 2), ("spatial", "core1", "core2", "core3"), trained=6),
    Case(FullTuckerConv2d, (5, 4, 2, 2), (3, 2, 2, 2), ("input", "height", "width", "core", "output"), trained=6),
    Case(TensorRingConv2d, (3, 6, 3), (2, 4, 2), ("spatial", "core1", "core2", "core3"), trained=6),
    Case(TensorRingConv2d, (4, 6, 3), (3, 3, 2), ("spatial", "core1", "core2", "core3"), {"ring": 1}),
    Case(ADTNConv2d, 3, 2, ("layer1", "layer2", "layer3"), {"fit_steps": 20}, exact=False, trained=3),
    Case(TTLinear, (4, 5), (2, 3), ("core1", "core2", "core3"), trained=4),
    Case(TuckerLinear, (3, 4, 3, 4), (2, 3, 2, 3), ("input1", "input2", "core", "output1", "output2"), trained=4),
    Case(CPLinear, 9, 3, ("input1", "input2", "output1", "output2"), trained=12),
    Case(TensorRingLinear, (4, 6), (2, 3), ("core1", "core2", "core3"), trained=3),
    Case(LowRankLinear, 6, 3, ("input", "output"), trained=8),
    Case(FactorizedConv1d, (5, 4), (3, 2), ("input", "core", "output"), own=Tucker),
    Case(FactorizedConv3d, 9, 4, ("input", "depth", "height", "width", "output"), own=CP),
    Case(FactorizedConvTranspose1d, 3, 2, ("filters", "output"), own=SVD),
    Case(FactorizedConvTranspose2d, (4, 6, 5), (3, 3, 3), ("input", "height", "width", "output"), own=MPS),
    Case(FactorizedConvTranspose3d, 6, 3, ("depth", "plane"), own=LowRank),
    Case(FactorizedConvTranspose3d, (3, 3), (2, 2), ("input", "core", "output"), {"blocks": 3}, own=BlockTerm),
    Case(ADTNLinear, 3, 2, ("layer1", "layer2", "layer3"), {"fit_steps": 20}, exact=False),
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
