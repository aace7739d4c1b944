"""What the arguments of a dense layer mean: the shape of its weight, its spatial axes, and what a call of it costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from tnlayers.plan import Axis

__all__ = ["NOMINAL_CALLS", "Call", "Geometry"]


@dataclass(frozen=True)
class Call:
    """One call of a layer: `rows` inputs (of a linear: all leading positions), each of `size` positions (none for a linear)."""

    rows: int
    size: tuple[int, ...]


# Where nothing says what a layer gets. Between two plans it is the ratio of costs that counts, and that hardly depends
# on the size of the pictures.
NOMINAL_CALLS = (Call(32, (32, 32)),)


@dataclass(frozen=True)
class Geometry:
    """What an `nn.Conv2d` or `nn.Linear` does with its weight.

    Attributes:
        groups: 1 for a linear.
        weight_shape: (o, i, h, w) of one group, or (o, i).
        axes: the geometry of h and w; empty for a linear.
        pad_mode: what F.pad calls the padding mode.
    """

    groups: int
    weight_shape: tuple[int, ...]
    axes: Mapping[str, Axis] = field(hash=False)
    pad_mode: str

    @staticmethod
    def of(dense: nn.Module) -> "Geometry":
        if isinstance(dense, nn.Linear):
            return Geometry(1, (dense.out_features, dense.in_features), {}, "constant")
        assert isinstance(dense, nn.Conv2d)
        given: tuple[int | str, ...] = (dense.padding,) * 2 if isinstance(dense.padding, str) else dense.padding
        paddings = map(_padding, given, dense.kernel_size, dense.dilation)
        return Geometry(
            groups=dense.groups,
            weight_shape=(dense.out_channels // dense.groups, dense.in_channels // dense.groups, *dense.kernel_size),
            axes=dict(zip("hw", map(Axis, dense.kernel_size, dense.stride, paddings, dense.dilation), strict=True)),
            pad_mode="constant" if dense.padding_mode == "zeros" else dense.padding_mode,
        )

    @property
    def in_channels(self) -> int:
        """Input channels (features) of all groups."""
        return self.groups * self.weight_shape[1]

    @property
    def fan_in(self) -> int:
        return math.prod(self.weight_shape[1:])

    @property
    def params(self) -> int:
        """Parameters of the dense weight."""
        return self.groups * math.prod(self.weight_shape)

    def macs(self, calls: Sequence[Call]) -> int:
        """Multiply-accumulates of the dense layer in all the calls; bias not counted."""
        return self.params * sum(call.rows * math.prod(self._output_size(call)) for call in calls)

    def input_size(self, call: Call) -> tuple[int, ...]:
        return call.size[: len(self.axes)]

    def _output_size(self, call: Call) -> list[int]:
        return [axis.output_size(size) for axis, size in zip(self.axes.values(), self.input_size(call), strict=True)]


def _padding(padding: int | str, kernel: int, dilation: int) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = dilation * (kernel - 1)
        return (total // 2, total - total // 2)
    assert isinstance(padding, int)
    return (padding, padding)
