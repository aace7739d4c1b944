"""Numbers do not depend on how a tensor lies in memory, in any plan, forward or backward."""

from typing import Any

import hypothesis
import pytest
import torch
import torchvision
from torch import nn

from tests.cases import CASES, Case
from tests.drawn_layers import Drawn, cases, drawn_layers, wrong
from tests.tolerances import FLOAT64
from tnlayers import CP, MPS, Factorization, LowRank, MacsKept, Rule, TTConv, Tucker, tensorize

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
