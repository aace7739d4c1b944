"""Ranks to a multiple: they are, whichever way a layer is made or truncated, and the rule that asked for it is kept."""

import itertools
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.callbacks.rank_schedule import RankSchedule
from lightning_modules.callbacks.rank_steps import steps_of
from tests.cases import Case
from tests.test_rank_schedule import fitted
from tests.test_ranks import EXACT_CASES, candidate, cost, drawn, loss, made
from tnlayers import (
    ADTN,
    MPS,
    FactorizedLayer,
    LayerSpec,
    MacsKept,
    MPSConv2d,
    ParamsKept,
    RelativeError,
    Rule,
    Tucker,
    TuckerConv2d,
    fraction_kept,
    resolve,
    resolve_truncation,
    tensorize,
    truncate,
)
from tnlayers.allocation import Candidate, allocate
from tnlayers.errors import UserError
from tnlayers.geometry import Geometry

pytestmark = pytest.mark.filterwarnings("ignore:.*above what a weight", "ignore:.*lower the rank or leave")
X = torch.zeros(1, 64, 8, 8)


def attainable(spec: LayerSpec) -> tuple[int, ...]:
    return spec.method.max_ranks(spec.geometry.weight_shape)


def allowed(spec: LayerSpec, multiple: int) -> list[LayerSpec]:
    """Every layer of such ranks, one by one."""
    bonds = [sorted({*range(multiple, most, multiple), most}) for most in attainable(spec)]
    return [spec.at(ranks) for ranks in itertools.product(*bonds)]


def obeys(layer: FactorizedLayer, multiple: int) -> bool:
    return all(
        rank % multiple == 0 or rank == most
        for rank, most in zip(layer.spec.ranks, attainable(layer.spec), strict=True)
    )


def unless_out_of_reach(resolved: Callable[[], list[Rule]]) -> list[Rule] | None:
    try:
        return resolved()
    except UserError as error:
        if "cannot be reached: the lowest multiples of" not in str(error):
            raise
        return None


