"""The conformance suite: what every layer guarantees, with the dense torch layer as the oracle."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.cases import CASES, FULL, GEOMETRIES, Case
from tests.tolerances import BFLOAT16, EXACT, FLOAT32, FLOAT64
from tnlayers import (
    FactorizedLayer,
    MacsKept,
    ParamsKept,
    RelativeError,
    Rule,
    TTLinear,
    TuckerConv2d,
    UnsupportedLayer,
    tensorize,
)
from tnlayers.geometry import Geometry, arguments

clamps = pytest.mark.filterwarnings("ignore:.*above what a weight")  # where FULL asks for it
EXACT_CASES = [case for case in CASES if case.exact]
every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_exact_layer = pytest.mark.parametrize("case", EXACT_CASES, ids=lambda case: case.name)
every_exact_conv = pytest.mark.parametrize("case", [c for c in EXACT_CASES if c.is_conv], ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error")  # few gates, random weights


def converted(case: Case, rank: Any = None, **options: Any) -> FactorizedLayer:
    return case.convert(case.dense(**options), rank or case.rank)


@clamps
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@every_exact_conv
def test_full_rank_conversion_is_the_dense_layer(case: Case, geometry: dict[str, Any]) -> None:
    dense, x = case.dense(**geometry), case.input()
    layer = case.convert(dense, FULL)
    for plan in ("factors", "dense", "auto"):
        layer.set_plan(plan)
        torch.testing.assert_close(layer(x), dense(x), **FLOAT64)
        torch.testing.assert_close(layer(x[0]), dense(x[0]), **FLOAT64)
    assert layer.decomposition_error == pytest.approx(0, abs=1e-10)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(dense, name)


@clamps
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(30,), (4, 30), (2, 3, 30), (0, 30)])
def test_full_rank_linear_takes_any_leading_shape(shape: tuple[int, ...], bias: bool) -> None:
    dense = nn.Linear(30, 28, bias=bias, dtype=torch.float64)
    layer = TTLinear.from_dense(dense, rank=FULL)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), **FLOAT64)


@every_layer
def test_plans_agree_at_a_compressing_rank(case: Case) -> None:
    layer, x = converted(case), case.input()
    results = []
    for plan in ("factors", "dense"):
        layer.set_plan(plan)
        results.append(layer(x))
    torch.testing.assert_close(results[0], results[1], **FLOAT64)
    torch.testing.assert_close(layer.to_dense()(x), results[0], **FLOAT64)


@every_layer
def test_gradients(case: Case) -> None:
    layer, x = converted(case), case.input()
    for plan in ("factors", "dense"):
        layer.set_plan(plan)
        names = [name for name, _ in layer.named_parameters()]

        def run(x: torch.Tensor, *values: torch.Tensor, names: list[str] = names) -> torch.Tensor:
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        inputs = [x.requires_grad_(), *(value.detach().clone().requires_grad_() for value in layer.parameters())]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@every_layer
def test_weight_is_what_the_factors_make(case: Case) -> None:
    layer = converted(case)
    torch.testing.assert_close(layer.weight, layer.to_dense().weight, **FLOAT64)
    layer.weight.sum().backward()
    assert all(factor.grad is not None for factor in layer.factors.values())


@pytest.mark.parametrize("case", [case for case in CASES if not case.own], ids=lambda case: case.name)
def test_signature_is_the_dense_layers_plus_keywords(case: Case) -> None:
    dense = inspect.signature(case.layer.dense_type).parameters
    ours = inspect.signature(case.layer).parameters
    assert list(ours)[: len(dense)] == list(dense)
    assert [ours[name].default for name in dense] == [parameter.default for parameter in dense.values()]
    extra = [parameter for name, parameter in ours.items() if name not in dense]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra)
    assert {"rank", "plan", *case.options} <= {parameter.name for parameter in extra}


@every_layer
def test_state_dict_keys_are_a_contract(case: Case) -> None:
    assert list(converted(case).state_dict()) == ["bias", *(f"factors.{name}" for name in case.keys)]


@every_layer
def test_copies_and_reloads_are_exact(case: Case) -> None:
    layer, x = converted(case).eval(), case.input()
    with torch.no_grad():
        expected = layer(x)  # fills what a copy must not share
        fresh = converted(case).eval()
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
            torch.testing.assert_close(other(x), expected, **EXACT)
            next(iter(other.factors.values())).mul_(2)
            torch.testing.assert_close(layer(x), expected, **EXACT)


@every_layer
def test_a_truncated_state_loads_into_the_untruncated_definition(case: Case) -> None:
    small, x = converted(case, case.smaller_rank), case.input()
    layer = converted(case)
    with pytest.warns(UserWarning, match="adopted from the loaded state"):
        layer.load_state_dict(small.state_dict())
    assert layer.rank == small.rank
    torch.testing.assert_close(layer(x), small(x), **EXACT)


@every_layer
def test_another_layers_state_is_refused(case: Case) -> None:
    """Of ADTN, whose gates know the weight's size up to a power of two, if it is of another power."""
    fewer = (6, 24) if case.exact else (4, 12)
    linear = case.layer.dense_type is nn.Linear
    other = converted(case, **({"in_features": fewer[1]} if linear else {"in_channels": fewer[0]}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        converted(case).load_state_dict(other.state_dict())


@every_layer
def test_merged_weights_are_never_stale(case: Case) -> None:
    layer, x = converted(case), case.input()
    layer.set_plan("dense")
    layer.eval()
    oracle = copy.deepcopy(layer)
    oracle.set_plan("factors")

    def check() -> None:
        oracle.load_state_dict(layer.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(layer(x), oracle(x), **FLOAT64)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), oracle(x), **FLOAT64)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), oracle(x), **FLOAT64)

    check()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    check()
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
    check()
    with torch.no_grad():
        next(iter(layer.factors.values())).neg_()
    check()
    next(iter(layer.factors.values())).data = torch.ones_like(next(iter(layer.factors.values())))
    check()
    layer.truncate(case.smaller_rank)
    oracle = copy.deepcopy(layer)
    check()


