"""What a plan costs: multiply-accumulates exactly, and a model of the time that tells which plan is the fastest."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tnlayers.contraction import Indices, Sizes, size_of
from tnlayers.network import Network
from tnlayers.roles import Operation, Partition, roles_of
from tnlayers.schedule import Schedule
from tnlayers.steps import Axis, possible_operations

__all__ = ["Machine", "Rate", "estimate", "macs", "schedules"]

_PASSES = 3  # of a training step: the output, and the gradients of the input and of the weight
_MERGING_WIDTH = 64


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


def schedules(
    network: Network, sizes: Sizes, axes: Mapping[str, Axis], every: Iterable[Partition]
) -> Iterator[Schedule]:
    """Yields each partition with each operation in all the steps that it can compute, and the plainest one in the others."""
    for groups in every:
        possible = [possible_operations(roles, axes, sizes) for roles in roles_of(network, groups)]
        kinds = dict.fromkeys(operation for known in possible for operation in known)
        found = (Schedule(groups, tuple(kind if kind in known else known[0] for known in possible)) for kind in kinds)
        yield from dict.fromkeys(found)


@dataclass(frozen=True)
class Rate:
    """What an operation costs.

    Attributes:
        peak: multiply-accumulates in a second, for many channels.
        half: for how many channels, of those consumed and produced the fewer, it is half of that.
        launch: the seconds that a call takes whatever its size, in training with its gradients.
    """

    peak: float
    half: float
    launch: float

    def seconds(self, macs: float, width: int) -> float:
        return macs / self.peak * (1 + self.half / width) if macs else 0.0


@dataclass(frozen=True)
class Machine:
    """What a device does in a second, in inference or in training: the constants of the cost model.

    Attributes:
        rates: those of each operation.
        depthwise: that of a convolution whose groups have one channel.
        values: how many are read or written.
        merge_launch: the seconds that a product of two factors takes whatever its size, with its gradients.
    """

    rates: Mapping[Operation, Rate]
    depthwise: Rate
    values: float
    merge_launch: float

    @staticmethod
    @lru_cache
    def of(device_type: str, *, training: bool) -> "Machine":
        """Gives rounded figures of two CPU cores with wide vectors, fitted by `benchmarks/constants.py`, or of a data-centre GPU.

        Only their ratios matter. Those of the GPU are no measurements.
        """
        if device_type == "cuda":
            launch = 2e-5 if training else 7e-6
            fast = Rate(2e13, 32, launch)
            rates: dict[Operation, Rate] = dict.fromkeys(("convolution", "linear", "bmm"), fast)
            return Machine(rates, Rate(1e12, 0, launch), 5e11, 4 * launch)
        if training:
            rates = {
                "convolution": Rate(6.7e10, 4.5, 2.4e-4),
                "linear": Rate(7e10, 9.3, 2.2e-4),
                "bmm": Rate(7e10, 9.3, 2.2e-4),
            }
            return Machine(rates, Rate(1e12, 0, 3e-4), 5.2e9, 2.1e-4)
        rates = {
            "convolution": Rate(8.1e10, 5.9, 4.6e-5),
            "linear": Rate(7.6e10, 11, 3.2e-5),
            "bmm": Rate(7.6e10, 11, 3.2e-5),
        }
        return Machine(rates, Rate(1.8e11, 0, 1.1e-4), 7.9e9, 0.0)


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
        values = read + written + weight
        if roles.before != roles.wanted:
            values += 2 * read
        if training and operation == "bmm" and (axes or roles.behind):
            # The gradient of the weight is made for each matrix of the batch, mostly in the cache, and summed.
            values += batch * size_of(roles.ahead, sizes) * weight // 4
        total += passes * (rate.seconds(compute, min(consumed, produced)) + values / machine.values) + rate.launch
        if training:
            total += passes * machine.rates["linear"].seconds(roles.merge.macs(sizes), _MERGING_WIDTH)
            total += machine.merge_launch * len(roles.merge.products)
    return total
