"""Truncating the factorized layers of a model together: budgets, errors, plans; weights checked against plain linear algebra."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.tolerances import FLOAT32
from tnlayers import (
    ADTN,
    CP,
    TT,
    FactorizedLayer,
    LowRank,
    MacsKept,
    ParamsKept,
    RelativeError,
    Rule,
    Tucker,
    fraction_kept,
    resolve_truncation,
    tensorize,
    truncate,
)

X = torch.randn(2, 3, 16, 16)


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, 16, 3, padding=1))
    model.add_module("conv2", nn.Conv2d(16, 32, 3, padding=1, stride=2))
    model.add_module("conv3", nn.Conv2d(32, 32, 3, padding=1, groups=2))
    model.add_module("pool", nn.AdaptiveAvgPool2d(2))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc", nn.Linear(128, 64))
    rules = [Rule("conv2", Tucker(rank=(14, 12))), Rule("conv3", LowRank(rank=20)), Rule("fc", TT(rank=8))]
    return tensorize(model, rules)


def layers(model: nn.Module) -> dict[str, FactorizedLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}


def weights_kept(model: nn.Module) -> float:
    """Counted by hand: what the factors hold against what the weights that they make hold."""
    found = layers(model).values()
    return sum(p.numel() for layer in found for p in layer.factors.values()) / sum(
        layer.weight.numel() for layer in found
    )


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.1])
@pytest.mark.parametrize("budget", [ParamsKept, MacsKept])
def test_a_budget_is_shared_by_layers_of_different_methods(budget: type, fraction: float) -> None:
    model = net()
    rules = resolve_truncation(model, budget(fraction), X)
    errors = truncate(model, rules)
    assert errors.keys() == {rule.pattern for rule in rules}
    assert 0.85 * fraction <= fraction_kept(model, budget, X) <= fraction
    if budget is ParamsKept:
        assert weights_kept(model) == pytest.approx(fraction_kept(model, ParamsKept))


def test_nothing_is_touched_before_truncate_and_nothing_else_by_it() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    rules = resolve_truncation(model, ParamsKept(0.3), X, pattern="conv*")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    truncate(model, rules)
    after = model.state_dict()
    others = [key for key in before if ".factors." not in key or key.startswith("fc")]
    torch.testing.assert_close(
        {key: after[key] for key in others}, {key: before[key] for key in others}, rtol=0, atol=0
    )
    assert {rule.pattern for rule in rules} == {"conv2", "conv3"}


@pytest.mark.parametrize("rank", [0.02, 0.2, 0.5])
def test_relative_error_is_against_the_present_weights(rank: float) -> None:
    model = net()
    before = {name: layer.weight.detach() for name, layer in layers(model).items()}
    errors = truncate(model, resolve_truncation(model, RelativeError(rank)))
    for name, error in errors.items():
        weight = layers(model)[name].weight
        assert error <= rank
        assert float((weight.detach() - before[name]).norm() / before[name].norm()) == pytest.approx(error, rel=1e-4)


def test_dense_layers_that_a_rule_matches_share_the_budget() -> None:
    model = net()
    rules = [Rule("conv1", None), Rule("*", CP(rank=MacsKept(0.5)))]
    model.conv3 = nn.Conv2d(32, 32, 3, padding=1)
    dense, x = model.conv3, torch.randn(1, 32, 8, 8)
    assert "conv3" not in {rule.pattern for rule in resolve_truncation(model, MacsKept(0.2), X)}
    resolved = resolve_truncation(model, MacsKept(0.2), X, rules=rules, pattern="conv[23]")
    errors = truncate(model, resolved)
    assert {type(rule.factorization) for rule in resolved} == {Tucker, CP}
    assert fraction_kept(model, MacsKept, X, rules=rules, pattern="conv[23]") <= 0.2
    assert isinstance(model.conv1, nn.Conv2d)
    new = model.conv3
    assert isinstance(new, FactorizedLayer)
    assert float((new.weight - dense.weight).detach().norm() / dense.weight.detach().norm()) == pytest.approx(
        errors["conv3"], rel=1e-4
    )
    assert new(x).shape == dense(x).shape


def test_an_int_lowers_the_bonds_above_it() -> None:
    model = net()
    truncate(model, resolve_truncation(model, 13))
    assert {name: layer.rank for name, layer in layers(model).items()} == {"conv2": (13, 12), "conv3": 13, "fc": (8, 8)}
    assert resolve_truncation(model, 13) == []


def test_a_truncation_to_what_the_weights_attain_keeps_the_outputs() -> None:
    """conv2 of rank (14, 12) that makes a weight of rank (5, 4)."""
    model = net()
    conv = layers(model)["conv2"]
    with torch.no_grad():
        for name, factor in conv.factors.items():
            kept = torch.zeros_like(factor)
            where = {"input": (..., slice(4)), "core": (slice(5), slice(4)), "output": (..., slice(5))}[name]
            kept[where] = factor[where]
            factor.copy_(kept)
    expected = model(X)
    truncate(model, [Rule("conv2", Tucker(rank=(5, 4)))])
    torch.testing.assert_close(model(X), expected, **FLOAT32)


def test_plans_are_made_anew_for_smaller_ranks() -> None:
    """At full rank rebuilding the weight is the fewest MACs; at rank 2 it is not."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    tensorize(model, [Rule("0", Tucker(rank=(32, 32)), plan="dense")])
    x = torch.zeros(1, 32, 8, 8)
    (rule,) = resolve_truncation(model, MacsKept(0.05), x)
    truncate(model, [rule])
    layer = model[0]
    assert isinstance(layer, FactorizedLayer)
    assert len(layer.plan.groups) > 1


