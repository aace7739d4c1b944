"""What a plan costs: multiply-accumulates exactly, and a model of the time that tells which plan is the fastest."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tnlayers.network import Indices, Network, Sizes, size_of
from tnlayers.plan import Axis, Partition, partitions
from tnlayers.roles import roles_of

__all__ = ["Machine", "cheapest", "macs"]

_EINSUM_LAUNCHES = 3  # two permutations and a batched matmul


@dataclass(frozen=True)
class _Cost:
    """What one call costs: multiply-accumulates and values read or written, of the activation and of the merging."""

    macs: int
    values: int
    merge_macs: int
    launches: int


def _cost(
    network: Network,
    sizes: Sizes,
    partition: Partition,
    axes: Mapping[str, Axis],
    batch: int,
    input_size: Sequence[int],
) -> _Cost:
    extent = dict(zip(axes, input_size, strict=True))
    values = merge_macs = launches = 0
    for roles in roles_of(network, partition):
        values += batch * size_of(roles.before, sizes) * math.prod(extent.values())
        extent |= {index: axes[index].output_size(extent[index]) for index in roles.kernel}
        positions = batch * math.prod(extent.values())
        produced = size_of(roles.after, sizes)
        weight = size_of((*roles.kept, *roles.consumed, *roles.produced, *roles.kernel), sizes)
        values += positions * produced + weight
        merge_macs += roles.merge.macs(sizes)
        launches += 1 + _EINSUM_LAUNCHES * len(roles.merge.products)
        if roles.before != (*roles.carried, *roles.kept, *roles.consumed):
            values += 2 * batch * size_of(roles.before, sizes) * math.prod(extent.values())
            launches += 1
    compute = batch * macs(network, sizes, partition, axes, input_size)
    return _Cost(compute, values, merge_macs, launches)


def products(
    network: Network, partition: Partition, axes: Mapping[str, Axis], input_size: Sequence[int] = ()
) -> list[tuple[int, Indices]]:
    """Returns for each step at how many positions of a sample it multiplies, and the indices that it runs over at each."""
    extent = dict(zip(axes, input_size, strict=True))
    found = []
    for roles in roles_of(network, partition):
        laid = extent | {index: axes[index].positions(extent[index]) for index in roles.kernel}
        extent |= {index: axes[index].output_size(extent[index]) for index in roles.kernel}
        run = (*roles.carried, *roles.kept, *roles.consumed, *roles.produced, *roles.kernel)
        found.append((math.prod(laid.values()), run))
    return found


def macs(
    network: Network, sizes: Sizes, partition: Partition, axes: Mapping[str, Axis], input_size: Sequence[int] = ()
) -> int:
    """Multiply-accumulates for one sample, once the weights of each group are merged; bias and padding are not counted."""
    return sum(positions * size_of(run, sizes) for positions, run in products(network, partition, axes, input_size))


@dataclass(frozen=True)
class Machine:
    """What a device does in a second: the three constants of the cost model."""

    macs: float
    values: float
    launch_seconds: float

    @staticmethod
    def of(device_type: str) -> "Machine":
        """Gives rounded figures of one CPU core with wide vectors or of a data-centre GPU; only their ratios matter."""
        if device_type == "cuda":
            return Machine(macs=2e13, values=5e11, launch_seconds=5e-6)
        return Machine(macs=1e11, values=3e9, launch_seconds=5e-6)


def cheapest(
    network: Network,
    sizes: Sizes,
    axes: Mapping[str, Axis],
    machine: Machine,
    input_size: Sequence[int],
    batch: int,
) -> Partition:
    """Returns the partition with the least estimated time: multiply-accumulates, values moved and launches, one after the other."""

    def seconds(groups: Partition) -> float:
        cost = _cost(network, sizes, groups, axes, batch, input_size)
        compute = (cost.macs + cost.merge_macs) / machine.macs
        return compute + cost.values / machine.values + cost.launches * machine.launch_seconds

    return min(partitions(tuple(network.factors)), key=seconds)
