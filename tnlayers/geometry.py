"""What the arguments of a dense layer mean: the shape of its weight, its spatial axes, and what a call of it costs."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tnlayers.plan import Axis

__all__ = ["DENSE", "NOMINAL_CALLS", "Call", "Geometry", "arguments", "dense_type_of"]

DENSE = (nn.Conv2d, nn.Linear)
"""The torch layers that there are factorized ones for."""


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
    axes: Mapping[str, Axis] = field(default_factory=dict, hash=False)
    pad_mode: str = "constant"

    @staticmethod
    def of(layer: Any) -> "Geometry":
        """Returns the geometry of a torch layer, or of the one that a factorized layer stands for."""
        if dense_type_of(layer) is nn.Linear:
            return Geometry(1, (layer.out_features, layer.in_features))
        given: tuple[int | str, ...] = (layer.padding,) * 2 if isinstance(layer.padding, str) else layer.padding
        paddings = map(_padding, given, layer.kernel_size, layer.dilation)
        return Geometry(
            groups=layer.groups,
            weight_shape=(layer.out_channels // layer.groups, layer.in_channels // layer.groups, *layer.kernel_size),
            axes=dict(zip("hw", map(Axis, layer.kernel_size, layer.stride, paddings, layer.dilation), strict=True)),
            pad_mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )

    @property
    def in_channels(self) -> int:
        """Input channels (features) of all groups."""
        return self.groups * self.weight_shape[1]

    @property
    def out_channels(self) -> int:
        """Output channels (features) of all groups."""
        return self.groups * self.weight_shape[0]

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


def dense_type_of(layer: nn.Module) -> type[nn.Module]:
    """Returns the type of the torch layer that a layer is, or that a factorized one stands for."""
    return getattr(layer, "dense_type", type(layer))


def arguments(layer: nn.Module) -> dict[str, Any]:
    """Returns the constructor arguments of a torch layer or of its factorized counterpart, device and dtype apart."""
    names = inspect.signature(dense_type_of(layer)).parameters
    given = {name: getattr(layer, name) for name in names if name not in ("bias", "device", "dtype")}
    return given | {"bias": layer.bias is not None}


def _padding(padding: int | str, kernel: int, dilation: int) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = dilation * (kernel - 1)
        return (total // 2, total - total // 2)
    assert isinstance(padding, int)
    return (padding, padding)
