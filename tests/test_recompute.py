"""What training keeps for its backward pass: activations that are made again, and no more than the dense layer where that is asked for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.cases import CASES, Case
from tests.tolerances import FLOAT64
from tnlayers import FactorizedLayer, TuckerConv2d
from tnlayers.errors import UserError
from tnlayers.kept import kept_bytes
from tnlayers.plan import Plan
from tnlayers.schedule import Schedule, check_plan, plain_plan
from tnlayers.tuning import autotune

pytestmark = pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error")  # few gates, random weights
APART = (("input",), ("core",), ("output",))
CONVOLUTIONS = Schedule(APART, ("convolution",) * 3)
LINEARS = Schedule(APART, ("linear", "convolution", "linear"))


def gradients(layer: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x) if call is None else call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def recompute(layer: FactorizedLayer) -> None:
    assert isinstance(layer.training_plan, Plan)
    layer.set_plan(replace(layer.training_plan.schedule, recompute=True))


def tucker(size: int = 9, batch: int = 2) -> tuple[TuckerConv2d, Tensor]:
    layer = TuckerConv2d(8, 12, 3, padding=1, rank=(5, 4), plan=CONVOLUTIONS, dtype=torch.float64)
    return layer, torch.randn(batch, 8, size, size, dtype=torch.float64)


@pytest.mark.parametrize("plan", ["factors", "dense"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_value_and_no_gradient_changes(case: Case, plan: Any) -> None:
    layer, x = case.convert(case.dense(), case.rank), case.input()
    layer.set_plan(plan)
    expected = gradients(layer, x)
    recompute(layer)
    torch.testing.assert_close(gradients(layer, x), expected, **FLOAT64)


def held_bytes(layer: nn.Module, x: Tensor) -> int:
    """What a forward call has taken and not given back, by torch's own record."""
    x = x.detach().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = layer(x)
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages()) - out.numel() * out.element_size()


def test_the_activations_between_the_steps_are_not_held() -> None:
    layer, x = tucker()
    between = 8 * 2 * 9 * 9 * (5 + 4)  # bytes, pictures, positions, channels
    held = held_bytes(layer, x)
    parameters = sum(value.numel() for value in layer.parameters()) * 8
    assert kept_bytes(layer, list(layer.parameters()), x) == 2 * parameters + between
    recompute(layer)
    assert held - held_bytes(layer, x) == pytest.approx(between, abs=256)  # but for counters of a few bytes
    assert kept_bytes(layer, list(layer.parameters()), x) == pytest.approx(2 * parameters, abs=256)


def test_what_the_dense_layer_and_a_merged_weight_keep() -> None:
    layer, x = tucker()
    dense = layer.to_dense()
    assert kept_bytes(dense, list(dense.parameters()), x) == 2 * 8 * (12 * 8 * 9 + 12)
    parameters = sum(value.numel() for value in layer.parameters())
    # The core with its indices in the order of a matmul, its product with the first factor, and that with the last one.
    moved, product, weight = 4 * 5 * 9, 8 * 5 * 9, 12 * 8 * 9
    layer.set_plan("dense")
    assert kept_bytes(layer, list(layer.parameters()), x) == 8 * (2 * parameters + moved + product + weight)


def test_compiled_and_within_a_checkpoint_of_the_users() -> None:
    layer, x = tucker()
    expected = gradients(layer, x)
    recompute(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(layer, x, compiled), expected, **FLOAT64)
    outer = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    torch.testing.assert_close(outer, expected, **FLOAT64)


def test_gradients_of_gradients_and_function_transforms() -> None:
    layer, x = tucker(size=4, batch=1)
    recompute(layer)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [value.detach().clone().requires_grad_() for value in layer.parameters()]
    assert torch.autograd.gradgradcheck(run, [x.requires_grad_(), *values], fast_mode=True)
    found = torch.func.grad(lambda x: layer(x).square().sum())(x.detach())
    torch.testing.assert_close(found, gradients(layer, x)[1], **FLOAT64)


def test_an_input_that_was_written_to_is_refused() -> None:
    layer, x = tucker()
    recompute(layer)
    given = x.requires_grad_() * 2
    y = layer(given)
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_graph_recomputes_nothing(training: bool) -> None:
    layer, x = tucker()
    recompute(layer.train(training))
    graph = torch.export.export(layer, (x,)).graph
    assert not [node for node in graph.nodes if "checkpoint" in str(node.target)]


def test_it_is_written_where_it_is_true() -> None:
    lean = replace(LINEARS, recompute=True)
    assert plain_plan(LINEARS) == {"groups": [list(group) for group in APART], "operations": list(LINEARS.operations)}
    assert check_plan(yaml.safe_load(yaml.safe_dump(plain_plan(lean)))) == lean
    with pytest.raises(UserError, match="recompute 1: expected true or false"):
        Schedule(APART, LINEARS.operations, recompute=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [8, 32])
def test_a_lean_layer_keeps_no_more_than_the_dense_one(size: int, channels_last: bool) -> None:
    layer = TuckerConv2d(16, 16, 3, padding=1, rank=(4, 4))
    x = torch.randn(4, 16, size, size)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    dense = layer.to_dense()
    autotune(layer, x, lean=True)
    most = kept_bytes(dense, list(dense.parameters()), x)
    assert kept_bytes(layer, list(layer.parameters()), x) <= most
    assert isinstance(layer.training_plan, Plan)
    chosen = layer.training_plan.schedule
    layer.set_plan(replace(chosen, recompute=False))
    assert chosen.recompute == (kept_bytes(layer, list(layer.parameters()), x) > most)


class Largest(TorchDispatchMode):
    """Notes the largest number of values that an operation makes."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(value, Tensor):
                self.found = max(self.found, value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("size", [1, 2])
def test_few_positions_make_no_gradient_for_each_picture(size: int) -> None:
    layer = TuckerConv2d(24, 20, 3, padding=1, rank=(16, 18), plan=CONVOLUTIONS, dtype=torch.float64)
    x = torch.randn(12, 24, size, size, dtype=torch.float64)
    expected = gradients(layer, x)
    layer.set_plan(LINEARS)
    with Largest() as largest:
        found = gradients(layer, x)
    assert found[0].is_contiguous()
    torch.testing.assert_close(found, expected, **FLOAT64)
    core = 18 * 16 * 9
    assert largest.found == core < 12 * 18 * 24  # the gradients of the first factor, one for each picture
    torch.testing.assert_close(gradients(layer, x.to(memory_format=torch.channels_last)), expected, **FLOAT64)
