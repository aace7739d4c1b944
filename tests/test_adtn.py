"""What ADTN has beyond the other methods: its fit, one generation while evaluating, one generator for several layers."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tolerances import EXACT, FLOAT64
from tnlayers import (
    ADTN,
    ADTNConv2d,
    ADTNLinear,
    FactorizedLayer,
    ParamsKept,
    Rule,
    load_dense,
    resolve,
    rules_from_plain,
    rules_of,
    summarize,
    tensorize,
    to_dense,
)
from tnlayers.factorizations import adtn

pytestmark = pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.body = nn.Conv2d(5, 7, 3, groups=1)
        self.head = nn.Linear(7, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.conv(x).relu()).mean(dim=(2, 3)))


X = torch.randn(2, 3, 6, 6, dtype=torch.float64)
JOINT = [Rule("conv", None), Rule("*", ADTN(2, joint="all", fit_steps=40))]


def joint_net(init: str = "random") -> Net:
    return tensorize(Net().double(), JOINT, init=init, example_input=X)  # type: ignore[arg-type]


def test_a_weight_that_is_one_is_found() -> None:
    dense = ADTNLinear(32, 32, rank=1, dtype=torch.float64).to_dense()
    layer = ADTNLinear.from_dense(dense, rank=1)
    assert layer.decomposition_error < 0.3  # 1.0 is nothing; the fit is not convex


def test_the_fit_reports_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    dense = nn.Linear(64, 48)
    with caplog.at_level(logging.INFO, "tnlayers"), pytest.warns(UserWarning, match="hardly anything of the dense"):
        layer = ADTNLinear.from_dense(dense, rank=2, fit_steps=50)
    steps = [record.getMessage() for record in caplog.records]
    assert len(steps) == 10
    assert steps[-1].startswith("ADTN fit: step 50 of 50, relative error 0.")
    weight = layer.weight.detach().double()
    expected = float((dense.weight - weight).norm() / dense.weight.norm())
    assert layer.decomposition_error == pytest.approx(expected, rel=1e-5)
    assert f"{layer.decomposition_error:.2f}" in steps[-1]  # the scale is the best one: the angle is all that counts
    assert float((dense.weight * weight).sum() / weight.square().sum()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("steps", [0, 30])
def test_a_longer_fit_is_closer(steps: int) -> None:
    dense = nn.Conv2d(6, 8, 3)
    short, long = (ADTNConv2d.from_dense(dense, rank=2, fit_steps=n).decomposition_error for n in (steps, 200))
    assert long < short <= 1


def test_zero_weights_stay_zero() -> None:
    dense = nn.Linear(6, 5)
    nn.init.zeros_(dense.weight)
    assert not ADTNLinear.from_dense(dense, rank=2).weight.any()


def test_a_weight_takes_the_leading_entries() -> None:
    layer = ADTNConv2d(6, 10, 3, groups=2, rank=2, dtype=torch.float64)  # 10 x 3 x 9 = 270 of 512
    whole = layer.factorization.factors(dict(layer.factors.items()), {"weight": (512,)})["weight"]
    torch.testing.assert_close(layer.weight.flatten(), whole[:270], **EXACT)
    assert layer.weight.shape == (10, 3, 3, 3)


def test_it_is_generated_once_while_evaluating(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = ADTNLinear(30, 20, rank=2).eval(), []
    generate = adtn._generate
    monkeypatch.setattr(adtn, "_generate", lambda *args: calls.append(1) or generate(*args))
    x = torch.randn(3, 30)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        assert len(calls) == 1
        layer.factors["layer1"].mul_(2)
        layer(x)
        assert len(calls) == 2
    dense, before = layer.to_dense(), len(calls)
    dense(x)
    assert type(dense) is nn.Linear
    assert len(calls) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": ParamsKept(0.5)}, "ADTN's rank is the depth of its brick wall; give an int"),
        ({"rank": 2, "activation": "gelu"}, "activation 'gelu': expected one of none, relu, leaky_relu"),
        ({"rank": 2, "fit_steps": -1}, "fit_steps -1: expected an int"),
        ({"rank": 2, "joint": 3}, "joint 3: expected a name"),
        ({"rank": (2, 2)}, r"has 2 entries; ADTN takes 1"),
        ({"rank": 2, "joint": "a", "offset": 9, "total": 60}, "does not fit in the 60 of 'a'"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADTNLinear(12, 5, **options)


@pytest.mark.parametrize("init", ["random", "decompose"])
def test_one_generator_for_several_layers(init: str) -> None:
    net = joint_net(init)
    body, head = net.body, net.head
    assert isinstance(body, ADTNConv2d)
    assert isinstance(head, ADTNLinear)
    assert all(body.factors[name] is head.factors[name] for name in ("layer1", "layer2"))
    whole = body.factorization.whole(7 * 45 + 77).factors(dict(body.factors.items()), {"weight": (512,)})["weight"]
    torch.testing.assert_close(body.weight.flatten(), whole[: 7 * 45], **EXACT)
    torch.testing.assert_close(head.weight.flatten(), whole[7 * 45 : 7 * 45 + 77], **EXACT)
    net(X).sum().backward()
    assert all(gates.grad.abs().sum() > 0 for gates in body.factors.values())
    assert sum(parameter.numel() for parameter in body.factors.values()) == 2 * 16 * 8
    copied = copy.deepcopy(net)
    assert copied.body.factors["layer1"] is copied.head.factors["layer1"]
    torch.testing.assert_close(to_dense(copy.deepcopy(net))(X), net(X), **FLOAT64)


def test_a_joint_fit_is_of_all_weights_together() -> None:
    dense = Net().double()
    net = tensorize(copy.deepcopy(dense), JOINT)
    target = torch.cat([dense.body.weight.flatten(), dense.head.weight.flatten()]).detach()
    made = torch.cat([net.body.weight.flatten(), net.head.weight.flatten()]).detach()
    assert float((made * target).sum() / made.square().sum()) == pytest.approx(1, rel=1e-6)
    assert (made - target).norm() < target.norm()
    torch.testing.assert_close(net.head.bias, dense.head.bias, **EXACT)


def test_a_joint_net_is_saved_and_loaded(tmp_path: Path) -> None:
    net = joint_net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = tensorize(Net().double(), rules_from_plain([rule.to_plain() for rule in rules_of(net)]), init="random")
    load_dense(tmp_path / "net.pt", again)
    torch.testing.assert_close(again(X), net(X), **EXACT)
    assert again.body.factors is again.head.factors


def test_a_joint_net_is_counted_once() -> None:
    net = joint_net()
    totals = summarize(net, X, measure=False).totals
    assert totals.params == sum(parameter.numel() for parameter in net.parameters())
    assert totals.dense_params == sum(parameter.numel() for parameter in Net().parameters())


def test_a_deeper_state_is_adopted_by_all_layers_of_a_generator() -> None:
    deeper = tensorize(Net().double(), [Rule("conv", None), Rule("*", ADTN(3, joint="all"))], init="random")
    net = joint_net()
    with pytest.warns(UserWarning, match="adopted from the loaded state"):
        net.load_state_dict(deeper.state_dict())
    torch.testing.assert_close(net(X), deeper(X), **EXACT)
    assert net.body.factors["layer3"] is net.head.factors["layer3"]


def test_what_a_joint_generator_refuses() -> None:
    net = joint_net()
    with pytest.raises(ValueError, match="make those of others too"):
        net.head.truncate(1)
    separate = [Rule("body", ADTN(1, joint="a")), Rule("head", ADTN(1, joint="a"))]
    with pytest.raises(ValueError, match=r"joint 'a': its layers have 392 entries together.*under one rule"):
        tensorize(Net(), separate, init="random")
    resolved = resolve(Net(), JOINT)
    with pytest.raises(ValueError, match="under one rule"):
        tensorize(Net(), [Rule("body", None), *resolved], init="random")


def test_training_a_joint_generator_moves_both_layers() -> None:
    net = joint_net()
    before = [layer.weight.detach().clone() for layer in (net.body, net.head)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    net(X).square().sum().backward()
    optimizer.step()
    assert all(
        isinstance(layer, FactorizedLayer) and not torch.equal(layer.weight, old)
        for layer, old in zip((net.body, net.head), before, strict=True)
    )
