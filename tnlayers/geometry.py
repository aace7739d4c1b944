"""What a dense layer's arguments mean for a network, and what a layer costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tnlayers.factorizations import Factorization
from tnlayers.network import Network
from tnlayers.plan import Axis, Machine, Partition, cheapest, macs, partitions
from tnlayers.ranks import Ranks

__all__ = ["NOMINAL_CALLS", "Call", "Geometry"]


@dataclass(frozen=True)
class Call:
    """One call of a layer: `rows` inputs (of a linear: all leading positions), each of `size` positions (none for a linear)."""

    rows: int
    size: tuple[int, ...]


# Where nothing says what a layer gets. Between two plans it is the ratio of costs that counts, and that hardly depends
# on the size of the pictures.
NOMINAL_CALLS = (Call(32, (32, 32)),)


class Geometry:
    """The weight's shape per group, the spatial axes and the padding of an `nn.Conv2d` or `nn.Linear`.

    Attributes:
        groups: 1 for a linear.
        weight_shape: (o, i, h, w) of one group, or (o, i).
        axes: the geometry of h and w; empty for a linear.
        pad_mode: what F.pad calls the padding mode.
    """

    groups: int
    weight_shape: tuple[int, ...]
    axes: Mapping[str, Axis]
    pad_mode: str

    def __init__(self, dense: nn.Module) -> None:
        if isinstance(dense, nn.Linear):
            self.groups, self.axes, self.pad_mode = 1, {}, "constant"
            self.weight_shape = (dense.out_features, dense.in_features)
            return
        assert isinstance(dense, nn.Conv2d)
        self.groups = dense.groups
        self.weight_shape = (dense.out_channels // dense.groups, dense.in_channels // dense.groups, *dense.kernel_size)
        self.pad_mode = "constant" if dense.padding_mode == "zeros" else dense.padding_mode
        given: tuple[int | str, ...] = (dense.padding,) * 2 if isinstance(dense.padding, str) else dense.padding
        paddings = map(_padding, given, dense.kernel_size, dense.dilation)
        axes = map(Axis, dense.kernel_size, dense.stride, paddings, dense.dilation)
        self.axes = dict(zip("hw", axes, strict=True))

    @property
    def in_channels(self) -> int:
        """Input channels (features) of all groups."""
        return self.groups * self.weight_shape[1]

    @property
    def fan_in(self) -> int:
        return math.prod(self.weight_shape[1:])

    @property
    def num_params(self) -> int:
        """Parameters of the dense weight."""
        return self.groups * math.prod(self.weight_shape)

    def macs(self, calls: Sequence[Call]) -> int:
        """Multiply-accumulates of the dense layer in all the calls; bias not counted."""
        return self.num_params * sum(call.rows * math.prod(self._output_size(call)) for call in calls)

    def _input_size(self, call: Call) -> tuple[int, ...]:
        return call.size[: len(self.axes)]

    def _output_size(self, call: Call) -> list[int]:
        return [axis.output_size(size) for axis, size in zip(self.axes.values(), self._input_size(call), strict=True)]

    def network(self, factorization: Factorization) -> Network:
        network = factorization.network(self.weight_shape)
        return network.grouped() if self.groups > 1 else network

    def sizes(self, factorization: Factorization, ranks: Ranks) -> dict[str, int]:
        """The size of every index of the network."""
        return factorization.sizes(self.weight_shape, ranks) | {"g": self.groups}

    def parameter_shapes(self, factorization: Factorization, ranks: Ranks) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that makes the factorized weight."""
        factor_shapes = self.network(factorization).shapes(self.sizes(factorization, ranks))
        return dict(factorization.parameter_shapes(factor_shapes, ranks))

    def with_ranks_of(self, factorization: Factorization, shapes: Mapping[str, tuple[int, ...]]) -> Factorization:
        """The factorization, of the ranks that parameters of these shapes have.

        Raises:
            ValueError: they are no parameters of it, or of ranks that no weight attains, which could ask for all memory.
        """
        ranks = factorization.ranks_from(self.network(factorization), shapes)
        explicit, attained = factorization.with_rank(ranks), factorization.clamp(self.weight_shape, ranks)
        if ranks != attained or self.parameter_shapes(explicit, ranks) != shapes:
            raise ValueError(f"parameters of the shapes {dict(shapes)} are not those of {explicit}")
        return explicit

    def network_macs(self, network: Network, sizes: Mapping[str, int], groups: Partition, calls: Sequence[Call]) -> int:
        """Multiply-accumulates of a plan in all the calls, once its weights are merged."""
        return sum(call.rows * macs(network, sizes, groups, self.axes, self._input_size(call)) for call in calls)

    def fewest_macs(self, factorization: Factorization, ranks: Ranks, calls: Sequence[Call]) -> Partition:
        """The partition with the fewest multiply-accumulates; of equals, the one with the most steps."""
        network, sizes = self.network(factorization), self.sizes(factorization, ranks)
        every = partitions(tuple(network.factors))
        return min(every, key=lambda groups: self.network_macs(network, sizes, groups, calls))

    def fastest(self, factorization: Factorization, ranks: Ranks, device_type: str, calls: Sequence[Call]) -> Partition:
        """The partition that the cost model holds to be the fastest for the first of the calls."""
        network, sizes = self.network(factorization), self.sizes(factorization, ranks)
        machine = Machine.of(device_type)
        return cheapest(network, sizes, self.axes, machine, self._input_size(calls[0]), calls[0].rows)


def _padding(padding: int | str, kernel: int, dilation: int) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = dilation * (kernel - 1)
        return (total // 2, total - total // 2)
    assert isinstance(padding, int)
    return (padding, padding)