@every_layer
def test_merged_weights_are_kept_while_evaluating(case: Case) -> None:
    layer, x = converted(case).eval(), case.input()
    with torch.no_grad():
        layer(x)
        kept = layer._planned()[1]
        assert all(one is other for one, other in zip(kept, layer._planned()[1], strict=True))
    assert all(weight.requires_grad for weight in layer._planned()[1])  # a gradient may flow: not the kept ones


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@every_layer
def test_a_fused_step_in_evaluation_is_seen(case: Case, optimizer: type[torch.optim.Optimizer]) -> None:
    """Fused optimizers write without being counted; fine-tuning in evaluation mode keeps BatchNorm still."""
    layer, x = converted(case).eval(), case.input()
    layer.set_plan("dense")
    step = optimizer(layer.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
    with torch.no_grad():
        layer(x)
    layer(x).square().sum().backward()
    step.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.to_dense()(x), **FLOAT64)


@every_layer
def test_merged_weights_outlive_autocast(case: Case) -> None:
    layer, x = converted(case, dtype=torch.float32).eval(), case.input(dtype=torch.float32)
    layer.set_plan("dense")
    expected = layer.to_dense()(x)
    with torch.no_grad():
        for enabled in (True, False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                torch.testing.assert_close(layer(x).float(), expected, **(BFLOAT16 if enabled else FLOAT32))


@every_layer
def test_functional_calls_use_the_factors_that_they_bring(case: Case) -> None:
    layer, x = converted(case).eval(), case.input()
    layer.set_plan("dense")
    with torch.no_grad():
        for _ in range(5):
            factors = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
            other = copy.deepcopy(layer)
            other.load_state_dict(factors)
            torch.testing.assert_close(torch.func.functional_call(layer, factors, (x,)), other(x), **FLOAT64)


@every_layer
def test_truncate(case: Case) -> None:
    layer = converted(case)
    dense = layer.to_dense()
    before = dict(layer.factors.items())
    layer.truncate(case.rank)
    assert all(layer.factors[name] is factor for name, factor in before.items())  # nothing to do: nothing replaced
    lost = layer.truncate(case.smaller_rank)
    expected = case.convert(dense, case.smaller_rank)
    assert layer.rank == expected.rank == case.smaller_rank
    assert lost == pytest.approx(expected.decomposition_error, rel=1e-6)
    assert layer.decomposition_error is None  # it was against another weight
    layer.truncate(2)  # every bond that is above it
    assert set(layer.ranks) == {2}
    with pytest.raises(ValueError, match="is above the present"):
        layer.truncate(case.rank)


@every_layer
def test_from_scratch_has_the_dense_layers_scale(case: Case) -> None:
    linear = case.layer.dense_type is nn.Linear
    options = {"in_features": 512, "out_features": 512} if linear else {"in_channels": 64, "out_channels": 64}
    dense = case.dense(dtype=torch.float32, **options)
    for rank in (1, 3, 16):
        layer = case.layer(**arguments(dense), **case.given(rank))
        assert layer.weight.square().mean().sqrt().item() == pytest.approx(
            dense.weight.square().mean().sqrt().item(), rel=0.05
        )


@every_layer
def test_nothing_is_left_uninitialised(case: Case) -> None:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        layer = converted(case)
        drawn = case.layer(**arguments(case.dense()), **case.given(4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for one in (layer, drawn) for value in one.parameters())


@clamps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_layer
def test_conversion_keeps_dtype_mode_and_frozen_parameters(case: Case, dtype: torch.dtype) -> None:
    dense = case.dense(dtype=dtype).eval().requires_grad_(False)
    layer = case.convert(dense, FULL if case.exact else case.rank)
    assert not layer.training
    assert all(value.dtype is dtype and not value.requires_grad for value in layer.parameters())
    assert not any(value.requires_grad for value in layer.to_dense().parameters())
    tolerance = FLOAT32 if dtype is torch.float32 else BFLOAT16
    if case.exact:
        torch.testing.assert_close(layer.weight, dense.weight, **tolerance)


@clamps
@every_layer
def test_odd_inputs(case: Case) -> None:
    layer, x = converted(case, FULL) if case.layer is TuckerConv2d else converted(case), case.input(batch=4)
    expected = layer(x)
    torch.testing.assert_close(layer(x[::2]), expected[::2], **FLOAT64)
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(layer(strided), expected, **FLOAT64)
    if case.is_conv:
        torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected, **FLOAT64)
    assert layer(x[:0]).shape == expected[:0].shape


@pytest.mark.parametrize("plan", ["factors", "dense"])
@every_layer
def test_compiles_to_one_graph(case: Case, plan: str) -> None:
    layer = converted(case)
    layer.set_plan(plan)  # type: ignore[arg-type]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        x = case.input(batch)
        torch.testing.assert_close(compiled(x), layer(x), **FLOAT64)
    assert counter.frame_count <= 2  # the first batch size, then any


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", {case.layer.dense_type: case for case in reversed(CASES)}.values(), ids=lambda case: case.name
)
def test_compiles_with_inductor(case: Case) -> None:
    """One layer of each kind: plans make the same few operations of every method."""
    layer, x = converted(case, dtype=torch.float32), case.input(dtype=torch.float32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), **FLOAT32)


