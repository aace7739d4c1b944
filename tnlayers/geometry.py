"""What the arguments of a dense layer mean: the shape of its weight, its spatial axes, and what a call of it costs.

Every kind of layer is brought to one form, in which methods and plans work: the weight of a group is (o, i) or (o, i, ...)
with the window's d, h, w behind. A transposed convolution stores its weight with o and i exchanged, an embedding is a linear
layer of one-hot inputs, whose table is (i, o).
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tnlayers.steps import Axis

__all__ = ["DENSE", "NOMINAL_CALLS", "Call", "Geometry", "arguments", "dense_type_of"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear, nn.Embedding)
"""The torch layers that there are factorized ones for."""

_SPATIAL = "dhw"


@dataclass(frozen=True)
class Call:
    """One call of a layer: `rows` inputs (of a linear: all leading positions), each of `size` positions (none for a linear)."""

    rows: int
    size: tuple[int, ...]


# Where nothing says what a layer gets. Between two plans it is the ratio of costs that counts, and that hardly depends
# on the size of the pictures.
NOMINAL_CALLS = (Call(32, (32, 32, 32)),)


@dataclass(frozen=True)
class Geometry:
    """What a dense layer does with its weight.

    Attributes:
        groups: 1 for a linear.
        weight_shape: (o, i, ...) of one group, with the window's sizes behind.
        axes: the geometry of d, h and w, as far as the layer has them; empty for a linear.
        pad_mode: what F.pad calls the padding mode.
        lookup: whether the inputs are row numbers, as of an embedding.
    """

    groups: int
    weight_shape: tuple[int, ...]
    axes: Mapping[str, Axis] = field(default_factory=dict, hash=False)
    pad_mode: str = "constant"
    lookup: bool = False

    @staticmethod
    def of(layer: Any) -> "Geometry":
        """Returns the geometry of a torch layer, or of the one that a factorized layer stands for."""
        kind = dense_type_of(layer)
        if kind is nn.Linear:
            return Geometry(1, (layer.out_features, layer.in_features))
        if kind is nn.Embedding:
            return Geometry(1, (layer.embedding_dim, layer.num_embeddings), lookup=True)
        window, transposed = layer.kernel_size, kind in _TRANSPOSED
        given: tuple[int | str, ...] = layer.padding
        given = (given,) * len(window) if isinstance(given, str) else given
        paddings = map(_padding, given, window, layer.dilation)
        more = ((transposed,) * len(window), layer.output_padding) if transposed else ()
        axes = map(Axis, window, layer.stride, paddings, layer.dilation, *more)
        return Geometry(
            groups=layer.groups,
            weight_shape=(layer.out_channels // layer.groups, layer.in_channels // layer.groups, *window),
            axes=dict(zip(_SPATIAL[-len(window) :], axes, strict=True)),
            pad_mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )

    @property
    def transposed(self) -> bool:
        """Whether the layer is a transposed convolution."""
        return any(axis.transposed for axis in self.axes.values())

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
        """What torch takes for the fan-in of the weight when it draws it."""
        return math.prod(self.weight_shape[2:]) * self.weight_shape[0 if self.transposed else 1]

    @property
    def init_std(self) -> float:
        """The standard deviation that torch draws the weight with."""
        if self.lookup:
            return 1.0
        return 1 / math.sqrt(3 * self.fan_in) if self.fan_in > 0 else 0.0

    @property
    def params(self) -> int:
        """Parameters of the dense weight."""
        return self.groups * math.prod(self.weight_shape)

    def macs(self, calls: Sequence[Call]) -> int:
        """Multiply-accumulates of the dense layer in all the calls; bias not counted, and a look-up has none."""
        if self.lookup:
            return 0
        return self.params * sum(call.rows * math.prod(self._positions(call)) for call in calls)

    def input_size(self, call: Call) -> tuple[int, ...]:
        return call.size[: len(self.axes)]

    def call(self, x: Tensor) -> Call:
        """Returns how the layer is called with this input."""
        size = tuple(x.shape[x.dim() - len(self.axes) :])
        return Call(x.numel() // (math.prod(size) * (1 if self.lookup else max(self.in_channels, 1))), size)

    def exchanged(self, weight: Tensor) -> Tensor:
        """Turns the weight that the torch layer stores into (g o, i, ...), and back: some store o and i the other way round."""
        if not (self.lookup or self.transposed):
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _positions(self, call: Call) -> list[int]:
        """Returns the positions at which the whole weight is multiplied with something."""
        sizes = zip(self.axes.values(), self.input_size(call), strict=True)
        return [axis.positions(size) for axis, size in sizes]


def dense_type_of(layer: nn.Module) -> type[nn.Module]:
    """Returns the type of the torch layer that a layer is, or that a factorized one stands for."""
    return getattr(layer, "dense_type", type(layer))


def arguments(layer: nn.Module) -> dict[str, Any]:
    """Returns the constructor arguments of a torch layer or of its factorized counterpart, device and dtype apart."""
    names = [name for name in inspect.signature(dense_type_of(layer)).parameters if not name.startswith("_")]
    given = {name: getattr(layer, name) for name in names if name not in ("bias", "device", "dtype")}
    return given | ({"bias": layer.bias is not None} if "bias" in names else {})


def _padding(padding: int | str, kernel: int, dilation: int) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = dilation * (kernel - 1)
        return (total // 2, total - total // 2)
    assert isinstance(padding, int)
    return (padding, padding)
