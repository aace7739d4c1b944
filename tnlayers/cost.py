"""What a plan costs: multiply-accumulates exactly, and a model of the time that tells which plan is the fastest."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tnlayers.network import Indices, Network, Sizes, size_of
from tnlayers.roles import Operation, Partition, roles_of
from tnlayers.schedule import Schedule, partitions
from tnlayers.steps import Axis, possible_operations

__all__ = ["Machine", "Rate", "estimate", "macs", "schedules"]

_EINSUM_LAUNCHES = 3  # two permutations and a batched matmul
_PASSES = 3  # of a training step: the output, and the gradients of the input and of the weight


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


def schedules(network: Network, sizes: Sizes, axes: Mapping[str, Axis]) -> Iterator[Schedule]:
    """Yields every partition with each operation in all the steps that it can compute, and the plainest one in the others."""
    for groups in partitions(tuple(network.factors)):
        possible = [possible_operations(roles, axes, sizes) for roles in roles_of(network, groups)]
        kinds = dict.fromkeys(operation for known in possible for operation in known)
        found = (Schedule(groups, tuple(kind if kind in known else known[0] for known in possible)) for kind in kinds)
        yield from dict.fromkeys(found)


@dataclass(frozen=True)
class Rate:
    """Multiply-accumulates in a second: `peak` for many channels, half of it where the fewer of the channels are `half`."""

    peak: float
    half: float

    def seconds(self, macs: float, width: int) -> float:
        return macs / self.peak * (1 + self.half / width) if macs else 0.0


@dataclass(frozen=True)
class Machine:
    """What a device does in a second: the constants of the cost model.

    Attributes:
        rates: those of each operation.
        depthwise: that of a convolution whose groups have one channel.
        values: how many are read or written.
        launch_seconds: how long it takes to start an operation.
    """

    rates: Mapping[Operation, Rate]
    depthwise: Rate
    values: float
    launch_seconds: float

    @staticmethod
    @lru_cache
    def of(device_type: str) -> "Machine":
        """Gives rounded figures of one CPU core with wide vectors or of a data-centre GPU; only their ratios matter."""
        if device_type == "cuda":
            fast = Rate(2e13, 32)
            return Machine({"convolution": fast, "linear": fast, "bmm": fast}, Rate(1e12, 0), 5e11, 5e-6)
        rates: dict[Operation, Rate] = {"convolution": Rate(4e10, 8), "linear": Rate(6e10, 8), "bmm": Rate(5e10, 8)}
        return Machine(rates, Rate(1e10, 0), 3e9, 5e-6)


def estimate(
    network: Network,
    sizes: Sizes,
    schedule: Schedule,
    axes: Mapping[str, Axis],
    machine: Machine,
    input_size: Sequence[int],
    batch: int,
    *,
    training: bool,
) -> float:
    """Returns the estimated seconds of a call: operations, values moved and launches, one after the other.

    Args:
        network: the factors' strings.
        sizes: the size of every index.
        schedule: how it is computed.
        axes: the spatial indices.
        machine: what the device does in a second.
        input_size: the positions of the input.
        batch: how many inputs there are.
        training: whether gradients are taken, and weights merged, at every call.
    """
    extent, total = dict(zip(axes, input_size, strict=True)), 0.0
    passes = _PASSES if training else 1
    every = roles_of(network, schedule.groups, schedule.operations)
    multiplied = products(network, schedule.groups, axes, input_size)
    for roles, operation, (positions, run) in zip(every, schedule.operations, multiplied, strict=True):
        compute = batch * positions * size_of(run, sizes)
        read = batch * size_of(roles.before, sizes) * math.prod(extent.values())
        extent |= {index: axes[index].output_size(extent[index]) for index in roles.kernel}
        written = batch * size_of(roles.after, sizes) * math.prod(extent.values())
        weight = size_of((*roles.kept, *roles.consumed, *roles.produced, *roles.kernel), sizes)
        consumed, produced = size_of(roles.consumed, sizes), size_of(roles.produced, sizes)
        rate = machine.rates[operation]
        if consumed == produced == 1 and operation == "convolution":
            rate = machine.depthwise
        launches, values = 1, read + written + weight
        if roles.before != roles.wanted:
            launches, values = launches + 1, values + 2 * read
        if training and operation == "bmm":  # its weight's gradient is made for each matrix of the batch, then summed
            values += 2 * batch * size_of(roles.ahead, sizes) * weight
        total += passes * (rate.seconds(compute, min(consumed, produced)) + values / machine.values)
        total += passes * launches * machine.launch_seconds
        if training:
            total += passes * machine.rates["linear"].seconds(roles.merge.macs(sizes), 64)
            total += passes * _EINSUM_LAUNCHES * len(roles.merge.products) * machine.launch_seconds
    return total