@every_layer
def test_exports_with_a_dynamic_batch(case: Case) -> None:
    layer = converted(case).eval()
    batch = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(layer, (case.input(),), dynamic_shapes=batch).module()
    for size in (1, 2, 7):
        x = case.input(size)
        torch.testing.assert_close(program(x), layer(x), **FLOAT64)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0.5, r"bare float.*ParamsKept\(0.5\), MacsKept\(0.5\) or RelativeError\(0.5\)"),
        (0, "rank 0: every rank must be at least 1"),
        ((3, -1), r"rank \(3, -1\): every rank must be at least 1"),
        ((1, 2, 3, 4, 5), r"has 5 entries; \w+ takes"),
        ("many", "rank 'many': expected an int, a tuple of ints"),
        (True, "rank True: expected an int"),
        ((), r"rank \(\): expected an int"),
    ],
    ids=str,
)
@every_layer
def test_bad_ranks_are_named(case: Case, rank: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.convert(case.dense(), rank)


@every_exact_layer
def test_a_rank_above_the_attainable_is_clamped_and_said(case: Case) -> None:
    with pytest.warns(UserWarning, match=r"above what a weight of shape .* attains; clamped to"):
        layer = case.convert(case.dense(), FULL)
    assert layer.ranks == case.method(FULL).max_ranks(Geometry.of(case.dense()).weight_shape)


def scratch(case: Case, rank: Any) -> FactorizedLayer:
    return case.layer(**arguments(case.dense()), dtype=torch.float64, **case.given(rank))


@pytest.mark.parametrize("rule", [ParamsKept(0.5), MacsKept(0.5)], ids=str)
@every_exact_layer
def test_rank_rules(case: Case, rule: ParamsKept | MacsKept) -> None:
    for layer in (converted(case, rule), scratch(case, rule)):
        factors = sum(factor.numel() for factor in layer.factors.values())
        if isinstance(rule, ParamsKept):
            assert factors <= 0.5 * layer.to_dense().weight.numel()


@every_exact_layer
def test_relative_error_is_met_by_less_than_the_dense_layer(case: Case) -> None:
    dense = converted(case, case.smaller_rank).to_dense()  # a weight that has something to drop
    with torch.no_grad():
        dense.weight.add_(1e-6 * torch.randn_like(dense.weight))
    layer = case.convert(dense, RelativeError(0.01))
    assert layer.decomposition_error <= 0.01
    assert sum(factor.numel() for factor in layer.factors.values()) < dense.weight.numel()
    with pytest.raises(ValueError, match="is cheaper than the dense"):
        case.convert(case.dense(), RelativeError(1e-9))
    with pytest.raises(ValueError, match="needs trained weights"):
        scratch(case, RelativeError(0.1))


@pytest.mark.parametrize("error", [0.5, 0.8, 0.95])
@every_exact_layer
def test_relative_error_holds_where_ranks_hold_each_other_down(case: Case, error: float) -> None:
    net = tensorize(nn.Sequential(case.dense()), [Rule("0", case.method(RelativeError(error)))])
    if isinstance(net[0], FactorizedLayer):  # else dense is cheaper
        assert net[0].decomposition_error <= error


def test_complex_weights_are_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"real floating-point weights; this layer's dtype is torch.complex64"):
        TuckerConv2d.from_dense(nn.Conv2d(4, 4, 3, dtype=torch.complex64), rank=2)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.float32, 3e38), (torch.float16, 1e-6)], ids=str
)
@every_exact_layer
def test_weights_at_the_ends_of_their_dtype_are_factorized(case: Case, dtype: torch.dtype, size: float) -> None:
    """All of the norm in one factor would overflow, or lose its digits: then it is spread over all of them."""
    dense = case.dense(dtype=dtype)
    nn.init.constant_(dense.weight, size)
    layer = case.convert(dense, 2)
    assert all(torch.isfinite(factor).all() for factor in layer.factors.values())
    weight = dense.weight.detach().double()
    made = layer.spec.geometry.exchanged(layer._precise_weight())
    torch.testing.assert_close(made / size, weight / size, rtol=0, atol=3 * torch.finfo(dtype).eps)
    assert layer.decomposition_error < 3 * torch.finfo(dtype).eps


def test_another_type_is_refused_when_it_is_converted() -> None:
    with pytest.raises(UnsupportedLayer, match="TuckerConv2d replaces Conv2d, not ConvTranspose2d"):
        TuckerConv2d.from_dense(nn.ConvTranspose2d(4, 4, 3), rank=2)
    with pytest.raises(UnsupportedLayer, match="TTLinear replaces Linear, not Conv2d"):
        TTLinear.from_dense(nn.Conv2d(4, 4, 3), rank=2)


def test_tt_shapes() -> None:
    layer = TTLinear(30, 28, rank=3, in_shape=(5, 6), out_shape=(4, 7))
    assert [tuple(core.shape) for core in layer.factors.values()] == [(5, 4, 3), (3, 6, 7)]
    assert layer.rank == 3
    for options, message in [
        ({"in_shape": (5, 5)}, r"in_shape \(5, 5\) multiplies to 25; expected 30"),
        ({"in_shape": (5, 6), "out_shape": (2, 2, 7)}, "need the same number of modes"),
        ({"in_shape": (30,), "out_shape": (28,)}, "two or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            TTLinear(30, 28, rank=3, **options)
