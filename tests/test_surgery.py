"""From rules to layers and back, on nets with the traps that real ones have."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

from tests.cases import CASES, Case
from tests.tolerances import FLOAT32, FLOAT64
from tnlayers import (
    CP,
    MPS,
    SVD,
    TT,
    FactorizedLayer,
    LayerSpec,
    LowRank,
    MacsKept,
    ParamsKept,
    RelativeError,
    Rule,
    TTConv,
    Tucker,
    TuckerConv2d,
    UserError,
    resolve,
    rules_from_plain,
    rules_of,
    summarize,
    tensorize,
    to_dense,
    truncate,
)
from tnlayers.rules import fits
from tnlayers.surgery import Example


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.head = nn.Linear(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.conv1(x).relu()).mean(dim=(2, 3)))


X = torch.randn(2, 3, 16, 16)


def fractions(net: nn.Module, dense: nn.Module, names: list[str], example: Example = X) -> tuple[float, float]:
    """(parameters, MACs) kept in the weights of the named layers."""
    ours = {layer.name: layer for layer in summarize(net, example, measure=False).layers if layer.name in names}
    bias = {name: module.bias.numel() for name, module in dense.named_modules() if name in names}
    params = sum(layer.params - bias[name] for name, layer in ours.items())
    dense_params = sum(layer.dense_params - bias[name] for name, layer in ours.items())
    return params / dense_params, sum(layer.macs for layer in ours.values()) / sum(
        layer.dense_macs for layer in ours.values()
    )


@pytest.mark.parametrize("method", [Tucker, CP, MPS])
@pytest.mark.parametrize("init", ["decompose", "random"])
def test_budgets_hold_for_the_layers_of_the_rule(method: type, init: Any) -> None:
    dense = Net()
    for place, rule in enumerate((ParamsKept(0.4), MacsKept(0.4))):
        net = tensorize(copy.deepcopy(dense), [Rule("body.*", method(rule))], init=init, example_input=X)
        kept = fractions(net, dense, ["body.0", "body.2"])[place]
        assert 0.97 * 0.4 <= kept <= 0.4, (rule, kept)


def test_from_scratch_ranks_that_hold_each_other_down_count_as_what_they_attain() -> None:
    """Two spatial filters cannot be made up for by wide cores; and a kernel with two equal ends gets two equal ends."""
    net = nn.Sequential(nn.Conv2d(64, 64, 3))
    (train,) = resolve(net, [Rule("0", TTConv(ParamsKept(0.3)))], init="random")
    assert train.factorization.rank[0] > 4  # of 9
    (chain,) = resolve(net, [Rule("0", MPS(ParamsKept(0.3)))], init="random")
    assert chain.factorization.rank[0] == chain.factorization.rank[2]


def test_resolving_decides_and_touches_nothing() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    rules = [Rule("conv1", None), Rule("*", Tucker(MacsKept(0.5))), Rule("head", TT(4))]
    resolved = resolve(net, rules, X)
    assert [rule.pattern for rule in resolved] == ["conv1", "body.0", "body.2", "head"]
    assert resolved[0].factorization is None
    assert "leaves it dense" in resolved[0].reason
    assert all(isinstance(rule.factorization.rank, tuple) for rule in resolved[1:] if rule.factorization)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert net.training
    again = rules_from_plain([rule.to_plain() for rule in resolved])
    assert again == resolved
    once, twice = tensorize(copy.deepcopy(net), resolved), tensorize(copy.deepcopy(net), again)
    torch.testing.assert_close(once(X), twice(X), rtol=0, atol=0)
    assert [rule.factorization for rule in rules_of(once)] == [r.factorization for r in resolved if r.factorization]


def test_first_match_wins_and_a_method_only_takes_its_own_layers() -> None:
    net = tensorize(Net(), [Rule("body.0", CP(3)), Rule("*", Tucker((2, 2))), Rule("*", TT(2))])
    kinds = {name: type(module).__name__ for name, module in net.named_modules() if isinstance(module, FactorizedLayer)}
    assert kinds == {"conv1": "TuckerConv2d", "body.0": "CPConv2d", "body.2": "TuckerConv2d", "head": "TTLinear"}


@pytest.mark.filterwarnings("ignore:.*above what a weight", "ignore:.*lower the rank or leave the layer dense")
def test_there_and_back() -> None:
    dense = Net().double().eval()
    net = tensorize(copy.deepcopy(dense), [Rule("body.*", Tucker(32)), Rule("head", TT(1000))])
    x = X.double()
    torch.testing.assert_close(net(x), dense(x), **FLOAT64)
    back = to_dense(net)
    assert [type(module) for module in back.modules()] == [type(module) for module in dense.modules()]
    torch.testing.assert_close(back(x), dense(x), **FLOAT64)
    assert not back.training


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [Rule("bdoy.0", Tucker(2))],
            r"pattern 'bdoy.0' matches no layer; of the 3 layers that Tucker replaces the nearest are 'body.0'",
        ),
        ([Rule("bdoy.0", None)], "matches no layer; of the 4 layers the nearest are"),
        ([Rule("head", Tucker(2))], "matches only Linear layers such as 'head', and Tucker replaces convolutions"),
        ([Rule("*", Tucker(MacsKept(0.5)))], "depends on how the layers are used; give an example_input"),
        ([Rule("*", Tucker(ParamsKept(1e-6)))], "cannot be reached: rank 1 in every layer keeps"),
    ],
)
def test_rules_that_cannot_be_followed_are_named(rules: list[Rule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensorize(Net(), rules)
    with pytest.raises(ValueError, match="init 'rnadom': expected 'decompose' or 'random'"):
        tensorize(Net(), [Rule("*", Tucker(2))], init="rnadom")  # type: ignore[arg-type]


def test_a_rule_that_comes_too_late_is_said() -> None:
    with pytest.warns(UserWarning, match=r"rule 'body.0' takes no layer: earlier rules take all that it matches"):
        resolve(Net(), [Rule("body*", Tucker(4)), Rule("body.0", CP(4))])


def test_relative_error_is_met_in_every_layer() -> None:
    net = Net()
    with torch.no_grad():  # weights with something to drop
        net.body[0].weight.mul_(torch.logspace(0, -3, 32).reshape(-1, 1, 1, 1))
    resolved = resolve(net, [Rule("body.*", Tucker(RelativeError(0.05)))], X)
    tensorize(net, resolved)
    assert isinstance(net.body[0], TuckerConv2d)
    assert net.body[0].decomposition_error <= 0.05
    assert {rule.pattern: rule.reason for rule in resolved}["body.2"].endswith("dense is cheaper")


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    tensorize(net, [Rule("0", Tucker((3, 3)))])
    assert net[0] is net[2]
    assert isinstance(net[0], TuckerConv2d)
    assert len(list(net.parameters())) == 4


def test_a_tied_weight_stays_dense_with_the_reason() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(20, 12), "head": nn.Linear(12, 20), "other": nn.Linear(12, 20)})
    net["head"].weight = net["embedding"].weight
    embedding, head, other = resolve(net, [Rule("[ho]*", TT(2))])
    assert embedding.factorization is head.factorization is None
    assert embedding.reason == "no rule takes it"
    assert "tied to 'embedding.weight'" in head.reason
    assert other.factorization


def test_a_tied_bias_stays_tied() -> None:
    net = nn.Sequential(nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(12, 20))
    net[1].bias = net[0].bias
    *tied, free = resolve(net, [Rule("*", TT(2))])
    assert all("tied to" in rule.reason for rule in tied)
    assert free.factorization


def test_an_integer_rank_that_grows_a_layer_is_said() -> None:
    with pytest.warns(UserWarning, match=r"0: Tucker of rank \(8, 8\) has 192 parameters and the dense weight 64"):
        tensorize(nn.Sequential(nn.Conv2d(8, 8, 1)), [Rule("0", Tucker(8))])


def test_names_that_look_like_patterns() -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(12, 20)})
    tensorize(net, resolve(net, [Rule("*", TT(2))]))
    assert isinstance(net["a[0]"], FactorizedLayer)


class Reused(nn.Module):
    """A convolution that runs six times, one at half the size, and linears over positions and over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.once = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = self.often(x)
        x = self.once(input=x[..., ::2, ::2])
        return self.head(self.wide(x.flatten(2).mT).mean(dim=1))


