"""Healing slice by slice: what a slice is, that it learns from the dense one, and that nothing else changes."""

import copy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.own_module import UNet
from tests.processes import HANGING
from tests.tolerances import EXACT
from tnlayers import CP, LowRank, Rule, Tucker, UserError, features, heal, slices_of, tensorize, to_dense

pytestmark = pytest.mark.filterwarnings("ignore:.*(is above what a weight|and the dense weight)")
LAYERS = [Rule("*", LowRank(4))]


class Block(nn.Module):
    """A residual block that takes a scale by name and returns a pair."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, int]:
        return x + scale * self.drop(self.conv2(self.bn(self.conv1(x)).relu())), 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x, _ = block(x, scale=torch.tensor(0.5))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = Net().eval()
    return tensorize(copy.deepcopy(dense), [Rule("*.conv?", Tucker(3)), Rule("head", LowRank(2))]), dense


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(4)]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            torchvision.models.resnet18,
            ["conv1", *(f"layer{stage}.{n}" for stage in (1, 2, 3, 4) for n in (0, 1)), "fc"],
        ),
        (
            torchvision.models.vgg11,
            [f"features.{n}" for n in ("0..2", "3..5", "6..7", "8..10", "11..12", "13..15", "16..17", "18..20")]
            + ["classifier.0..2", "classifier.3..5", "classifier.6"],
        ),
        (
            torchvision.models.mobilenet_v3_small,
            [f"features.{n}" for n in range(13)] + ["classifier.0..2", "classifier.3"],
        ),
        (
            lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32),
            ["conv_proj", *(f"encoder.layers.encoder_layer_{n}" for n in range(2)), "heads.head"],
        ),
        (lambda: nn.Linear(8, 8), [""]),
    ],
)
def test_slices_are_the_blocks_of_the_module_tree(build: Callable[[], nn.Module], expected: list[str]) -> None:
    with torch.device("meta"):
        dense = build()
        model = tensorize(copy.deepcopy(dense), LAYERS, init="random")
    assert slices_of(model, dense) == expected
    assert slices_of(dense, dense) == []


def test_slices_learn_and_nothing_else_changes(nets: tuple[nn.Module, nn.Module], batches: list[Tensor]) -> None:
    model, dense = nets
    model.blocks[0].conv1.bias.requires_grad_(False)
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(dense.state_dict())
    modes = [module.training for module in model.modules()]
    told: list[tuple[str, float, float]] = []
    found = heal(model, dense, batches, steps=30, progress=lambda *said: told.append(said))
    assert [one.name for one in found] == ["blocks.0", "blocks.1", "head"] == [name for name, _, _ in told]
    assert all(one.after < one.before for one in found)
    after = model.state_dict()
    assert not torch.equal(after["blocks.0.conv1.factors.core"], before["blocks.0.conv1.factors.core"])
    assert not torch.equal(after["blocks.0.bn.running_mean"], before["blocks.0.bn.running_mean"])
    for name in ("stem.weight", "stem.bias", "blocks.0.conv1.bias"):
        torch.testing.assert_close(after[name], before[name], **EXACT)
    torch.testing.assert_close(dense.state_dict(), kept, **EXACT)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_errors_told_are_those_of_the_batches_set_aside(
    nets: tuple[nn.Module, nn.Module], batches: list[Tensor]
) -> None:
    model, dense = nets
    x = dense.stem(batches[0])
    scale = torch.tensor(0.5)
    for after in (False, True):
        with torch.no_grad():
            wanted, ours = (net.blocks[0].eval()(x, scale=scale)[0] for net in (dense, model))
        error = float((ours - wanted).square().sum() / wanted.square().sum())
        if not after:
            (found,) = heal(model, dense, batches, slices=["blocks.0"], steps=20)
        assert error == pytest.approx(found.after if after else found.before, rel=1e-4)


def test_a_fit_that_does_not_help_is_undone(nets: tuple[nn.Module, nn.Module], batches: list[Tensor]) -> None:
    model, dense = nets
    before = copy.deepcopy(model.state_dict())
    found = heal(model, dense, batches, refits=False, rate=1e4, steps=5)
    assert all(one.after == one.before for one in found)
    torch.testing.assert_close(model.state_dict(), before, **EXACT)


def test_it_is_the_same_at_each_run_and_with_features_in_files(
    nets: tuple[nn.Module, nn.Module], batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense = nets
    others = [copy.deepcopy(model) for _ in range(2)]
    found = [heal(each, dense, batches, steps=6) for each in (model, others[0])]
    assert found[0] == found[1]
    torch.testing.assert_close(others[0].state_dict(), model.state_dict(), **EXACT)
    monkeypatch.setattr(features, "_IN_MEMORY", 0)
    in_files = heal(others[1], dense, batches, steps=6)  # its samples stay in their batches
    assert all(one.after < one.before for one in in_files)


KILLED = """
import os, signal, sys
from tests.test_healing import interim_nets
from tnlayers import heal

