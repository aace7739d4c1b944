"""Several methods in one rule: what each layer gets, what it costs, and how it is written."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from tests.own_method import Blocks
from tnlayers import (
    ADTN,
    CP,
    MPS,
    SVD,
    TT,
    AnyOf,
    Factorization,
    FactorizedLayer,
    LowRank,
    MacsKept,
    ParamsKept,
    RelativeError,
    Rule,
    Tucker,
    UserError,
    fraction_kept,
    resolve,
    rules_from_plain,
    tensorize,
    truncate,
)
from tnlayers.allocation import Candidate, allocate

pytestmark = pytest.mark.filterwarnings("ignore:.*(is above what a weight|and the dense weight)")
METHODS: list[type[Factorization]] = [Tucker, CP, LowRank, SVD, MPS]


class Net(nn.Module):
    """Two convolutions, one of low rank in its channels and one that is a sum of few rank-one terms, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.terms = nn.Conv2d(12, 16, 3, padding=1, bias=False, dtype=torch.float64)
        self.low = nn.Conv2d(12, 12, 3, padding=1, bias=False, dtype=torch.float64)
        self.head = nn.Linear(16, 10, dtype=torch.float64)
        with torch.no_grad():
            left, core, right = torch.randn(12, 3), torch.randn(3, 3, 3, 3), torch.randn(3, 12)
            self.low.weight.copy_(torch.einsum("or,rshw,si->oihw", left, core, right))
            o, i, h, w = (torch.randn(size, 6) for size in (16, 12, 3, 3))
            self.terms.weight.copy_(torch.einsum("or,ir,hr,wr->oihw", o, i, h, w))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.terms(self.low(x)).mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


X = torch.zeros(2, 12, 6, 6, dtype=torch.float64)


def test_each_layer_gets_the_method_with_the_fewest_parameters(net: nn.Module) -> None:
    params: dict[str, dict[str, int]] = {"low": {}, "terms": {}}
    for name, methods in {"any": METHODS, **{each.__name__: [each] for each in METHODS}}.items():
        model = tensorize(_copy(net), [Rule("[lt]*", AnyOf(methods, RelativeError(0.05)))])
        for layer, found in params.items():
            found[name] = model.get_submodule(layer).weight.numel()
            if isinstance(made := model.get_submodule(layer), FactorizedLayer):
                found[name] = made.spec.params
                assert made.decomposition_error <= 0.05
    assert all(found.pop("any") == min(found.values()) for found in params.values())
    assert params["low"]["Tucker"] == 12 * 3 + 3 * 3 * 9 + 3 * 12


@pytest.mark.parametrize(
    "rank", [ParamsKept(0.4), MacsKept(0.4), ParamsKept(0.6, of="model"), MacsKept(0.4, multiple=2)]
)
def test_a_budget_is_kept_and_no_single_method_loses_less(net: nn.Module, rank: Any) -> None:
    """The sum of the logarithms of what is kept of the squared norms is what the budget is spent on."""
    by = MacsKept if isinstance(rank, MacsKept) else ParamsKept
    lost = {}
    for name, factorization in {"mix": AnyOf(METHODS, rank), **{each.__name__: each(rank) for each in METHODS}}.items():
        model = tensorize(_copy(net), [Rule("[lt]*", factorization)], example_input=X)
        layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
        rules = [Rule("[lt]*", factorization)]
        assert fraction_kept(model, by, X, of=rank.of, pattern="[lt]*", rules=rules) <= rank.fraction
        errors = [layers[key].decomposition_error if key in layers else 0.0 for key in ("low", "terms")]
        lost[name] = -sum(torch.log1p(-(torch.tensor(min(error, 1 - 1e-9)) ** 2)).item() for error in errors)
    assert lost["mix"] <= 1.02 * min(lost[each.__name__] for each in METHODS) + 1e-9


def _copy(net: nn.Module) -> nn.Module:
    made = Net()
    made.load_state_dict(net.state_dict())
    return made


