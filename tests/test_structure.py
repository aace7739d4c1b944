"""What a file says of its tensorized layers is followed, whatever the model is, and refused where it does not fit."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tests.cases import CASES, GEOMETRIES, Case
from tests.processes import HANGING
from tests.tolerances import EXACT
from tnlayers import (
    ADTN,
    CP,
    CheckpointError,
    FactorizedLayer,
    Rule,
    Tucker,
    load_checkpoint,
    rules_of,
    save_safetensors,
    tensorize,
    to_dense,
)
from tnlayers.checkpoints import read_checkpoint
from tnlayers.errors import UserError
from tnlayers.saved_layers import restructure, structure_of

pytestmark = pytest.mark.filterwarnings("ignore:.* of rank .* has .* parameters and the dense weight")
ROOT = Path(__file__).parent.parent
X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.second(self.first(x).relu())).mean((2, 3)))


TUCKER = [Rule("first", Tucker((4, 2))), Rule("second", Tucker((3, 3)))]
RULES = {
    "dense": [],
    "the same": TUCKER,
    "other ranks": [Rule("first", Tucker((4, 3))), Rule("second", Tucker((3, 3)))],
    "another method": [Rule("second", CP(4))],
    "an option": [Rule("first", Tucker((4, 2)), plan="dense"), Rule("second", Tucker((3, 3)))],
    "joint": [Rule("*", ADTN(2, joint="all"))],
    "joint and alone": [Rule("head", ADTN(1)), Rule("*", ADTN(2, joint="convs"))],
}


def net(rules: list[Rule], **options: Any) -> Net:
    return tensorize(Net(**options), rules, init="random").eval()


def saved(folder: Path, rules: list[Rule]) -> tuple[Path, Net]:
    made, path = net(rules), folder / "net.safetensors"
    save_safetensors(made, path)
    return path, made


# ---- files


@pytest.mark.parametrize("there", RULES)
@pytest.mark.parametrize("file", RULES)
def test_the_file_is_the_truth(file: str, there: str, tmp_path: Path) -> None:
    """Any structure is loaded into any other: same outputs, same description, same sharing."""
    path, made = saved(tmp_path, RULES[file])
    model = net(RULES[there])
    load_checkpoint(path, model)
    torch.testing.assert_close(model(X), made(X), **EXACT)
    assert structure_of(model) == structure_of(made)
    assert len(list(model.parameters())) == len(list(made.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_and_geometry(case: Case, tmp_path: Path) -> None:
    x = case.input()
    for options in GEOMETRIES if case.is_conv else ({}, {"bias": False}):
        dense = nn.Sequential(case.dense(**options))
        made = tensorize(copy.deepcopy(dense), [Rule("0", case.method(1))], init="random")
        save_safetensors(made, tmp_path / "a.safetensors")
        load_checkpoint(tmp_path / "a.safetensors", dense)
        assert rules_of(dense) == rules_of(made)
        torch.testing.assert_close(dense(x), made(x), **EXACT)


def test_what_is_shared_is_stored_once(tmp_path: Path) -> None:
    path, made = saved(tmp_path, RULES["joint"])
    stored = load_file(path)  # as any other reader sees it
    assert sum(value.numel() for key, value in stored.items() if "layer" in key) == sum(
        parameter.numel() for parameter in made.first.factors.values()
    )
    again = Net()
    load_checkpoint(path, again)
    assert again.first.factors is again.second.factors is again.head.factors


def test_odd_tensors_of_a_model_are_saved(tmp_path: Path) -> None:
    """Other memory layouts, tied weights, nothing at all in a buffer."""
    made = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    made[2].weight = made[1].weight
    made.register_buffer("none", torch.zeros(0))
    made.register_buffer("part", torch.arange(12.0)[::3])
    save_safetensors(made, tmp_path / "a.safetensors")
    again = copy.deepcopy(made)
    for value in again.state_dict().values():
        value.zero_()
    load_checkpoint(tmp_path / "a.safetensors", again)
    torch.testing.assert_close(again.state_dict(), made.state_dict(), **EXACT)
    meta = nn.Linear(2, 2, device="meta")
    for model, name, message in (
        (meta, "b.safetensors", "no ordinary tensor"),
        (made, "b.pt", "ends in .safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            save_safetensors(model, tmp_path / name)
    with pytest.raises(UserError, match=r"none/b.safetensors cannot be written: No such file"):
        save_safetensors(made, tmp_path / "none" / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_load_draws_no_random_numbers(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, RULES["joint and alone"])
    model, before = Net(), torch.get_rng_state()
    load_checkpoint(path, model)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_in_the_file_is_initialised_where_that_is_allowed(tmp_path: Path) -> None:
    made = net(TUCKER)
    state = {key: value for key, value in made.state_dict().items() if not key.startswith("second")}
    torch.save({"state_dict": state, "tensorization": structure_of(made)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"3 missing \(second.factors.input, "):
        load_checkpoint(tmp_path / "a.pt", Net())
    model = Net()
    report = load_checkpoint(tmp_path / "a.pt", model, strict=False)
    assert len(report.missing) == 3
    dense_std = 1 / (3 * 8 * 9) ** 0.5  # of U(-1, 1) / sqrt(fan-in)
    assert model.second.weight.square().mean().sqrt().item() == pytest.approx(dense_std, rel=1e-4)


SAVE = """
import resource, signal, sys
from torch import nn
from tnlayers import save_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
signal.signal(signal.SIGXFSZ, getattr(signal, sys.argv[2]))
save_safetensors(nn.Linear(100, 100), sys.argv[1])
"""


@pytest.mark.parametrize("disposition", ["SIG_IGN", "SIG_DFL"], ids=["disk full", "killed"])
def test_a_save_that_is_cut_off_leaves_the_file_that_was_there(disposition: str, tmp_path: Path) -> None:
    """The system stops it after 10,000 bytes of 40,000: with an error, or by killing the process."""
    path = tmp_path / "a.safetensors"
    save_safetensors(nn.Linear(10, 10), path)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", SAVE, str(path), disposition],
        capture_output=True,
        text=True,
        timeout=HANGING,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if disposition == "SIG_IGN":
        assert "UserError: " in done.stderr
        assert "a.safetensors: File too large" in done.stderr
        assert [there.name for there in tmp_path.iterdir()] == ["a.safetensors"]
    else:
        assert done.returncode == -signal.SIGXFSZ
    assert path.read_bytes() == before


# ---- descriptions


def test_a_description_is_plain_and_old_ones_load(tmp_path: Path) -> None:
    made = net(RULES["joint and alone"])
    structure = structure_of(made)
    assert json.loads(json.dumps(structure)) == structure
    assert structure["layers"][0]["dense"] == {
        "type": "Conv2d", "in_channels": 3, "out_channels": 8, "kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1],
        "dilation": [1, 1], "groups": 1, "padding_mode": "zeros", "bias": True,
    }  # fmt: skip
    for layer in structure["layers"]:
        del layer["dense"]
    torch.save({"state_dict": made.state_dict(), "tensorization": structure}, tmp_path / "old.ckpt")
    model = Net()
    load_checkpoint(tmp_path / "old.ckpt", model)
    torch.testing.assert_close(model.eval()(X), made(X), **EXACT)


def test_a_method_of_the_program_that_runs_is_said_to_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    made = net(TUCKER)
    monkeypatch.setattr(Tucker, "__module__", "__main__")
    with pytest.warns(
        UserWarning, match="^Tucker: a method of __main__ loads only into a program whose __main__ defines"
    ):
        structure_of(made)


def test_another_stride_is_named_and_changes_nothing(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, TUCKER)
    for rules in RULES.values():
        model = net(rules, stride=2)
        before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
        with pytest.raises(CheckpointError, match=r"first: stride is \[1, 1\] in the file and \[2, 2\] in the model"):
            load_checkpoint(path, model)
        assert [module is other for module, other in zip(model.modules(), modules, strict=True)] == [True] * len(
            modules
        )
        torch.testing.assert_close(model.state_dict(), before, **EXACT)


@pytest.mark.parametrize("there", RULES)
def test_weights_that_do_not_fit_leave_the_model_as_it_was(there: str, tmp_path: Path) -> None:
    path, made = saved(tmp_path, RULES["joint and alone"])
    content = read_checkpoint(path)
    content["state_dict"] = {f"{key}x" if "norm" in key else key: value for key, value in made.state_dict().items()}
    torch.save(content, tmp_path / "a.ckpt")
    model = net(RULES[there])
    outputs, layers = model(X), [module for module in model.modules() if isinstance(module, FactorizedLayer)]
    with pytest.raises(CheckpointError, match=r"4 missing \(norm.weight, .*unexpected \(norm.weightx"):
        load_checkpoint(tmp_path / "a.ckpt", model)
    torch.testing.assert_close(model(X), outputs, **EXACT)
    assert [module for module in model.modules() if isinstance(module, FactorizedLayer)] == layers


def test_layers_that_cannot_be_replaced_are_named() -> None:
    structure = structure_of(net(TUCKER))
    hooked = Net()
    hooked.second.register_forward_hook(lambda *_: None)
    with pytest.raises(CheckpointError, match="does not fit Net: second: it has hooks"):
        restructure(hooked, structure, "the file")
    assert type(hooked.first) is nn.Conv2d
    alone = tensorize(nn.Linear(8, 8), [Rule("", ADTN(1))], init="random")
    with pytest.raises(CheckpointError, match="it is one layer by itself"):
        restructure(nn.Linear(8, 8), structure_of(alone), "the file")
    assert restructure(alone, structure_of(alone), "the file") == {}


LAYER: dict[str, Any] = {"pattern": "second", "method": "Tucker", "rank": [3, 3]}
NESTED: list[Any] = []
for _ in range(10_000):
    NESTED = [NESTED]
LAUGHS: Any = "ha"
for _ in range(40):
    LAUGHS = [LAUGHS, LAUGHS]
LOOP: list[Any] = []
LOOP.append(LOOP)
HUGE = {"name": "g", "offset": 0, "total": 10**15, "scale": 1.0}
HOSTILE: list[tuple[str, Any, str]] = [
    ("text", "conv2", "version None"),
    ("a list", [LAYER], "version None"),
    ("a tensor", torch.zeros(2), "holds a Tensor"),
    ("a version that is nearly 1", {"version": True, "layers": []}, "version True"),
    ("layers that are a mapping", {"version": 1, "layers": {}}, "no list of layers"),
    ("a layer that is a number", {"version": 1, "layers": [3]}, r"layers\[0\]: 3 is not a mapping"),
    ("deep nesting", {"version": 1, "layers": NESTED}, "levels deep"),
    ("a billion laughs", {"version": 1, "layers": LAUGHS}, "levels deep"),
    ("a loop", {"version": 1, "layers": LOOP}, "levels deep"),
    ("many values", {"version": 1, "layers": [0] * 10**6}, "more than 100000 values"),
    ("keys that are numbers", {"version": 1, "layers": [{1: 2}]}, "keys that are not strings"),
]
HOSTILE += [
    (f"{key} {place}", {"version": 1, "layers": [LAYER | {key: value}]}, message)
    for place, (key, value, message) in enumerate(
        [
            ("pattern", None, "not a string"),
            ("pattern", "*", r"'\*' matches no layer; it has first, second, head"),
            ("pattern", "", "'' matches no layer"),
            ("pattern", "norm", "'norm' matches no layer"),
            ("pattern", "x" * 10**6, "more than 4000 characters"),
            ("pattern", "head", "Tucker replaces convolutions, not Linear"),
            ("method", "dense", "'rank' is not known for method dense"),
            ("method", "os.system", "'os.system' is not known"),
            ("method", ["Tucker"], "is not known"),
            ("rank", 3, "rank 3: a weight of shape"),
            ("rank", [3], "a weight of shape"),
            ("rank", [], "expected an int"),
            ("rank", [0, 3], "at least 1"),
            ("rank", [-1, 3], "at least 1"),
            ("rank", [True, 3], "expected an int"),
            (
                "rank",
                [10**9, 10**9],
                r"rank \(1000000000, 1000000000\): a weight of shape \(6, 8, 3, 3\) attains \(6, 8\)",
            ),
            ("rank", [10**5000, 3], "a number of more than 64 bits"),
            ("rank", float("nan"), "bare float"),
            ("rank", "MacsKept(0.5)", "attains"),
            ("rank", torch.ones(2), "holds a Tensor"),
            ("plan", [["core"]], "plan"),
            ("plan", [["core", 3, {"a": 1}]], "plan"),
            ("plan", "fastest", "'fastest'"),
            ("fit_steps", 10**9, "'fit_steps' is not known"),
            ("dense", [], "expected another layer"),
            ("dense", {}, r"second: bias is missing in the file and False in the model"),
            ("dense", {"kernel_size": float("nan")}, "second: bias is missing"),
        ]
    )
]
HOSTILE += [
    ("the same layer twice", {"version": 1, "layers": [LAYER, LAYER]}, r"layers\[1\]: .*expected another layer"),
    ("a generator of all memory",
     {"version": 1, "layers": [{"pattern": "second", "method": "ADTN", "rank": [1], "joint": HUGE}]},
     "would make 1000000000000000 entries; the model has 678"),
    ("a depth of all memory",
     {"version": 1, "layers": [{"pattern": "second", "method": "ADTN", "rank": [10**9]}]}, "at most 64"),
    ("modes of all memory",
     {"version": 1, "layers": [{"pattern": "second", "method": "TTConv", "rank": [1, 1], "in_shape": [10**9, 1]}]},
     "multiplies to"),
    ("modes without end",
     {"version": 1, "layers": [{"pattern": "second", "method": "TTConv", "rank": [1] * 99, "in_shape": [1] * 99}]},
     "at most 10"),
    *((f"opened {number}", {"version": 1, "layers": [LAYER], "opened": value}, message)
      for number, (value, message) in enumerate([
          ("head", "'opened' is no list of names"),
          ({"head": 1}, "'opened' is no list of names"),
          (["head", 3], "'opened' is no list of names"),
          (["norm"], "'norm' matches no layer of an opened module"),
          (["os.system"], "'os.system' matches no layer of an opened module"),
          (["x" * 10**6], "more than 4000 characters"),
          (NESTED, "levels deep"),
      ])),
]  # fmt: skip


@pytest.mark.parametrize(("structure", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_descriptions_are_refused(structure: Any, message: str) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"^the file (has a structure|does not fit Net).*({message})") as error:
        restructure(model, structure, "the file")
    assert len(str(error.value)) < 600
    torch.testing.assert_close(model.state_dict(), before, **EXACT)


# ---- layers of some rules made dense


def test_only_the_layers_that_a_rule_matches_become_dense() -> None:
    made = net(RULES["joint and alone"])
    outputs = made(X)
    to_dense(made, [Rule("[sh]*", Tucker(2)), Rule("norm", None)])  # `head` is linear, and Tucker takes convolutions
    assert [rule.pattern for rule in rules_of(made)] == ["first", "head"]
    torch.testing.assert_close(made(X), outputs, rtol=1e-4, atol=1e-5)
    to_dense(made, [Rule("head", None)])
    assert [rule.pattern for rule in rules_of(made)] == ["first"]


def test_the_metadata_is_one_entry_of_json(tmp_path: Path) -> None:
    path, made = saved(tmp_path, TUCKER)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["tnlayers"])["tensorization"] == structure_of(made)
