"""A method in a user's file: the conformance suite has its row; here it goes through configurations and checkpoints."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import own_method
from tests.commands import DIGITS, QUIET, tnlayers
from tests.processes import HANGING
from tests.tolerances import FLOAT32
from tnlayers import (
    CP,
    TT,
    CheckpointError,
    Factorization,
    FactorizedConv2d,
    FactorizedLinear,
    LayerSpec,
    Rule,
    Tucker,
    TuckerConv2d,
    UnsupportedLayer,
    UserError,
    load_checkpoint,
    rules_of,
    tensorize,
)
from tnlayers.geometry import Geometry
from tnlayers.method import known_methods
from tnlayers.methods.tt import Tensorized

ROOT = Path(__file__).parent.parent
TRAINED = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]


RULES = ["--model.rules", "[{pattern: 'conv[234]', method: mine.Blocks, rank: 2}]", "--model.init", "random"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the user's module `mine`."""
    shutil.copy(own_method.__file__, tmp_path / "mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_configuration_imports_it_and_a_file_does_not(home: Path) -> None:
    command = [*DIGITS, *QUIET, *RULES]
    assert tnlayers("fit", *command, *TRAINED, "--model_checkpoint.dirpath", ".") == 0
    assert tnlayers("test", *command, "--ckpt_path", "last.ckpt") == 0
    layers = torch.load(home / "last.ckpt", weights_only=True)["tensorization"]["layers"]
    assert {layer["method"] for layer in layers} == {"mine.Blocks"}
    lines = [
        "import sys",
        "from lightning_modules import load_net",
        "try: load_net('last.ckpt')",
        "except Exception as error: print(error)",
        "print('mine' in sys.modules)",
        "import mine",
        "print(type(load_net('last.ckpt')[0].conv2).__name__)",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(home)])}
    run = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
    ran = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=HANGING)
    error, imported, layer = ran.stdout.splitlines()
    assert "'mine.Blocks' is not known" in error
    assert "once its module is imported" in error
    assert (imported, layer) == ("False", "FactorizedConv2d"), ran.stderr


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mine.Block", "the module mine defines mine.Blocks"),
        ("..Blocks", "expected a module and a class"),
        ("tnlayers.Tucker", "is called 'Tucker' in rules: write that"),
        ("nowhere.Blocks", "No module named 'nowhere'; install it, or put its folder on PYTHONPATH"),
    ],
)
@pytest.mark.usefixtures("home")
def test_a_mistake_is_one_line(method: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    rules = f"[{{pattern: conv*, method: {method}, rank: 2}}]"
    assert tnlayers("fit", *DIGITS, *QUIET, "--model.rules", rules) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("tnlayers: error:")
    assert message in said[-1]
    assert len([line for line in said if line.startswith("tnlayers: error:")]) == 1


def test_it_is_a_method_like_any_other(tmp_path: Path) -> None:
    def net() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 8, 3))

    first = tensorize(net(), [Rule("*", own_method.Blocks(2))])
    rules = [rule.to_plain() for rule in rules_of(first)]
    assert [rule["method"] for rule in rules] == ["tests.own_method.Blocks"] * 2
    assert known_methods()["tests.own_method.Blocks"] is own_method.Blocks
    torch.save(first.state_dict(), tmp_path / "plain.pt")
    second = tensorize(net(), [Rule.from_plain(rule) for rule in rules])
    load_checkpoint(tmp_path / "plain.pt", second)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(second(x), first(x), **FLOAT32)
    with pytest.raises(CheckpointError, match="it holds factorized layers"):
        load_checkpoint(tmp_path / "plain.pt", net())


def test_the_layer_for_all_methods_says_what_it_takes() -> None:
    with pytest.raises(
        TypeError, match=r"FactorizedConv2d takes a method, such as method=Tucker\(8\), not method=None, rank=2"
    ):
        FactorizedConv2d(3, 8, 3, rank=2)


@pytest.mark.parametrize(
    ("layer", "method"),
    [(FactorizedConv2d, TT(2)), (FactorizedLinear, Tucker(2)), (FactorizedLinear, own_method.Blocks(2))],
)
def test_a_method_of_other_layers_is_refused(layer: Any, method: Factorization) -> None:
    with pytest.raises(UnsupportedLayer, match=f"{type(method).__name__} replaces .*, not"):
        layer(*(8, 8, 3)[: 3 if layer is FactorizedConv2d else 2], method=method)


