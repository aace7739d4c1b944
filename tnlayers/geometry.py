"""What a dense layer's arguments mean for a network, and which ranks a rule gives it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from tnlayers.factorizations import Factorization
from tnlayers.linalg import precise
from tnlayers.network import Network
from tnlayers.plan import Axis, Machine, Partition, cheapest, fewest_macs, macs, partitions
from tnlayers.ranks import Candidate, MacsKept, ParamsKept, RankRule, Ranks, RelativeError, allocate, within_error

__all__ = ["Geometry", "settle"]

# Where nothing says how large the pictures are. Between two plans it is the ratio of costs that counts, and that hardly
# depends on the size.
_NOMINAL_SIZE = (32, 32)


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
    def fan_in(self) -> int:
        return math.prod(self.weight_shape[1:])

    @property
    def num_params(self) -> int:
        """Parameters of the dense weight."""
        return self.groups * math.prod(self.weight_shape)

    def input_size(self, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """The positions of the input: as given, or nominal ones; () for a linear."""
        return tuple(size or _NOMINAL_SIZE)[: len(self.axes)]

    def macs(self, size: Sequence[int] | None = None) -> int:
        """Multiply-accumulates of the dense layer for one sample; bias not counted."""
        positions = (
            axis.output_size(given) for axis, given in zip(self.axes.values(), self.input_size(size), strict=True)
        )
        return self.num_params * math.prod(positions)

    def network(self, factorization: Factorization) -> Network:
        network = factorization.network(self.weight_shape)
        return network.grouped() if self.groups > 1 else network

    def sizes(self, factorization: Factorization, ranks: Ranks) -> dict[str, int]:
        """The size of every index of the network."""
        return factorization.sizes(self.weight_shape, ranks) | {"g": self.groups}

    def fewest_macs(
        self, factorization: Factorization, ranks: Ranks, size: Sequence[int] | None = None
    ) -> tuple[int, Partition]:
        """The multiply-accumulates for one sample of the plan that needs the fewest, and that plan."""
        network, sizes, positions = self.network(factorization), self.sizes(factorization, ranks), self.input_size(size)
        groups = fewest_macs(network, sizes, self.axes, positions)
        return macs(network, sizes, groups, self.axes, positions), groups

    def fastest(
        self,
        factorization: Factorization,
        ranks: Ranks,
        device_type: str,
        size: Sequence[int] | None = None,
        batch: int | None = None,
    ) -> Partition:
        """The partition that the cost model holds to be the fastest."""
        network, sizes = self.network(factorization), self.sizes(factorization, ranks)
        return cheapest(network, sizes, self.axes, Machine.of(device_type), self.input_size(size), batch)


def _padding(padding: int | str, kernel: int, dilation: int) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = dilation * (kernel - 1)
        return (total // 2, total - total // 2)
    assert isinstance(padding, int)
    return (padding, padding)


def settle(
    factorization: Factorization,
    layers: Sequence[nn.Module],
    *,
    input_sizes: Sequence[Sequence[int]] | None = None,
    flat: bool = False,
) -> list[Factorization | None]:
    """The factorization with explicit ranks for each layer; None where every rank in reach costs more than the dense layer.

    A budget is shared out among all the layers. Under `MacsKept` a plan left to "auto" becomes the one with the fewest
    multiply-accumulates, since that is what was asked for.

    Args:
        factorization: the method; its rank may be a rule.
        layers: dense layers that it can replace.
        input_sizes: the positions of each layer's input.
        flat: whether all singular values count alike: for layers that are trained from scratch.

    Raises:
        ValueError: a budget out of reach, or `RelativeError` without trained weights.
    """
    rule = factorization.rank
    if not isinstance(rule, RankRule):
        return [factorization.with_rank(factorization.ranks(Geometry(dense).weight_shape)) for dense in layers]
    if flat and isinstance(rule, RelativeError):
        raise ValueError(f"{rule} needs trained weights; from scratch give a rank, ParamsKept or MacsKept")
    sizes = input_sizes or [_NOMINAL_SIZE] * len(layers)
    by_macs = isinstance(rule, MacsKept)
    candidates = [
        _candidate(factorization, dense, size, by_macs=by_macs, flat=flat)
        for dense, size in zip(layers, sizes, strict=True)
    ]
    chosen = (
        allocate(candidates, rule.fraction)
        if isinstance(rule, (ParamsKept, MacsKept))
        else [within_error(c, rule.error) for c in candidates]
    )
    settled: list[Factorization | None] = []
    for dense, size, ranks in zip(layers, sizes, chosen, strict=True):
        if ranks is None:
            settled.append(None)
            continue
        geometry = Geometry(dense)
        explicit = factorization.with_rank(factorization.clamp(geometry.weight_shape, ranks))
        if by_macs and explicit.plan == "auto":
            assert isinstance(explicit.rank, tuple)
            explicit = replace(explicit, plan=geometry.fewest_macs(explicit, explicit.rank, size)[1])
        settled.append(explicit)
    return settled


def _candidate(
    factorization: Factorization, dense: nn.Module, size: Sequence[int], *, by_macs: bool, flat: bool
) -> Candidate:
    """What the rank rules need to know of one layer."""
    geometry = Geometry(dense)
    network, shape, positions = geometry.network(factorization), geometry.weight_shape, geometry.input_size(size)

    def sizes(ranks: Ranks) -> dict[str, int]:
        return geometry.sizes(factorization, factorization.clamp(shape, ranks))

    def macs_of(groups: Partition) -> Callable[[Ranks], int]:
        return lambda ranks: macs(network, sizes(ranks), groups, geometry.axes, positions)

    max_ranks = factorization.max_ranks(shape)
    if flat:
        size_at_full = math.prod(max_ranks)

        def error(ranks: Ranks) -> float:
            return 1 - math.prod(ranks) / size_at_full
    else:
        weight = dense.weight
        assert isinstance(weight, Tensor)
        parts = precise(weight).chunk(geometry.groups)
        energies = [float(part.square().sum()) for part in parts]
        estimates = [factorization.error_estimate(part) for part in parts]

        def error(ranks: Ranks) -> float:
            lost = sum(energy * estimate(ranks) for energy, estimate in zip(energies, estimates, strict=True))
            return lost / sum(energies) if sum(energies) > 0 else 0.0

    if by_macs:
        costs = [macs_of(groups) for groups in partitions(tuple(network.factors))]
        return Candidate(max_ranks, error, costs, geometry.macs(size))
    return Candidate(max_ranks, error, [lambda ranks: network.num_params(sizes(ranks))], geometry.num_params)
