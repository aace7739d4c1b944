"""The layers that are measured, and the methods and ranks that take their place; those that the targets name come first.

Shapes: n pictures or vectors, c channels, h rows, w columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tnlayers import CP, MPS, SVD, TT, Factorization, LowRank, ParamsKept, TTConv, Tucker

__all__ = ["Case", "cases"]

STANDARD_CONV, STANDARD_LINEAR = ("Tucker", 4, 8), ("TT", 4, 64)
"""Method, part of the channels and batch of the rows that come first."""
DIVISORS = (4, 8, 2)
"""A rank is the channels over one of these; of a tensor train of a linear it is 32 over one of these."""
_TRAIN = 32
BATCHES, VECTORS = (8, 1, 64), (64, 1, 1024)
CONV_METHODS = {"Tucker": Tucker, "CP": CP, "MPS": MPS, "LowRank": LowRank, "SVD": SVD, "TTConv": TTConv}
LINEAR_METHODS = {"TT": TT, "LowRank": LowRank}


@dataclass(frozen=True)
class Conv:
    """A convolution of pictures with `side` rows and columns, padded as if it kept them."""

    inputs: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        more = f", stride {self.stride}" if self.stride > 1 else ""
        more += ", depthwise" if self.groups > 1 else ""
        return f"{self.inputs} -> {self.outputs}, {self.kernel}x{self.kernel}, {self.side}x{self.side}{more}"


CONVS = (
    *(Conv(64, 64, 56), Conv(128, 128, 28), Conv(256, 256, 14), Conv(512, 512, 7), Conv(256, 512, 28)),
    *(Conv(512, 512, 14), Conv(128, 256, 28, stride=2), Conv(96, 256, 27, kernel=5), Conv(16, 16, 32), Conv(64, 64, 8)),
    *(Conv(256, 64, 56, kernel=1), Conv(1024, 256, 14, kernel=1), Conv(96, 96, 56, kernel=7, groups=96)),
)
LINEARS = ((1024, 1024), (4096, 4096), (3072, 768), (784, 256))
TINY_CONVS = (Conv(8, 8, 6), Conv(8, 8, 6, kernel=7, groups=8))
TINY_LINEARS = ((64, 64),)


@dataclass(frozen=True)
class Case:
    """A dense layer, what takes its place, and how large the batch is.

    Attributes:
        layer: the convolution, or inputs and outputs of a linear.
        method: its name.
        divisor: what the channels are divided by to get the rank.
        batch: pictures or vectors.
    """

    layer: Conv | tuple[int, int]
    method: str
    divisor: int
    batch: int

    @property
    def name(self) -> str:
        layer = self.layer if isinstance(self.layer, Conv) else f"{self.layer[0]} -> {self.layer[1]}"
        rank = f"rank {_TRAIN // self.divisor}" if self.method == "TT" else f"1/{self.divisor}"
        if isinstance(self.layer, Conv) and self.layer.groups > 1:
            rank = "rank 1"
        return f"{layer}, batch {self.batch}, {self.method} {rank}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(n, c, h, w) or (n, c)."""
        if isinstance(self.layer, Conv):
            return self.batch, self.layer.inputs, self.layer.side, self.layer.side
        return self.batch, self.layer[0]

    @property
    def seconds(self) -> float:
        """A guess at how long the row takes, which grows with the multiply-accumulates."""
        shape, conv = self.input_shape, self.layer
        if isinstance(conv, Conv):
            each = conv.outputs * (conv.inputs // conv.groups) * conv.kernel**2
            macs = each * self.batch * (conv.side // conv.stride) ** 2
        else:
            macs = math.prod(shape) * conv[1]
        plans = 8 if self.method == "TTConv" else 1  # it has many to measure
        return plans * max(3.0, macs / 1e9)

    def dense(self) -> nn.Module:
        if not isinstance(self.layer, Conv):
            return nn.Linear(*self.layer)
        conv = self.layer
        given = {"stride": conv.stride, "padding": conv.kernel // 2, "groups": conv.groups}
        return nn.Conv2d(conv.inputs, conv.outputs, conv.kernel, **given)

    def factorization(self) -> Factorization:
        """Returns Tucker at a part of the channels; the other methods keep as many parameters, or that part where it keeps no fewer."""
        if not isinstance(self.layer, Conv):
            return TT(_TRAIN // self.divisor) if self.method == "TT" else LowRank(ParamsKept(1 / self.divisor))
        conv, method = self.layer, CONV_METHODS[self.method]
        if conv.groups > 1:
            return method(1)
        outputs, inputs = conv.outputs // self.divisor, conv.inputs // self.divisor
        if method is Tucker:
            return Tucker((outputs, inputs))
        kept = outputs * conv.outputs + inputs * conv.inputs + outputs * inputs * conv.kernel**2
        kept /= conv.outputs * conv.inputs * conv.kernel**2
        return method(ParamsKept(kept if kept < 1 else 1 / self.divisor))


def cases(*, tiny: bool) -> Iterator[Case]:
    """Yields all cases: the standard ones, then those that differ from them in one thing, in two, in three; cheap ones first."""
    convs, linears = (TINY_CONVS, TINY_LINEARS) if tiny else (CONVS, LINEARS)
    found = []
    for divisor in DIVISORS[:1] if tiny else DIVISORS:
        for layer in convs:
            depthwise = layer.groups > 1  # whose channels have nothing to share
            if not depthwise or divisor == DIVISORS[0]:
                methods = ("CP", "LowRank") if depthwise else CONV_METHODS
                found += [Case(layer, name, divisor, n) for name in methods for n in ((2,) if tiny else BATCHES)]
        for features in linears:
            vectors = (3,) if tiny else VECTORS
            found += [Case(features, name, divisor, n) for name in LINEAR_METHODS for n in vectors]
    yield from sorted(found, key=lambda case: (_differences(case), case.seconds))


def _differences(case: Case) -> int:
    standard = STANDARD_CONV if isinstance(case.layer, Conv) else STANDARD_LINEAR
    return sum(own != usual for own, usual in zip((case.method, case.divisor, case.batch), standard, strict=True))
