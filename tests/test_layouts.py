"""Numbers do not depend on how a tensor lies in memory, in any plan, forward or backward."""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import CASES, Case
from tests.drawn_layers import Drawn, cases, drawn_layers, wrong
from tests.tolerances import FLOAT32, FLOAT64
from tnlayers import (
    CP,
    MPS,
    SVD,
    Factorization,
    LowRank,
    MacsKept,
    Rule,
    TTConv,
    Tucker,
    tensorize,
    to_chains,
    to_dense,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*above what a weight"),
    pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


@pytest.mark.slow
@cases(1000, derandomize=True)
@hypothesis.given(drawn_layers())
def test_drawn_layers(drawn: Drawn) -> None:
    """Each in all its plans and layouts; `python -m tests.drawn_layers` draws as many as one likes."""
    assert not list(wrong(drawn))


SEEN: tuple[tuple[type[Factorization], dict[str, Any], tuple[int, ...]], ...] = (
    (TTConv, {"in_channels": 4, "out_channels": 2, "kernel_size": (3, 1), "padding": (1, 0), "groups": 2}, (2, 4, 8, 8)),
    (TTConv, {"in_channels": 2, "out_channels": 1, "kernel_size": 3, "padding": 1}, (2, 2, 8, 8)),
    (MPS, {"in_channels": 4, "out_channels": 2, "kernel_size": (3, 1), "padding": (1, 0), "groups": 2}, (2, 4, 8, 8)),
    (CP, {"in_channels": 2, "out_channels": 1, "kernel_size": 3, "padding": 1}, (2, 2, 8, 8)),
    (Tucker, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "stride": (1, 3)}, (2, 4, 9, 3)),
    (LowRank, {"in_channels": 3, "out_channels": 4, "kernel_size": 1, "stride": (2, 1)}, (1, 3, 8, 6)),
    (Tucker, {"in_channels": 2, "out_channels": 4, "kernel_size": 1, "stride": 2, "padding": 1}, (3, 2, 2, 8)),
    (Tucker, {"in_channels": 4, "out_channels": 2, "kernel_size": (1, 2), "groups": 2}, (4, 1, 2)),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "geometry", "shape"), SEEN)
def test_strides_that_could_be_misread(
    method: type[Factorization], geometry: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for moved in (False, True):
        drawn = Drawn(nn.Conv2d, method, 1, geometry, dtype, shape, channels_last_module=moved, seed=0)
        assert not list(wrong(drawn))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_standard_call_for_channels_last(case: Case, groups: int) -> None:
    layer = case.convert(case.dense(**({"groups": groups} if case.is_conv else {})), case.rank)
    x = case.input()
    expected = layer(x)
    assert layer.to(memory_format=torch.channels_last) is layer
    torch.testing.assert_close(layer(x), expected, **FLOAT64)
    if case.is_conv:
        out = layer(x.to(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, expected, **FLOAT64)


def test_a_whole_net_in_channels_last() -> None:
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=10).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    tensorize(net, [Rule("*branch2.0", Tucker(MacsKept(0.5)))], example_input=x)
    expected = net(x)
    net = net.to(memory_format=torch.channels_last)
    assert isinstance(net, nn.Module)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), expected, **FLOAT64)


class Convolved(TorchDispatchMode):
    """What convolutions take: the layouts of their inputs and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[1].shape[-1] > 1:  # else both layouts are the same
            self.layouts.append((in_channels_last(args[0]), in_channels_last(args[1])))
        return func(*args, **(kwargs or {}))


def in_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("plan", ["factors", "dense"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "made",
    [
        lambda net, rules: tensorize(net, rules).to(memory_format=torch.channels_last),
        lambda net, rules: tensorize(net.to(memory_format=torch.channels_last), rules),
        lambda net, rules: copy.deepcopy(tensorize(net.to(memory_format=torch.channels_last), rules)).double(),
    ],
)
def test_merged_weights_lie_as_the_dense_one_would(made: Callable[..., nn.Module], training: bool, plan: str) -> None:
    """Torch lays a weight out anew at every call otherwise. One operation alone lays its output out as torch's own layer does."""
    rules = [Rule("0", Tucker((8, 8)), plan=plan)]
    net = made(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).double(), rules).train(training)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    with Convolved() as seen, torch.set_grad_enabled(training):
        out = net(x.to(memory_format=torch.channels_last))
    assert in_channels_last(out)
    assert seen.layouts
    assert all(own == weight for own, weight in seen.layouts)
    assert net[0].plan.is_one_operation == (plan == "dense")
    with Convolved() as seen, torch.set_grad_enabled(training):
        out = net(x)
    if plan == "dense":
        assert in_channels_last(out) == in_channels_last(to_dense(copy.deepcopy(net))(x))
    else:
        assert not in_channels_last(out)
        assert seen.layouts
        assert all(own == weight for own, weight in seen.layouts)
    for dense in (to_dense(copy.deepcopy(net)), to_chains(copy.deepcopy(net).eval())):
        weights = [value for value in dense.parameters() if value.dim() == 4 and value.shape[-1] > 1]
        assert weights
        assert all(map(in_channels_last, weights))


def test_layers_of_other_pictures_take_their_own_formats() -> None:
    """Torch gives each tensor of four or five dimensions the format, and refuses it for other pictures."""
    volumes = nn.Sequential(nn.Conv3d(4, 4, 3), nn.Conv3d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4))
    tensorize(volumes, [Rule("1", SVD(2)), Rule("3", SVD(2))])
    x = torch.randn(2, 4, 5, 5, 5)
    expected = volumes(x)
    volumes = volumes.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(volumes(x.to(memory_format=torch.channels_last_3d)), expected, **FLOAT32)
