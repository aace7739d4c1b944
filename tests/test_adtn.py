"""What ADTN has beyond the other methods: its fit, one generation while evaluating, one generator for several layers."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_modules.classifier import load_net
from tests.commands import DIGITS, output_to, tnlayers
from tests.tolerances import EXACT, FLOAT64
from tnlayers import (
    ADTN,
    ADTNConv2d,
    ADTNLinear,
    FactorizedLayer,
    ParamsKept,
    Rule,
    load_checkpoint,
    resolve,
    rules_from_plain,
    rules_of,
    summarize,
    tensorize,
    to_dense,
)
from tnlayers.methods import adtn

pytestmark = pytest.mark.filterwarnings(
    "ignore:ADTN. .* leave a relative error", "ignore:.*lower the rank or leave the layer dense"
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.body = nn.Conv2d(5, 7, 3, groups=1)
        self.head = nn.Linear(7, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.conv(x).relu()).mean(dim=(2, 3)))


X = torch.randn(2, 3, 6, 6, dtype=torch.float64)
SLICE = {"name": "a", "offset": 0, "total": 60, "scale": 0.5}
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
    expected = float(((dense.weight - weight).norm() / dense.weight.norm()).detach())
    assert layer.decomposition_error == pytest.approx(expected, rel=1e-5)
    assert f"{layer.decomposition_error:.2f}" in steps[-1]  # the scale is the best one: the angle is all that counts
    assert float((dense.weight.detach() * weight).sum() / weight.square().sum()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("steps", [0, 30])
def test_a_longer_fit_is_closer(steps: int) -> None:
    dense = nn.Conv2d(6, 8, 3)
    short, long = (ADTNConv2d.from_dense(dense, rank=2, fit_steps=n).decomposition_error for n in (steps, 200))
    assert long < short <= 1


def test_zero_weights_stay_zero_and_can_be_trained() -> None:
    dense = nn.Linear(6, 5)
    nn.init.zeros_(dense.weight)
    layer = ADTNLinear.from_dense(dense, rank=2)
    assert not layer.weight.any()
    layer.weight.sum().backward()
    assert layer.factors["layer2"].grad.any()


def test_a_weight_takes_the_leading_entries() -> None:
    layer = ADTNConv2d(6, 10, 3, groups=2, rank=2, dtype=torch.float64)  # 10 x 3 x 9 = 270 of 512
    whole = layer.spec.method.factors(dict(layer.factors.items()), {"weight": (512,)})["weight"]
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
    assert type(layer.to_dense()) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": ParamsKept(0.5)}, "ADTN's rank is the depth of its brick wall; give an int"),
        ({"rank": 10**9}, "rank 1000000000: expected a depth of at most 64"),
        ({"rank": (2, 2)}, r"has 2 entries; ADTN takes 1"),
        ({"rank": 2, "activation": "gelu"}, "activation 'gelu': expected one of none, relu, leaky_relu"),
        ({"rank": 2, "activation": []}, r"activation \[\]: expected one of none, relu, leaky_relu"),
        ({"rank": 2, "fit_steps": -1}, "fit_steps -1: expected an int"),
        ({"rank": 2, "joint": 3}, "joint 3: expected a name"),
        ({"rank": 2, "joint": "a"}, "joint 'a' joins the layers of one rule; a layer by itself has none"),
        ({"rank": 2, "joint": {"name": "a"}}, "expected a name, or the name, offset, total and scale"),
        ({"rank": 2, "joint": SLICE | {"offset": -1}}, "0 <= offset < total"),
        ({"rank": 2, "joint": SLICE | {"offset": 2**70}}, "0 <= offset < total"),
        ({"rank": 2, "joint": SLICE | {"total": True}}, "0 <= offset < total"),
        ({"rank": 2, "joint": SLICE | {"scale": 0}}, "a scale above 0 and at most 1"),
        ({"rank": 2, "joint": SLICE | {"offset": 9}}, "a weight of 60 entries does not fit in"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADTNLinear(12, 5, **options)


def made(net: Net) -> torch.Tensor:
    """What the generator of a joint net makes."""
    layer = net.body
    shapes = {"weight": (7 * 45 + 77,)}
    return layer.spec.method.alone().factors(dict(layer.factors.items()), shapes)["weight"].detach()


@pytest.mark.parametrize("init", ["random", "decompose"])
def test_one_generator_for_several_layers(init: str) -> None:
    net = joint_net(init)
    body, head = net.body, net.head
    assert isinstance(body, ADTNConv2d)
    assert isinstance(head, ADTNLinear)
    assert all(body.factors[name] is head.factors[name] for name in ("layer1", "layer2"))
    torch.testing.assert_close(body.weight.flatten(), made(net)[: 7 * 45] * 45**-0.5, **FLOAT64)
    torch.testing.assert_close(head.weight.flatten(), made(net)[7 * 45 :] * 7**-0.5, **FLOAT64)
    assert sum(parameter.numel() for parameter in body.factors.values()) == 2 * 16 * 8
    copied = copy.deepcopy(net)
    assert copied.body.factors["layer1"] is copied.head.factors["layer1"]
    torch.testing.assert_close(to_dense(copy.deepcopy(net))(X), net(X), **FLOAT64)


def test_a_joint_gradient_is_the_sum_of_the_layers_own() -> None:
    net = joint_net()
    gates = net.body.factors["layer1"]
    body, head = (torch.autograd.grad(layer.weight.square().sum(), gates)[0] for layer in (net.body, net.head))
    assert body.abs().sum() > 0
    assert head.abs().sum() > 0
    (net.body.weight.square().sum() + net.head.weight.square().sum()).backward()
    torch.testing.assert_close(gates.grad, body + head, **FLOAT64)


def test_a_joint_fit_is_of_all_weights_together() -> None:
    dense = Net().double()
    with torch.no_grad():
        dense.head.weight.mul_(3)
    net = tensorize(copy.deepcopy(dense), JOINT)
    target = torch.cat([dense.body.weight.flatten() * 45**0.5, dense.head.weight.flatten() * 7**0.5]).detach()
    assert float((made(net) * target).sum() / made(net).square().sum()) == pytest.approx(1, rel=1e-6)
    assert (made(net) - target).norm() < target.norm()
    torch.testing.assert_close(net.head.bias, dense.head.bias, **EXACT)


def test_a_joint_net_has_the_dense_scale_in_all() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        assert made(joint_net()).square().mean().sqrt().item() == pytest.approx(3**-0.5, rel=1e-6)  # as U(-1, 1)


def test_a_joint_net_is_saved_and_loaded(tmp_path: Path) -> None:
    net = joint_net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = tensorize(Net().double(), rules_from_plain([rule.to_plain() for rule in rules_of(net)]), init="random")
    load_checkpoint(tmp_path / "net.pt", again)
    torch.testing.assert_close(again(X), net(X), **EXACT)
    assert again.body.factors is again.head.factors


def test_a_joint_net_outlives_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = [{"pattern": "[cf]*[41]", "method": "ADTN", "rank": 1, "joint": "big", "fit_steps": 20}]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"model": {"rules": rules}}))
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    command = [*DIGITS, "-c", tmp_path / "rules.yaml", *few]
    assert tnlayers("fit", *command, *output_to(tmp_path / "fit")) == 0
    assert "ADTN fit: step 20 of 20" in capsys.readouterr().err
    (last,) = (tmp_path / "fit").rglob("last.ckpt")
    net, _ = load_net(last)
    assert net.fc1.factors is net.conv4.factors is net.conv1.factors
    assert tnlayers("test", *command, *output_to(tmp_path / "test"), "--ckpt_path", last) == 0
    assert "ADTN fit" not in capsys.readouterr().err  # the checkpoint brings weights and structure


def test_what_is_left_of_a_joint_net_is_saved_and_loaded() -> None:
    net = joint_net()
    net.head = to_dense(net.head)
    again = tensorize(Net().double(), rules_from_plain([rule.to_plain() for rule in rules_of(net)]), init="random")
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(X), net(X), **EXACT)


def test_what_is_left_of_a_generator_may_be_little() -> None:
    net = tensorize(nn.Sequential(nn.Linear(8, 8), nn.Linear(128, 128)), [Rule("*", ADTN(1, joint="g"))], init="random")
    net[1] = nn.Linear(128, 128)
    again = tensorize(nn.Sequential(nn.Linear(8, 8), nn.Linear(128, 128)), rules_of(net), init="random")
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again[0].weight, net[0].weight, **EXACT)


def test_names_of_generators_stay_apart() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tensorize(block, [Rule("0", ADTN(1, joint="g"))], init="random")
    tensorize(block, [Rule("1", ADTN(1, joint="g 2"))], init="random")
    rules = rules_of(nn.Sequential(block, copy.deepcopy(block)))
    assert len({rule.factorization.joint.name for rule in rules}) == 4


def test_a_copied_generator_is_one_of_its_own() -> None:
    net = joint_net()
    pair = nn.ModuleDict({"one": net, "two": copy.deepcopy(net)})
    with torch.no_grad():
        pair["two"].body.factors["layer1"].mul_(2)
    blank = nn.ModuleDict({"one": Net().double(), "two": Net().double()})
    again = tensorize(blank, rules_from_plain([rule.to_plain() for rule in rules_of(pair)]), init="random")
    again.load_state_dict(pair.state_dict())
    torch.testing.assert_close(again["two"](X), pair["two"](X), **EXACT)
    torch.testing.assert_close(again["one"](X), pair["one"](X), **EXACT)


def test_a_joint_layer_converted_alone_has_gates_of_its_own() -> None:
    net = joint_net()
    dense = net.head.to_dense()
    alone = ADTNLinear.from_spec(dense, net.head.spec)
    assert alone.factors["layer1"].shape == (6, 2, 2, 2, 2)  # 77 entries: 7 bits
    assert alone.decomposition_error < 1


def test_a_joint_net_is_counted_once() -> None:
    net = joint_net()
    summary = summarize(net, X, measure=False)
    totals = summary.totals
    assert [layer.note for layer in summary.layers[1:]] == ["made by generator 'all', whose parameters count once"] * 2
    assert totals.params == sum(parameter.numel() for parameter in net.parameters())
    assert totals.dense_params == sum(parameter.numel() for parameter in Net().parameters())


def frozen(net: Net) -> None:
    net.body.requires_grad_(False)


def halved(net: Net) -> None:
    net.head.float()


@pytest.mark.parametrize(
    ("change", "joint", "message"),
    [
        (frozen, {}, "need the same dtype and device, and all or none of them trained"),
        (halved, {}, "need the same dtype and device"),
        (None, {"body": {"offset": 70}}, "the slices overlap"),
        (None, {"body": {"total": 400}}, "the same rank, options and total"),
        (
            None,
            {"body": {"total": 2**60}, "head": {"total": 2**60}},
            "the generator would make .* entries; the model has 550 parameters",
        ),
    ],
)
def test_what_a_joint_generator_refuses(change: Any, joint: dict[str, Any], message: str) -> None:
    net = Net().double()
    if change:
        change(net)
    plain = [rule.to_plain() for rule in resolve(Net(), JOINT)]
    for rule in plain:
        if rule["pattern"] in joint:
            rule["joint"] = rule["joint"] | joint[rule["pattern"]]
    with pytest.raises(ValueError, match=f"joint 'all' of body, head: .*{message}"):
        tensorize(net, rules_from_plain(plain), init="random")
    assert not any(isinstance(module, FactorizedLayer) for module in net.modules())


def test_a_joint_layer_is_neither_truncated_nor_joined_later() -> None:
    net = joint_net()
    with pytest.raises(ValueError, match="make other layers too"):
        net.head.truncate(1)
    with pytest.raises(ValueError, match="has a generator of this name"):
        tensorize(net, [Rule("conv", ADTN(1, joint="all"))], init="random")
    separate = [Rule("body", ADTN(1, joint="a")), Rule("head", ADTN(1, joint="a"))]
    with pytest.raises(ValueError, match=r"joint 'a' of body, head: .* the same rank, options and total"):
        tensorize(Net(), separate, init="random")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
def test_it_is_fitted_in_any_mode(mode: Any) -> None:
    dense = nn.Linear(20, 12)
    expected = ADTNLinear.from_dense(dense, rank=2, fit_steps=20).decomposition_error
    with mode():
        assert ADTNLinear.from_dense(dense, rank=2, fit_steps=20).decomposition_error == expected


@pytest.mark.parametrize("features", [(1, 1), (1, 2), (1, 3), (5, 1)])
def test_the_smallest_weights(features: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tnlayers"):
        layer = ADTNLinear.from_dense(nn.Linear(*features, dtype=torch.float64), rank=1)
    assert layer.decomposition_error < 0.1
    assert all("nan" not in record.getMessage() for record in caplog.records)