def test_a_spec_of_another_layer_is_refused() -> None:
    dense = torch.nn.Conv2d(4, 8, 3)
    spec = LayerSpec(Geometry.of(torch.nn.Conv2d(4, 8, 3, stride=2)), Tucker(2))
    for wrong in (spec, LayerSpec(Geometry.of(dense), CP(2))):
        with pytest.raises(ValueError, match="is not of this layer: TuckerConv2d"):
            TuckerConv2d.from_spec(dense, wrong)


def test_a_layer_with_a_constructor_of_its_own() -> None:
    class Gained(TuckerConv2d):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.gain = 2.0

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.gain * super().forward(input)

    assert Gained.from_dense(torch.nn.Conv2d(4, 8, 3), rank=2)(torch.ones(1, 4, 5, 5)).shape == (1, 8, 3, 3)


@pytest.mark.parametrize("option", ["name", "scale", "plan", "dense"])
def test_an_option_that_would_take_another_s_place(option: str) -> None:
    with pytest.raises(TypeError, match=f"an option cannot be called '{option}'"):
        type("Odd", (own_method.Blocks,), {"__annotations__": {option: int}, option: 1})


def test_only_what_states_something_of_itself_is_a_method() -> None:
    assert not {"Tensorized", "Factorization"} & known_methods().keys()
    with pytest.raises(ValueError, match=r"method 'Tensorized' is not known; expected one of dense, .*Tucker"):
        Rule.from_plain({"pattern": "*", "method": "Tensorized", "rank": 2})


def test_an_author_is_told_what_a_method_lacks() -> None:
    class Nameless(Tensorized):
        source = "nowhere"

    class Undecorated(own_method.Blocks):
        more: int = 2

    for method, message in (
        (Nameless, "does not state `replaces`"),
        (Undecorated, "put @dataclass.frozen=True. above"),
    ):
        with pytest.raises(TypeError, match=f"{method.__name__} .*{message}"):
            method(2)
        with pytest.raises(TypeError, match=f"{method.__name__} .*{message}"):
            Rule.from_plain({"pattern": "*", "method": method.name(), "rank": 2})


def test_an_author_is_told_of_factors_that_the_network_does_not_have() -> None:
    @dataclass(frozen=True)
    class Misnamed(own_method.Blocks):
        def _decompose(self, weight: torch.Tensor, ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
            kernel, matrix = super()._decompose(weight, ranks).values()
            return {"kernel": kernel, "matrixx": matrix}

    with pytest.raises(TypeError, match=r"Misnamed._decompose gives .*'matrixx'.*; its network at rank \(2,\) has"):
        tensorize(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), [Rule("*", Misnamed(2))])


def test_a_layer_class_of_the_user_is_not_what_rules_build() -> None:
    class Spy(FactorizedConv2d):
        method = own_method.Blocks

    net = tensorize(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), [Rule("*", own_method.Blocks(2))])
    assert type(net[0]) is FactorizedConv2d
    assert type(Spy(4, 8, 3, rank=2)) is Spy


def test_an_error_of_a_method_s_own_keeps_its_cause() -> None:
    """A value that it refuses is the user's; anything else is a bug, and no message of one line."""

    @dataclass(frozen=True)
    class Fussy(own_method.Blocks):
        def __post_init__(self) -> None:
            super().__post_init__()
            if self.blocks > 8:
                raise ValueError("too many blocks")

    plain = {"pattern": "*", "method": Fussy.name(), "rank": 2}
    with pytest.raises(UserError, match="too many blocks") as refused:
        Rule.from_plain(plain | {"blocks": 9})
    assert type(refused.value.__cause__) is ValueError
    with pytest.raises(TypeError, match="'>' not supported"):
        Rule.from_plain(plain | {"blocks": "two"})


@pytest.mark.parametrize("plan", [None, 3, "dens"])
def test_plans_are_checked(plan: Any) -> None:
    layer = FactorizedConv2d(8, 8, 3, method=Tucker(2))
    with pytest.raises(ValueError, match="expected 'auto', 'factors', 'dense', groups"):
        layer.set_plan(plan)
    with pytest.raises(ValueError, match="expected 'auto', 'factors', 'dense', groups"):
        FactorizedConv2d(8, 8, 3, method=Tucker(2), plan=plan)
    layer.set_plan([["input"], ["core", "output"]])  # type: ignore[arg-type]
    assert layer.plan_choice == (("input",), ("core", "output"))
    assert "method='Tucker'" in repr(layer)