@pytest.mark.parametrize("fraction", [0.5, 0.7])
def test_macs_are_budgeted_as_often_as_a_layer_runs(fraction: float) -> None:
    dense, x = Reused(), torch.randn(2, 16, 12, 12)
    for pattern, rule in (
        ("o*", Tucker(MacsKept(fraction))),
        ("[wh]*", TT(MacsKept(fraction), in_shape=(4, 4), out_shape=(4, 4))),
    ):
        net = tensorize(copy.deepcopy(dense), [Rule(pattern, rule)], example_input=x)
        layers = [layer for layer in summarize(net, x, measure=False).layers if layer.method != "dense"]
        names = ["often", "once"] if pattern == "o*" else ["wide", "head"]
        kept = sum(layer.macs for layer in summarize(net, x, measure=False).layers if layer.name in names)
        full = sum(layer.macs for layer in summarize(dense, x, measure=False).layers if layer.name in names)
        assert layers
        assert kept <= fraction * full
    counted = {layer.name: layer.macs for layer in summarize(dense, x, measure=False).layers}
    assert counted == {"often": 6 * 16 * 144 * 144, "once": 16 * 144 * 36, "wide": 36 * 256, "head": 256}


def test_an_unbatched_example() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    tensorize(net, [Rule("0", Tucker(MacsKept(0.5)))], example_input=torch.randn(16, 9, 9))
    (layer,) = summarize(net, torch.randn(16, 9, 9), measure=False).layers
    assert layer.dense_macs == 16 * 16 * 9 * 81


