"""Every partition with every operation is an exact way to compute the layer, and its cost is what torch counts."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.test_network import NETWORKS, SIZES
from tests.tolerances import FLOAT64
from tnlayers import Network, Plan
from tnlayers.cost import Machine, Rate, estimate, macs
from tnlayers.cost import schedules as cost_schedules
from tnlayers.errors import UserError
from tnlayers.roles import roles_of
from tnlayers.schedule import Schedule, partitions
from tnlayers.steps import Axis, possible_operations

CONVS = [name for name in NETWORKS if name != "ttfc"]
AXES = {
    "plain": {"h": Axis(3), "w": Axis(2)},
    "uneven": {"h": Axis(3, 2, (1, 1), 1), "w": Axis(2, 1, (2, 2), 3)},
}


def schedules(network: Network, axes: dict[str, Axis], sizes: dict[str, int] = SIZES) -> list[Schedule]:
    """All that can be chosen: every partition, and for each of its groups every operation that computes it."""
    found = []
    for groups in partitions(tuple(network.factors)):
        possible = [possible_operations(roles, axes, sizes) for roles in roles_of(network, groups)]
        found += [Schedule(groups, operations) for operations in itertools.product(*possible)]
    return found


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("name", CONVS)
def test_every_schedule_is_the_convolution(name: str, axes: dict[str, Axis], grouped: bool) -> None:
    network = Network(*NETWORKS[name][:2])
    network = network.grouped() if grouped else network
    factors = {key: torch.randn(shape, dtype=torch.float64) for key, shape in network.shapes(SIZES).items()}
    weight, groups = network.reconstruct(factors), SIZES["g"] if grouped else 1
    x = torch.randn(2, weight.shape[1] * groups, 8, 9, dtype=torch.float64)
    bias = torch.randn(weight.shape[0], dtype=torch.float64)
    h, w = axes.values()
    geometry = {
        "stride": (h.stride, w.stride),
        "padding": (h.padding[0], w.padding[0]),
        "dilation": (h.dilation, w.dilation),
    }
    expected = F.conv2d(x, weight, bias, **geometry, groups=groups)
    last = x.contiguous(memory_format=torch.channels_last)
    for schedule in schedules(network, axes):
        plan = Plan.compile(network, SIZES, schedule, axes)
        weights = plan.weights(factors)
        torch.testing.assert_close(made := plan(x, weights, bias), expected, **FLOAT64, msg=str(schedule))
        assert made.is_contiguous(), schedule
        torch.testing.assert_close(made := plan(last, weights, bias), expected, **FLOAT64, msg=str(schedule))
        assert made.is_contiguous(memory_format=torch.channels_last), schedule


@pytest.mark.parametrize("size", [1, 3])
def test_every_schedule_is_the_pointwise_convolution(size: int) -> None:
    """Pictures of one position have the strides of both layouts, or of neither."""
    network = Network(*NETWORKS["tucker"][:2])
    sizes, axes = SIZES | {"h": 1, "w": 1}, {"h": Axis(1, 2, (1, 1)), "w": Axis(1)}
    factors = {key: torch.randn(shape, dtype=torch.float64) for key, shape in network.shapes(sizes).items()}
    x, bias = torch.randn(2, sizes["i"], size, size, dtype=torch.float64), torch.randn(sizes["o"], dtype=torch.float64)
    expected = F.conv2d(x, network.reconstruct(factors), bias, stride=(2, 1), padding=(1, 0))
    for schedule in schedules(network, axes, sizes):
        plan = Plan.compile(network, sizes, schedule, axes)
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            made = plan(given, plan.weights(factors), bias)
            torch.testing.assert_close(made, expected, **FLOAT64, msg=str(schedule))


def test_every_schedule_is_the_linear() -> None:
    network = Network(*NETWORKS["ttfc"][:2])
    factors = {key: torch.randn(shape, dtype=torch.float64) for key, shape in network.shapes(SIZES).items()}
    x, bias = torch.randn(4, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    expected = F.linear(x, network.reconstruct(factors), bias)
    for schedule in schedules(network, {}):
        plan = Plan.compile(network, SIZES, schedule, {})
        torch.testing.assert_close(plan(x, plan.weights(factors), bias), expected, **FLOAT64)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("name", CONVS)
def test_counted_macs_are_those_that_torch_counts(name: str, axes: dict[str, Axis]) -> None:
    network = Network(*NETWORKS[name][:2])
    factors = {key: torch.randn(shape) for key, shape in network.shapes(SIZES).items()}
    x = torch.randn(3, network.reconstruct(factors).shape[1], 8, 9)
    for schedule in schedules(network, axes):
        plan = Plan.compile(network, SIZES, schedule, axes)
        weights = plan.weights(factors)  # merged outside of the count, as in evaluation
        with FlopCounterMode(display=False) as counter:
            plan(x, weights, None)
        assert counter.get_total_flops() == 2 * 3 * macs(network, SIZES, schedule.groups, axes, (8, 9)), schedule


def test_merging_is_counted_as_torch_counts_it() -> None:
    network = Network(*NETWORKS["ttfc"][:2])
    factors = {key: torch.randn(shape) for key, shape in network.shapes(SIZES).items()}
    with FlopCounterMode(display=False) as counter:
        network.reconstruct(factors)
    whole = network.contraction(tuple(network.factors), network.weight_indices)
    assert counter.get_total_flops() == 2 * whole.macs(SIZES)


def test_partitions_are_all_the_contiguous_ones() -> None:
    found = list(partitions(("a", "b", "c")))
    assert found == [(("a",), ("b",), ("c",)), (("a",), ("b", "c")), (("a", "b"), ("c",)), (("a", "b", "c"),)]


def test_the_choice_follows_the_costs() -> None:
    network = Network(*NETWORKS["tucker"][:2])
    axes = {"h": Axis(3, padding=(1, 1)), "w": Axis(3, padding=(1, 1))}
    low, machine = {"o": 256, "i": 256, "h": 3, "w": 3, "r": 32, "s": 32}, Machine.of("cpu", training=False)
    slow = Rate(1e11, 0, launch=10.0)
    slow_launches = Machine(dict.fromkeys(machine.rates, slow), slow, 3e9, 0.0)

    def steps(sizes: dict[str, int], machine: Machine) -> int:
        def seconds(schedule: Schedule) -> float:
            return estimate(network, sizes, schedule, axes, machine, (28, 28), 32, training=False)

        return len(min(cost_schedules(network, sizes, axes, partitions(tuple(network.factors))), key=seconds).groups)

    assert steps(low, machine) == 3
    assert steps(low | {"r": 256, "s": 256}, machine) == 1
    assert steps(low, slow_launches) == 1


def test_a_train_is_contracted_without_moving_an_index() -> None:
    network = Network(*NETWORKS["ttfc"][:2])
    apart = tuple((name,) for name in network.factors)
    plan = Plan.compile(network, SIZES, Schedule(apart, ("bmm",) * len(apart)), {})
    assert not plan.output_arranged
    assert not any(step.arranged for step in plan.steps)


def test_an_operation_that_cannot_compute_its_group_is_named() -> None:
    network = Network(*NETWORKS["tucker"][:2])
    schedule = Schedule((("input",), ("core",), ("output",)), ("linear", "bmm", "linear"))
    with pytest.raises(UserError, match=r"operation 'bmm' of .*'core'.*: expected 'convolution'"):
        Plan.compile(network, SIZES, schedule, AXES["plain"])


@pytest.mark.parametrize(
    "bad", [(("core",), ("input", "output")), (("input",), ("core",)), "fast", ((), ("input", "core", "output"))]
)
def test_a_plan_that_is_no_partition_is_named(bad: object) -> None:
    with pytest.raises(ValueError, match="is none of 'auto', 'factors', 'dense' or groups"):
        Plan.compile(Network(*NETWORKS["tucker"][:2]), SIZES, bad, AXES["plain"])  # type: ignore[arg-type]