@pytest.mark.parametrize("example", [None, X], ids=["unknown", "known"])
def test_a_plan_is_fixed_only_where_it_is_known_how_a_layer_is_used(example: Any) -> None:
    model = net()
    truncate(model, resolve_truncation(model, (4, 4), example, pattern="conv2"))
    assert (layers(model)["conv2"].plan_choice == "auto") == (example is None)


def test_budgets_that_are_kept_already_change_nothing() -> None:
    model = net()
    assert resolve_truncation(model, ParamsKept(1.0)) == []


@pytest.mark.parametrize(
    ("rank", "pattern", "message"),
    [
        (4, "convv*", r"'convv\*' matches no factorized layer; its factorized layers are 'conv2', 'conv3', 'fc'"),
        (ParamsKept(0.0001), "*", "cannot be reached"),
        ((1, 2, 3), "*", r"conv2: rank \(1, 2, 3\) has 3 entries; the layer has \(14, 12\)"),
        ((15, 2), "conv2", r"conv2: rank \(15, 2\) is above the present \(14, 12\)"),
    ],
)
def test_what_cannot_be_done_is_said(rank: object, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_truncation(net(), rank, pattern=pattern)  # type: ignore[arg-type]


def test_layers_without_a_budget_are_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(4, 4, 3))
    tensorize(model, [Rule("0", ADTN(rank=2)), Rule("1", CP(rank=4))], init="random")
    with pytest.raises(ValueError, match=r"0: rank .* depth .*leave the layer out by a pattern"):
        resolve_truncation(model, ParamsKept(0.1))
    joined = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tensorize(joined, [Rule("*", ADTN(rank=2, joint="both"))], init="random")
    with pytest.raises(ValueError, match="0: its parameters make other layers too; leave the layer out by a pattern"):
        resolve_truncation(joined, 1)
    assert [rule.pattern for rule in resolve_truncation(model, ParamsKept(0.3), pattern="1")] == ["1"]


@pytest.mark.parametrize("rank", [2, ParamsKept(0.1), MacsKept(0.1), RelativeError(0.1)], ids=str)
def test_a_factor_that_is_not_finite_is_named_and_nothing_truncated(rank: Any) -> None:
    model = net()
    rules = resolve_truncation(model, 2)
    with torch.no_grad():
        layers(model)["conv3"].factors["vertical"].view(-1)[3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    for job in (lambda: resolve_truncation(model, rank, X), lambda: truncate(model, rules)):
        with pytest.raises(ValueError, match=r"conv3: 1 of the \d+ values of its weight are not finite"):
            job()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert {rule.pattern for rule in resolve_truncation(model, 2, pattern="[!c]*")} == {"fc"}


@pytest.mark.parametrize("fraction", [0.45, 0.3, 0.15])
def test_what_is_kept_is_what_the_budget_says(fraction: float) -> None:
    """Also where the layers' plans were not those with the fewest multiply-accumulates, which the budget counts."""
    example = torch.zeros(1, 16, 12, 12)
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 8, 1))
    tensorize(net, [Rule("*", Tucker(8), plan="dense")])
    assert fraction_kept(net, MacsKept, example) == 1
    truncate(net, resolve_truncation(net, MacsKept(fraction), example))
    assert fraction_kept(net, MacsKept, example) <= fraction
    assert resolve_truncation(net, MacsKept(fraction), example) == []