def test_the_allocation_is_near_the_best_of_all_choices() -> None:
    """Against all choices of small layers: two methods each, whose estimates are wrong by known factors."""

    def method(rate: float, cost: int, told: float) -> Candidate:
        true = lambda ranks: rate ** ranks[0]  # noqa: E731
        return Candidate((6,), lambda ranks: told * true(ranks), [lambda ranks: cost * ranks[0]], 60, 60, measured=true)

    layers = [[method(0.5, 8, 1.0), method(0.3, 10, 3.0)], [method(0.6, 6, 0.1), method(0.4, 9, 1.0)]]
    for fraction in (0.3, 0.45, 0.6, 0.9):
        chosen = allocate(layers, fraction)
        options = [[*((n, (r,)) for n in (0, 1) for r in range(1, 7)), None] for _ in layers]

        def total(picked: Any) -> tuple[float, float]:
            found = [
                (60, 0.0) if one is None else (each[one[0]].costs[0](one[1]), each[one[0]].measured(one[1]))  # type: ignore[misc]
                for each, one in zip(layers, picked, strict=True)
            ]
            return sum(cost for cost, _ in found), -sum(torch.log1p(-torch.tensor(error)).item() for _, error in found)

        allowed = [total(picked) for picked in itertools.product(*options)]
        best = min(loss for cost, loss in allowed if cost <= (fraction - 0.1) * 120)  # a step less
        cost, loss = total(chosen)
        assert cost <= fraction * 120
        assert loss <= best + 1e-6


def test_layers_get_only_methods_of_their_kind(net: nn.Module) -> None:
    plan = {rule.pattern: rule for rule in resolve(net, [Rule("*", AnyOf([Tucker, TT, Blocks], ParamsKept(0.5)))])}
    assert isinstance(plan["head"].factorization, TT | None)
    assert not isinstance(plan["low"].factorization, TT)
    with pytest.raises(
        UserError, match="pattern 'head' matches only Linear layers such as 'head', and Tucker or CP replaces"
    ):
        resolve(net, [Rule("head", AnyOf([Tucker, CP], ParamsKept(0.5)))])


def test_a_later_budget_keeps_the_methods_and_lowers_the_ranks(net: nn.Module) -> None:
    model = tensorize(net, [Rule("[lt]*", AnyOf(METHODS, ParamsKept(0.5)))])
    before = {name: layer.spec for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
    tensorize(model, [Rule("[lt]*", AnyOf(METHODS, ParamsKept(0.3)))])
    truncate(model, [Rule("[lt]*", AnyOf(METHODS, ParamsKept(0.25)))])
    after = {name: layer.spec for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
    assert all(type(after[name].method) is type(spec.method) for name, spec in before.items())
    assert all(max(after[name].ranks) <= max(spec.ranks) for name, spec in before.items())
    assert fraction_kept(model, ParamsKept) <= 0.25


def test_it_is_written_and_read() -> None:
    given = {"pattern": "*", "methods": ["Tucker", {"method": "MPS", "order": "h w i o"}], "rank": "MacsKept(0.5)"}
    (rule,) = rules_from_plain([given])
    assert rule == Rule("*", AnyOf([Tucker, MPS(1, order="h w i o")], MacsKept(0.5)))
    assert rule.to_plain() == given
    assert rules_from_plain([rule.to_plain()]) == [rule]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"methods": ["Tucker", "Tuckr"], "rank": "MacsKept(0.5)"},
            r"method 'Tuckr' is not known.*did you mean 'Tucker'",
        ),
        ({"methods": ["Tucker"]}, r"need a 'rank'"),
        ({"methods": ["Tucker", "CP"], "rank": 3}, r"rank 3 of several methods: an int means something else for each"),
        ({"methods": [], "rank": "MacsKept(0.5)"}, r"methods \[\]: expected a list of methods"),
        ({"methods": ["Tucker", "dense"], "rank": "MacsKept(0.5)"}, r"methods has 'dense', which every layer may stay"),
        ({"methods": [{"method": "CP", "rank": 2}], "rank": "MacsKept(0.5)"}, r"without a rank"),
        ({"methods": ["MPS"], "order": "h w i o", "rank": "MacsKept(0.5)"}, r"options of one stand with it"),
        ({"methods": ["Tucker"], "method": "CP", "rank": "MacsKept(0.5)"}, r"option 'method' is not known for several"),
        ({"methods": [{"method": "ADTN", "joint": "g"}], "rank": "ParamsKept(0.5)"}, r"ADTN with joint='g'"),
    ],
)
def test_what_cannot_be_is_said(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules_from_plain([{"pattern": "*", **more}])


def test_methods_that_are_none_are_named() -> None:
    with pytest.raises(UserError, match=r"methods has 'Tucker', which is no method"):
        AnyOf(["Tucker"], MacsKept(0.5))  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"joint='g'"):
        AnyOf([ADTN(2, joint="g"), LowRank], ParamsKept(0.5))