def steep(layer: nn.Module) -> nn.Module:
    """Lets the singular values of a dense layer fall, so that no two ranks lose the same."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        for axis, size in enumerate(weight.shape):
            weight.mul_(torch.logspace(0, -2, size).reshape(-1, *[1] * (weight.dim() - 1 - axis)))
    return layer


@pytest.mark.parametrize("case", EXACT_CASES, ids=lambda case: case.name)
def test_a_budget_is_met_by_the_best_of_all_such_ranks(case: Case) -> None:
    random.seed(case.name)
    converted = 0
    for multiple, fraction in itertools.product((2, 3, 4, 8), (random.uniform(0.02, 0.4), random.uniform(0.4, 1))):
        dense = steep(case.dense(groups=random.choice([1, 1, 2]))) if case.is_conv else steep(case.dense())
        rule = random.choice([ParamsKept, MacsKept])(fraction, multiple=multiple)
        net, x = nn.Sequential(dense), case.input()
        geometry = Geometry.of(dense)
        budget = fraction * geometry.params
        specs = allowed(LayerSpec(geometry, case.method(10**6)), multiple)
        resolved = unless_out_of_reach(partial(resolve, net, [Rule("0", case.method(rule))], x))
        if resolved is None:
            assert isinstance(rule, MacsKept) or all(spec.params > budget for spec in specs)
            continue
        tensorize(net, resolved)
        if isinstance(layer := net[0], FactorizedLayer):
            assert obeys(layer, multiple)
            assert fraction_kept(net, type(rule), x) <= fraction
            converted += 1
        if isinstance(layer, FactorizedLayer) and isinstance(rule, ParamsKept) and geometry.groups == 1:
            estimate = case.method(1).error_estimate(geometry.exchanged(dense.weight.detach()))
            best = min(estimate(spec.ranks) for spec in specs if spec.params <= budget)
            assert estimate(layer.spec.ranks) <= (1.1 if len(specs) > 500 else 1) * best + 1e-12
    assert converted >= 1


@pytest.mark.parametrize("case", EXACT_CASES, ids=lambda case: case.name)
def test_more_to_spend_never_gives_a_larger_error(case: Case) -> None:
    dense = steep(case.dense())
    geometry, multiple = Geometry.of(dense), random.Random(case.name).choice([2, 3, 4])
    estimate, errors = case.method(1).error_estimate(geometry.exchanged(dense.weight.detach())), []
    for fraction in torch.linspace(0.1, 1, 19).tolist():
        rule = Rule("0", case.method(ParamsKept(fraction, multiple=multiple)))
        resolved = unless_out_of_reach(partial(resolve, nn.Sequential(dense), [rule]))
        if resolved is None:
            assert not errors
            continue
        method = resolved[0].factorization
        errors.append(estimate(LayerSpec(geometry, method).ranks) if method else 0.0)
    assert errors == sorted(errors, reverse=True)
    assert len({*errors}) > 1


@pytest.mark.parametrize("case", EXACT_CASES, ids=lambda case: case.name)
def test_a_truncation_goes_to_multiples(case: Case) -> None:
    """From any ranks, even where the budget is kept already; ranks that are below every multiple stay."""
    random.seed(case.name)
    for _ in range(8):
        multiple = random.choice([2, 3, 4])
        layer = case.convert(case.dense(), case.rank)
        layer.truncate(tuple(random.randint(1, rank) for rank in layer.spec.ranks))
        net, before = nn.Sequential(layer), layer.spec.ranks
        rule = random.choice(
            [ParamsKept(random.uniform(0.02, 1), multiple=multiple), RelativeError(0.8, multiple=multiple)]
        )
        stuck = any(rank < min(multiple, most) for rank, most in zip(before, attainable(layer.spec), strict=True))
        if (resolved := unless_out_of_reach(partial(resolve_truncation, net, rule))) is None:
            continue
        truncate(net, resolved)
        assert all(new <= old for new, old in zip(layer.spec.ranks, before, strict=True))
        assert layer.spec.ranks == before if stuck else obeys(layer, multiple) or isinstance(rule, RelativeError)
        if isinstance(rule, ParamsKept):
            assert layer.spec.params <= rule.fraction * layer.spec.geometry.params
        elif layer.spec.ranks != before:
            assert obeys(layer, multiple)


@pytest.mark.parametrize("case", EXACT_CASES, ids=lambda case: case.name)
def test_an_error_is_kept_at_multiples(case: Case) -> None:
    random.seed(case.name)
    converted = 0
    for _ in range(6):
        dense, multiple, error = drawn(case, torch.float64), random.choice([2, 3, 4]), random.uniform(0.01, 0.9)
        weight = Geometry.of(dense).exchanged(dense.weight.detach())  # type: ignore[operator]
        net = nn.Sequential(dense)
        (rule,) = resolve(net, [Rule("0", case.method(RelativeError(error, multiple=multiple)))])
        tensorize(net, [rule])
        if not isinstance(layer := net[0], FactorizedLayer):
            assert (
                f"dense is cheaper than multiples of {multiple}" in rule.reason or "cheaper than dense" in rule.reason
            )
            continue
        size = weight.abs().max().clamp(min=5e-324)
        assert obeys(layer, multiple)
        assert ((weight - made(layer)) / size).norm() <= error * (weight / size).norm()
        converted += 1
    assert converted >= 1


@pytest.mark.parametrize("multiple", [2, 5, 8])
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.9])
def test_allocation_in_multiples_is_near_the_best_there_is(fraction: float, multiple: int) -> None:
    layers = [candidate(0.5, 16, 10), candidate(0.9, 27, 3), candidate(0.8, 25, 25)]
    layers = [
        Candidate(it.max_ranks, it.error, it.costs, it.dense_cost, it.present_cost, multiple=multiple) for it in layers
    ]
    options = [[*((rank,) for rank in range(multiple, it.max_ranks[0], multiple)), None] for it in layers]
    budget = fraction * sum(it.dense_cost for it in layers)
    best = min(loss(layers, chosen) for chosen in itertools.product(*options) if cost(layers, chosen) <= budget)
    chosen = tuple(found and found[1] for found in allocate([[each] for each in layers], fraction))
    assert all(ranks is None or ranks[0] % multiple == 0 for ranks in chosen)
    assert cost(layers, chosen) <= budget
    assert loss(layers, chosen) <= 1.4 * best + 1e-9  # coarse steps fit less well than single ranks


@pytest.mark.parametrize("method", [Tucker, MPS])
@pytest.mark.parametrize("rule", [ParamsKept, MacsKept])
def test_layers_that_share_a_budget_come_near_it(rule: type[Any], method: type[Any]) -> None:
    net = nn.Sequential(*(steep(nn.Conv2d(64, 64, 3, padding=1)) for _ in range(6)))
    rules = [Rule("*", method(rule(0.5, multiple=8)))]
    tensorize(net, rules, example_input=X)
    assert 0.97 * 0.5 <= fraction_kept(net, rule, X, rules=rules) <= 0.5
    assert all(obeys(layer, 8) for layer in net if isinstance(layer, FactorizedLayer))


def test_a_wide_layer_comes_near_its_budget() -> None:
    """More ranks than are looked at one by one."""
    layer = MPSConv2d.from_dense(steep(nn.Conv2d(128, 128, 3)), rank=ParamsKept(0.5, multiple=8))
    assert obeys(layer, 8)
    assert 0.95 * 0.5 <= layer.spec.params / layer.spec.geometry.params <= 0.5


def test_what_is_within_the_budget_at_other_ranks_is_made_anew() -> None:
    net = nn.Sequential(TuckerConv2d(64, 64, 3, padding=1, rank=(29, 30)))
    tensorize(net, [Rule("0", Tucker(ParamsKept(1.0, multiple=8)))])
    assert net[0].rank == (24, 24)
    assert [rule.factorization for rule in resolve_truncation(net, ParamsKept(1.0, multiple=16))] == [Tucker((16, 16))]
    assert resolve_truncation(net, ParamsKept(1.0, multiple=8)) == []


def test_ranks_below_every_multiple_stay_and_that_is_said() -> None:
    net = nn.Sequential(TuckerConv2d(64, 64, 3, rank=(5, 30)))
    (rule,) = resolve(net, [Rule("0", Tucker(MacsKept(0.5, multiple=8)))], X)
    assert rule.factorization == Tucker((5, 30))
    assert "MacsKept(0.5, multiple=8): dense is cheaper than multiples of 8" in rule.reason
    assert resolve_truncation(net, ParamsKept(0.5, multiple=8)) == []


def test_a_layer_stays_dense_where_no_multiple_is_cheaper() -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 10, 1))
    rules = resolve(net, [Rule("*", Tucker(ParamsKept(0.5, multiple=8)))])
    assert [rule.factorization is None for rule in rules] == [False, True]
    assert "ParamsKept(0.5, multiple=8): dense is cheaper than multiples of 8" in rules[1].reason
    with pytest.raises(UserError, match=r"dense is cheaper than multiples of 8"):
        TuckerConv2d.from_dense(net[1], rank=RelativeError(0.99, multiple=8))


# ---- how it is written


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (ParamsKept(0.5, multiple=8), "ParamsKept(0.5, multiple=8)"),
        (MacsKept(0.5, of="model", multiple=16), "MacsKept(0.5, of=model, multiple=16)"),
        (RelativeError(0.1, multiple=8), "RelativeError(0.1, multiple=8)"),
    ],
)
def test_it_is_text(rule: Any, text: str) -> None:
    assert str(rule) == text
    plain = Rule("*", Tucker(rule)).to_plain()
    assert plain["rank"] == text
    assert Rule.from_plain(plain).factorization == Tucker(rule)
    assert steps_of({1: text})[1].rank == rule
    assert type(rule)(*vars(rule).values()) == rule != type(rule)(0.5)
    assert str(type(rule)(0.5, multiple=1)) == f"{type(rule).__name__}(0.5)"


@pytest.mark.parametrize("text", ["AccuracyDrop(0.01, multiple=8)", "AccuracyDrop( 0.01 ,multiple = '8' )"])
def test_an_accuracy_drop_has_it_too(text: str) -> None:
    assert str(steps_of({1: text})[1]) == "AccuracyDrop(0.01, multiple=8)"


@pytest.mark.parametrize("rule", [ParamsKept, MacsKept, RelativeError])
@pytest.mark.parametrize("multiple", [0, -8, 8.0, True, "8", None])
def test_bad_multiples_are_named(rule: type[Any], multiple: object) -> None:
    message = rf"{rule.__name__}\(0.5, multiple={multiple!r}\): expected an int of at least 1, such as multiple=8"
    with pytest.raises(UserError, match=message):
        rule(0.5, multiple=multiple)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MacsKept(0.5, multiple=0)", r"multiple=0\): expected an int"),
        ("MacsKept(0.5, multiple=-8)", r"multiple='-8'\): expected an int"),
        ("MacsKept(0.5, multiple=8.0)", r"multiple='8.0'\): expected an int"),
        ("AccuracyDrop(0.5, multiple=0)", r"AccuracyDrop\(0.5, multiple=0\): expected an int"),
        ("MacsKept(0.5, times=8)", "times=8 is not understood; MacsKept takes of and multiple, once each"),
        ("MacsKept(0.5, multiple=8, multiple=4)", "multiple=4 is not understood"),
        ("RelativeError(0.5, of=model)", "of=model is not understood; RelativeError takes multiple, once each"),
        ("MacsKept(0.5, 8)", "is not understood; expected an int, a list"),
    ],
)
def test_text_that_says_it_wrongly(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        steps_of({1: text})


def test_a_method_that_takes_no_rule_says_so() -> None:
    with pytest.raises(UserError, match=r"ParamsKept\(0.5, multiple=8\): ADTN's rank is the depth"):
        ADTN(ParamsKept(0.5, multiple=8))


@pytest.mark.parametrize(
    "rank", ["ParamsKept(0.15, multiple=4)", "MacsKept(0.3, multiple=4)", "AccuracyDrop(0.9, multiple=4)"]
)
def test_a_schedule_goes_to_multiples(rank: str, tmp_path: Path) -> None:
    model = fitted(tmp_path, RankSchedule({1: rank}), epochs=2)
    layers = [layer for layer in model.net.modules() if isinstance(layer, FactorizedLayer)]
    assert layers
    assert all(obeys(layer, 4) for layer in layers)
    assert math.prod(layer.spec.ranks[0] for layer in layers) > 0