def test_a_layer_with_hooks_stays_dense_with_the_reason() -> None:
    net = Net()
    net.body[0].register_forward_hook(lambda *_: None)
    resolved = {rule.pattern: rule for rule in resolve(net, [Rule("body.*", Tucker(2))])}
    assert "hooks" in resolved["body.0"].reason
    assert resolved["body.2"].factorization is not None


@pytest.mark.parametrize("pattern", ["*", "*.in_proj", "*.out_proj", "linear1"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.filterwarnings("ignore:.*above what a weight", "ignore:.*parameters and the dense weight")
def test_attention_is_opened_and_computes_the_same(pattern: str, training: bool) -> None:
    """MultiheadAttention reads its projections' weights itself, and torch's fused encoder those of all its layers."""
    dense = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    net, x = copy.deepcopy(dense), torch.randn(2, 5, 16, dtype=torch.float64)
    tensorize(net, [Rule(pattern, LowRank(10**6))])
    names = {"self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"}
    factorized = {name for name, module in net.named_modules() if isinstance(module, FactorizedLayer)}
    assert factorized == {name for name in names if fits(name, pattern)}
    with torch.no_grad():
        torch.testing.assert_close(net(x), dense(x), **FLOAT64)
        torch.testing.assert_close(to_dense(net)(x), dense(x), **FLOAT64)
    assert type(net.self_attn) is nn.MultiheadAttention
    assert net.state_dict().keys() == dense.state_dict().keys()


def test_an_optimizer_that_was_made_before_is_warned_of() -> None:
    net, other = Net(), Net()
    fine = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.warns(UserWarning, match=r"Adam was made before .*: 2 of the \d+ parameters .* make it anew") as caught:
        tensorize(net, [Rule("body.0", Tucker(2))])
    assert len(caught) == 1
    assert optimizer.param_groups
    assert fine.param_groups


def test_a_model_that_is_one_layer_comes_back_replaced() -> None:
    layer = tensorize(nn.Linear(12, 20), [Rule("*", TT(2))])
    assert isinstance(layer, FactorizedLayer)
    assert type(to_dense(layer)) is nn.Linear


def test_frozen_layers_stay_frozen_and_modes_stay() -> None:
    net = Net()
    net.body.requires_grad_(False).eval()
    tensorize(net, [Rule("*", Tucker(2))])
    assert net.training
    assert not net.body[0].training
    assert not any(parameter.requires_grad for parameter in net.body.parameters())
    assert all(parameter.requires_grad for parameter in net.conv1.parameters())


AGAIN = {
    "the same": Tucker((8, 6)),
    "fewer": Tucker((4, 4)),
    "more": Tucker((12, 9)),
    "another method": CP(5),
    "another order": MPS(4, order="h w i o"),
}


@pytest.mark.parametrize("asked", AGAIN)
def test_tensorizing_again_does_what_is_asked(asked: str) -> None:
    """As if the layer were dense, with the weight that its factors make; what is there already is left."""
    net = tensorize(Net(), [Rule("body.*", Tucker((8, 6)))])
    layer, rules = net.body[0], [Rule("body.0", AGAIN[asked])]
    dense = tensorize(to_dense(copy.deepcopy(net)), rules)
    tensorize(net, rules)
    assert (net.body[0] is layer) == (asked == "the same")
    assert net.body[0].spec == dense.body[0].spec
    torch.testing.assert_close(net.body[0].weight, dense.body[0].weight, **FLOAT32)
    assert net.body[2].ranks == (8, 6)


@pytest.mark.parametrize("budget", [ParamsKept, MacsKept])
def test_budgets_again_are_of_the_dense_layers(budget: Any) -> None:
    dense, net = Net(), Net()
    place = int(budget is MacsKept)
    for fraction in (0.6, 0.6, 0.3):
        before, again = list(net.modules()), rules_of(net)
        tensorize(net, [Rule("body.*", Tucker(budget(fraction)))], example_input=X)
        assert 0.97 * fraction <= fractions(net, dense, ["body.0", "body.2"])[place] <= fraction
        assert (before == list(net.modules())) == (fraction == 0.6 and bool(again))
    with pytest.warns(UserWarning, match=r"body.0, body.2: .*\(0.9\) changes nothing, since 0.[23]\d* is kept already"):
        tensorize(net, [Rule("body.*", Tucker(budget(0.9)))], example_input=X)
    tensorize(net, [Rule("body.*", CP(budget(0.3)))], example_input=X)
    assert all(isinstance(net.body[n].spec.method, CP) for n in (0, 2))
    assert 0.97 * 0.3 <= fractions(net, dense, ["body.0", "body.2"])[place] <= 0.3


def test_summary_counts_and_reasons() -> None:
    dense = Net().eval()
    net = copy.deepcopy(dense)
    rules = resolve(net, [Rule("conv1", None), Rule("body.*", Tucker((6, 5)))], X)
    summary = summarize(tensorize(net, rules), X, reference=dense, rules=rules)
    layers = {layer.name: layer for layer in summary.layers}
    assert list(layers) == ["conv1", "body.0", "body.2", "head"]
    assert layers["body.0"].dense_params == 32 * 16 * 9 + 32
    assert layers["body.0"].params == 5 * 16 + 6 * 5 * 9 + 32 * 6 + 32
    assert layers["body.0"].dense_macs == 32 * 16 * 9 * 8 * 8
    assert layers["head"].macs == 32 * 24
    assert layers["conv1"].note == "the rule 'conv1' leaves it dense"
    assert layers["head"].note == "no rule takes it"
    weight, approximation = dense.body[0].weight.detach(), net.body[0].weight.detach()
    assert layers["body.0"].error == pytest.approx(float((weight - approximation).norm() / weight.norm()), rel=1e-4)
    assert summary.totals.params == sum(parameter.numel() for parameter in net.parameters())
    assert summary.totals.dense_params == sum(parameter.numel() for parameter in dense.parameters())
    assert summary.totals.macs == sum(layer.macs for layer in summary.layers)
    assert summary.totals.seconds is not None
    assert str(summary).count("\n") == 3 + len(layers)
    assert net.training is False


def test_a_dense_model_can_be_summarised() -> None:
    totals = summarize(Net(), X, measure=False).totals
    assert totals.params_kept == totals.macs_kept == 1


def test_example_inputs_do_not_touch_the_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    before = net[1].running_mean.clone()
    tensorize(net, [Rule("0", Tucker(MacsKept(0.9)))], example_input=X)
    torch.testing.assert_close(net[1].running_mean, before, **FLOAT32)
    assert net[1].training


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_weight_that_is_not_finite_is_named(case: Case, value: float) -> None:
    """By every kind of rule; from scratch it does not count."""
    fine, spoilt = case.dense(), case.dense()
    net = nn.ModuleDict({"fine": fine, "spoilt": spoilt})
    assert isinstance(spoilt.weight, torch.Tensor)
    with torch.no_grad():
        spoilt.weight.view(-1)[random.randrange(spoilt.weight.numel())] = value
    before = list(net.modules())
    budgets = [ParamsKept(0.5), RelativeError(0.1)] if case.exact else []
    for rank in (case.rank, *budgets):
        for job in (resolve, tensorize):
            with pytest.raises(
                ValueError, match=f"spoilt: 1 of the {spoilt.weight.numel()} values of its weight are not finite"
            ):
                job(net, [Rule("*", case.method(rank))])
        with pytest.raises(ValueError, match="values of its weight are not finite"):
            case.convert(spoilt, rank)
    assert list(net.modules()) == before
    tensorize(net, [Rule("*", case.method(case.rank))], init="random")
    assert all(torch.isfinite(parameter).all() for layer in net.values() for parameter in layer.factors.values())


def test_a_layer_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting makes one spec, compiles a plan for each mode, and draws nothing at random; truncating makes what it decides on."""
    specs, plans = [], []
    settled, compiled = LayerSpec.__post_init__, LayerSpec.compile
    monkeypatch.setattr(LayerSpec, "__post_init__", lambda spec: (specs.append(spec), settled(spec))[1])
    monkeypatch.setattr(LayerSpec, "compile", lambda *given, **by: (plans.append(given), compiled(*given, **by))[1])
    net = nn.Sequential(nn.Conv2d(8, 8, 3))
    state = torch.get_rng_state()
    tensorize(net, [Rule("0", Tucker((6, 4)))])
    assert (len(specs), len(plans)) == (1, 2)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    truncate(net, [Rule("0", Tucker((3, 2)))])
    assert len(plans) == 4


NAN = nn.Sequential(nn.Linear(8, 8))
NAN[0]._parameters["weight"] = NAN[0]._parameters.pop("weight")  # behind the bias, as parametrizations leave it
nn.init.constant_(NAN[0].weight, float("nan"))
TIED = nn.ModuleDict({"table": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)})
TIED["head"].weight = TIED["table"].weight


@pytest.mark.parametrize(
    ("model", "rules", "message"),
    [
        (NAN, [Rule("*", SVD(2))], "^0: 64 of the 64 values of its weight are not finite"),
        (
            TIED,
            [Rule("table", LowRank(2))],
            "^pattern 'table' matches only layers .* 'table': it is tied to 'head.weight'",
        ),
        (NAN, Rule("*", SVD(2)), r"^rules Rule\(.*: expected a list of rules"),
        (NAN, ["*"], r"^rules \['\*'\]: expected a list of rules"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(model: nn.Module, rules: Any, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        tensorize(model, rules)
    torch.testing.assert_close(model.state_dict(), before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("pattern", "method"), [(3, None), ("*", SVD), ("*", "SVD")])
def test_rules_are_of_names_and_methods(pattern: Any, method: Any) -> None:
    with pytest.raises(UserError, match=r"expected the name of a layer|is no method with a rank, such as Tucker\(8\)"):
        Rule(pattern, method)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_entries_stays() -> None:
    net = nn.Sequential(nn.Linear(0, 5), nn.Linear(8, 8))
    stays, taken = resolve(net, [Rule("*", SVD(2))])
    assert stays.reason == "its weight of shape (5, 0) has no entries"
    assert taken.factorization == SVD((2,))


def test_layers_that_keep_another_method_than_was_asked_for_are_said() -> None:
    net = tensorize(nn.Sequential(nn.Linear(64, 64)), [Rule("*", TT(4))])
    with pytest.warns(
        UserWarning, match=r"0 stays TT of rank \(4, 4\): RelativeError\(1e-09\): dense is cheaper; `to_dense`"
    ):
        tensorize(net, [Rule("*", SVD(RelativeError(1e-9)))])