model, dense, batches = interim_nets()

def kill(name: str, done: float, total: float) -> None:
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

heal(model, dense, batches, steps=4, interim=sys.argv[1], progress=kill)
"""


def interim_nets() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    dense = Net().eval()
    model = tensorize(copy.deepcopy(dense), [Rule("*.conv?", Tucker(3)), Rule("head", LowRank(2))])
    return model, dense, [torch.randn(16, 3, 8, 8) for _ in range(4)]


def test_a_killed_job_goes_on_and_ends_in_the_same_model(tmp_path: Path) -> None:
    path, root = tmp_path / "interim.pt", Path(__file__).parents[1]
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, path], cwd=root, timeout=HANGING, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    whole, dense, batches = interim_nets()
    told: list[str] = []
    found = heal(whole, dense, batches, steps=4)
    model, dense, batches = interim_nets()
    again = heal(model, dense, batches, steps=4, interim=path, progress=lambda name, *_: told.append(name))
    assert told == ["head"]
    assert again == found
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), **EXACT)
    with pytest.raises(UserError, match=r"interim.pt: expected what a job like this one.*there steps is 4, here 5"):
        heal(model, dense, batches, steps=5, interim=path)
    with torch.no_grad():
        dense.head.bias += 1
    with pytest.raises(UserError, match=r"interim.pt: expected what a job like this one.*there weights and data is"):
        heal(interim_nets()[0], dense, batches, steps=4, interim=path)
    path.write_text("nothing")
    with pytest.raises(UserError, match=r"interim.pt: expected what a job like this one"):
        heal(model, dense, batches, steps=4, interim=path)


class Odd(nn.Module):
    """Two runs that share an activation, a frozen normalisation, weights that both hold, and a branch that is not taken."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), act)
        self.third = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), act)
        self.third[1].weight = self.second[1].weight
        self.unused = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_runs_that_share_modules_and_weights_are_healed_by_themselves(batches: list[Tensor]) -> None:
    torch.manual_seed(3)
    dense = Odd()
    for batch in batches * 10:
        dense(batch)
    dense.eval()
    model = tensorize(copy.deepcopy(dense), [Rule("*", LowRank(3))])
    model.train()
    model.first[1].eval()
    modes = [module.training for module in model.modules()]
    shared, unused = model.second[1].weight.clone(), copy.deepcopy(model.unused.state_dict())
    found = heal(model, dense, batches, steps=10)
    assert [one.name for one in found] == ["first.0..2", "second.0..2", "third.0..2"]
    assert all(one.after <= one.before for one in found)
    assert sum(one.after for one in found) < 0.9 * sum(one.before for one in found)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.second[1].weight, shared)
    torch.testing.assert_close(model.unused.state_dict(), unused, **EXACT)
    x = batches[0]
    with torch.no_grad():
        wanted, ours = dense.first(x), model.eval().first(x)
    assert float((ours - wanted).square().sum() / wanted.square().sum()) == pytest.approx(found[0].after, rel=1e-3)


def test_outputs_of_any_kind(batches: list[Tensor]) -> None:
    """A net for segmentation, whose pictures are wider than its slices."""
    torch.manual_seed(0)
    dense = to_dense(UNet(width=8)).eval()
    model = tensorize(copy.deepcopy(dense), [Rule("*", CP(6))])
    pictures = [torch.randn(4, 1, 16, 16) for _ in range(3)]
    found = heal(model, dense, pictures, steps=10)
    assert found
    assert sum(one.after for one in found) < sum(one.before for one in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"halves": True}, "gradients of float16 parameters vanish"),
        ({"of_one": True}, "BatchNorm has no variance of one sample"),
        ({"batches": 1}, "1 batches: expected two or more"),
        ({"slices": ["blocks.7"]}, "slice 'blocks.7': expected the name of a module of both models"),
        ({"slices": ["unused"]}, "the batches do not reach 'unused'"),
    ],
)
def test_what_cannot_be_healed_is_said(
    nets: tuple[nn.Module, nn.Module], batches: list[Tensor], given: dict[str, Any], message: str
) -> None:
    for net in nets:
        net.unused = nn.Linear(2, 2)
    count = given.pop("batches", 4)
    if given.pop("halves", False):
        nets = nets[0].half(), nets[1].half()
    if given.pop("of_one", False):
        batches = [batch[:1] for batch in batches]
    with pytest.raises(UserError, match=message):
        heal(*nets, batches[:count], **given)
