"""Every partition is an exact way to compute the layer, and its cost is what torch counts."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.test_network import NETWORKS, SIZES
from tests.tolerances import FLOAT64
from tnlayers import Network, Plan
from tnlayers.cost import Machine as CostMachine
from tnlayers.cost import cheapest, macs
from tnlayers.plan import Axis, partitions

CONVS = [name for name in NETWORKS if name != "ttfc"]
AXES = {
    "plain": {"h": Axis(3), "w": Axis(2)},
    "uneven": {"h": Axis(3, 2, (1, 1), 1), "w": Axis(2, 1, (2, 2), 3)},
}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("name", CONVS)
def test_every_partition_is_the_convolution(name: str, axes: dict[str, Axis], grouped: bool) -> None:
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
    for groups_ in partitions(tuple(network.factors)):
        plan = Plan.compile(network, SIZES, groups_, axes)
        torch.testing.assert_close(plan(x, plan.weights(factors), bias), expected, **FLOAT64)


def test_every_partition_is_the_linear() -> None:
    network = Network(*NETWORKS["ttfc"][:2])
    factors = {key: torch.randn(shape, dtype=torch.float64) for key, shape in network.shapes(SIZES).items()}
    x, bias = torch.randn(4, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    expected = F.linear(x, network.reconstruct(factors), bias)
    for groups in partitions(tuple(network.factors)):
        plan = Plan.compile(network, SIZES, groups, {})
        torch.testing.assert_close(plan(x, plan.weights(factors), bias), expected, **FLOAT64)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("name", CONVS)
def test_counted_macs_are_those_that_torch_counts(name: str, axes: dict[str, Axis]) -> None:
    network = Network(*NETWORKS[name][:2])
    factors = {key: torch.randn(shape) for key, shape in network.shapes(SIZES).items()}
    x = torch.randn(3, network.reconstruct(factors).shape[1], 8, 9)
    for groups in partitions(tuple(network.factors)):
        plan = Plan.compile(network, SIZES, groups, axes)
        weights = plan.weights(factors)  # merged outside of the count, as in evaluation
        with FlopCounterMode(display=False) as counter:
            plan(x, weights, None)
        assert counter.get_total_flops() == 2 * 3 * macs(network, SIZES, groups, axes, (8, 9)), groups


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
    sizes = {"o": 256, "i": 256, "h": 3, "w": 3, "r": 32, "s": 32}
    machine = CostMachine.of("cpu")
    assert len(cheapest(network, sizes, axes, machine, (28, 28), 32)) == 3
    assert len(cheapest(network, sizes | {"r": 256, "s": 256}, axes, machine, (28, 28), 32)) == 1
    slow_launches = CostMachine(macs=1e11, values=3e9, launch_seconds=10.0)
    assert len(cheapest(network, sizes, axes, slow_launches, (28, 28), 32)) == 3


@pytest.mark.parametrize(
    "bad", [(("core",), ("input", "output")), (("input",), ("core",)), "fast", ((), ("input", "core", "output"))]
)
def test_a_plan_that_is_no_partition_is_named(bad: object) -> None:
    with pytest.raises(ValueError, match="is none of 'auto', 'factors', 'dense' or groups"):
        Plan.compile(Network(*NETWORKS["tucker"][:2]), SIZES, bad, AXES["plain"])  # type: ignore[arg-type]
