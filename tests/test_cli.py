"""The command line: help, one line for every mistake, and the jobs from a dense checkpoint to predictions."""

import csv
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image
from safetensors.torch import save_file

from lightning_modules import load_net
from lightning_modules.configurations import SECTIONS, read_yaml
from lightning_modules.console import only_what_matters
from lightning_modules.data import Digits
from tests.commands import CONFIGS, DIGITS, QUIET, metric, output_to, tnlayers, weights
from tests.odd_commands import broken_law, draw
from tests.processes import HANGING
from tnlayers import UserError, methods_table

COMMANDS = [
    "quickstart",
    "compress",
    "study",
    "fit",
    "test",
    "validate",
    "predict",
    "report",
    "export",
    "methods",
    "configs",
]

# ---- help


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert tnlayers("--help") == 0
    listed = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        tnlayers(command, "--help")
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert "--help" in said
    assert ("--config" not in said) or re.search(r"name of a configuration.*\srules/tucker\b", said, re.DOTALL)


# ---- as a user types it


def test_methods_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert tnlayers("methods") == 0
    assert capsys.readouterr().out == f"{methods_table()}\n"


def test_fit_with_nothing_turned_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress bar, model summary and all; it ends with the command that comes next, which runs."""
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    assert tnlayers("fit", "-c", CONFIGS / "experiment/digits.yaml", *few, "--trainer.default_root_dir", tmp_path) == 0
    found = re.search(r"^test +tnlayers (test -c .*)$", capsys.readouterr().out, re.MULTILINE)
    assert found
    assert tnlayers(*found[1].split()) == 0


# ---- mistakes

# (name, arguments, what the message must hold). `@` stands for the folder that `files` makes.
SMALL = ["--trainer.logger", "false", "--trainer.default_root_dir", "@", *QUIET]
VALIDATE = ["validate", *DIGITS, *SMALL]
COMPRESS = ["compress", *DIGITS, *SMALL, "--out", "@out"]
FOLDERS = ["test", "-c", str(CONFIGS / "data/folders.yaml"), *SMALL]
CASES: list[tuple[str, list[str], list[str]]] = [
    ("command", ["fitt"], ["'fitt'", "did you mean 'fit'"]),
    ("strange command", ["xyzzy"], ["'xyzzy'", *COMMANDS]),
    ("option", [*VALIDATE, "--modle.net", "cnn4"], ["--modle.net"]),
    ("abbreviated option", ["fit", *DIGITS, *SMALL, "--trainer.max_epoch", "3"], ["--trainer.max_epoch "]),
    ("option's type", ["fit", *DIGITS, *SMALL, "--trainer.max_epochs", "three"], ["trainer.max_epochs", "int", "three"]),
    ("option of report", ["report", "@dense.ckpt", "--dens", "x"], ["--dens"]),
    ("batch of report", ["report", "@dense.ckpt", "--batch", "0"], ["batch 0", "at least 1"]),
    ("accelerator", [*VALIDATE, "--trainer.accelerator", "abacus"], ["abacus"]),
    ("sync_batchnorm", ["fit", *DIGITS, *SMALL, "--trainer.accelerator", "cpu", "--trainer.sync_batchnorm", "true"],
     ["sync_batchnorm", "on the CPU", "leave --trainer.sync_batchnorm out"]),
    ("net", [*VALIDATE, "--model.net", "resnet21"], ["'resnet21'", "did you mean", "resnet20", "cnn4"]),
    ("net's option", [*VALIDATE, "--model.net_options", "{hiden: 3}"], ["hiden", "hidden, widths"]),
    ("distill_weight", [*VALIDATE, "--model.distill_weight", "2"], ["distill_weight 2", "from 0 to 1"]),
    ("architecture", [*COMPRESS, "--model.net", "resnet20", "--checkpoint", "@dense.ckpt"],
     ["@dense.ckpt", "layer1.0.conv1.weight", "net.conv2.weight", "another architecture"]),
    ("foreign weights", [*COMPRESS, "--checkpoint", "@other.ckpt"], ["@other.ckpt", "conv1.weight", "another arch"]),
    ("torn early", [*COMPRESS, "--checkpoint", "@torn_early.ckpt"], ["@torn_early.ckpt", "truncated", "again"]),
    ("torn late", [*COMPRESS, "--checkpoint", "@torn_late.ckpt"], ["@torn_late.ckpt", "truncated", "again"]),
    ("text", [*COMPRESS, "--checkpoint", "@text.ckpt"], ["@text.ckpt", "not a checkpoint"]),
    ("empty", [*COMPRESS, "--checkpoint", "@empty.ckpt"], ["@empty.ckpt", "not a checkpoint"]),
    ("no tensors", [*COMPRESS, "--checkpoint", "@list.ckpt"], ["@list.ckpt", "list", "state dict"]),
    ("no checkpoint", [*COMPRESS, "--checkpoint", "@none.ckpt"], ["no checkpoint at @none.ckpt", ".safetensors"]),
    ("no teacher", ["fit", *DIGITS, *SMALL, "--trainer.max_epochs", "1", "--model.teacher", "@none.ckpt"],
     ["no checkpoint at @none.ckpt"]),
    ("no rules", [*COMPRESS, "--checkpoint", "@dense.ckpt"], ["compress has no rules", "-c rules/tucker"]),
    ("used out", ["compress", *DIGITS, *SMALL, "--checkpoint", "@dense.ckpt", "--out", "@pictures"],
     ["@pictures", "already holds", "--out"]),
    ("no data", [*FOLDERS, "--data.root", "@none"], ["@none/train", "--data.root", "train/ and test/"]),
    ("no classes", [*FOLDERS, "--data.root", "@classless"], ["@classless/train", "one per class"]),
    ("broken picture", [*FOLDERS, "--data.root", "@pictures"], ["@pictures/test/b/1.png", "replace it or delete it"]),
    ("no config", ["fit", "-c", "@none.yaml"], ["@none.yaml"]),
    ("misspelt config", ["fit", "-c", "experiment/digit"], ["'experiment/digit'", "did you mean 'experiment/digits'"]),
    ("config's name alone", ["fit", "--config=tucker"], ["'tucker'", "did you mean 'rules/tucker'"]),
    ("strange config", ["configs", "xyzzy"], ["'xyzzy'", "tnlayers configs"]),
    ("broken YAML", ["fit", "-c", "@broken.yaml"], ["@broken.yaml", "line 2"]),
    ("foreign ckpt_path", [*VALIDATE, "--ckpt_path", "@other.ckpt"], ["@other.ckpt", "--model.init_from"]),
    ("bare ckpt_path", [*VALIDATE, "--ckpt_path", "@bare.ckpt"], ["@bare.ckpt", "--model.init_from"]),
    ("no ckpt_path", [*VALIDATE, "--ckpt_path", "@none.ckpt"], ["no checkpoint at @none.ckpt"]),
    ("another net's ckpt_path", [*VALIDATE, "--model.net", "resnet20", "--ckpt_path", "@dense.ckpt"],
     ["@dense.ckpt", "conv2.weight"]),
    ("export over a file", ["export", "@dense.ckpt", "@dense.safetensors"], ["@dense.safetensors", "is there already"]),
    ("export to another kind", ["export", "@dense.ckpt", "@out.pt"], ["@out.pt", "ends in .safetensors"]),
    ("export to nowhere", ["export", "@dense.ckpt", "@none/out.safetensors"], ["@none/out.safetensors", "cannot be written"]),
    ("foreign export", ["export", "@other.ckpt", "@out.safetensors"], ["@other.ckpt", "which net"]),
    ("exported ckpt_path", [*VALIDATE, "--ckpt_path", "@dense.safetensors"], ["@dense.safetensors", "--model.init_from"]),
    ("hostile net", ["report", "@hostile_net.ckpt"], ["@hostile_net.ckpt", "cannot be built", "it would have 129000000"]),
    ("foreign report", ["report", "@other.ckpt"], ["@other.ckpt", "tnlayers fit, compress or export"]),
    ("foreign dense", ["report", "@dense.ckpt", "--dense", "@other.ckpt"], ["@other.ckpt", "another architecture"]),
]  # fmt: skip
# What a run goes on from beside its weights, spoilt.
SPOILT: dict[str, Any] = {
    "optimizer_states": [{"state": 3}],
    "lr_schedulers": [7],
    "loops": {"fit_loop": None},
}
RESUME = ["fit", *DIGITS, *SMALL, "--trainer.max_epochs", "3", "--ckpt_path"]
CASES += [
    (f"spoilt {part}", [*RESUME, f"@{part}.ckpt"], [f"@{part}.ckpt cannot be resumed", "--model.init_from"])
    for part in SPOILT
]
SCHEDULE = ["fit", *DIGITS, *SMALL, "--trainer.max_epochs", "1", "--rank_schedule.ranks"]
TUCKER = ["--model.rules", "[{pattern: conv3, method: Tucker, rank: 8}]"]
CASES += [
    ("schedule's epoch", [*SCHEDULE, "{two: 4}"], ["ranks {two: 4}", "'two' is no epoch", "such as 4-8"]),
    ("schedule's rank", [*SCHEDULE, "{0: Params(0.5)}"], ["'Params(0.5)' is not understood"]),
    ("schedule too late", [*SCHEDULE, "{9: 4}"], ["epoch 9", "max_epochs 1"]),
    ("schedule without layers", [*SCHEDULE, "{0: 4}"], ["epoch 0", "no factorized layer", "the model has none"]),
    (
        "two schedules",
        [
            *SCHEDULE,
            "{0: 4}",
            "--trainer.callbacks+=lightning_modules.callbacks.RankSchedule",
            "--trainer.callbacks.ranks",
            "{0: 2}",
        ],
        ["more than one stateful callback", "RankSchedule"],
    ),
    ("schedule out of reach", [*SCHEDULE, "{0: ParamsKept(0.0001)}", *TUCKER], ["epoch 0", "cannot be reached"]),
]
FIT = ["fit", *DIGITS, *SMALL, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
CASES += [
    ("no steps", [*FIT, "--trainer.accumulate_grad_batches", "0"], ["trainer.accumulate_grad_batches", "0", "v>0"]),
    ("no validation", [*FIT, "--trainer.check_val_every_n_epoch", "0"], ["trainer.check_val_every_n_epoch"]),
    ("learning rate", [*FIT, "--model.optimizer.lr", "-1"], ["AdamW", "lr=-1.0"]),
    ("devices", [*FIT, "--trainer.accelerator", "cpu", "--trainer.devices", "two"], ["--trainer", "`devices`"]),
    ("early stopping", [*FIT, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "x"],
     ["EarlyStopping", "`x`", "val/loss"]),
    ("too many devices", [*FIT, "--trainer.accelerator", "cpu", "--trainer.devices", "100000"],
     ["devices is 100000", "processes", "--trainer.devices"]),
    ("too many workers", [*FIT, "--data.num_workers", "100000"], ["num_workers is 100000", "processes"]),
    ("small pictures", [*FIT, "--model.net", "timm/vgg11"], ["'timm/vgg11'", "8x8", "--data.image_size 32"]),
    ("auxiliary outputs", ["fit", *FOLDERS[1:], "--data.root", "@pictures", "--data.image_size", "64", "--trainer.max_epochs", "1",
     "--model.net", "torchvision/googlenet", "--model.net_options", "{init_weights: false}"],
     ["'torchvision/googlenet'", "GoogLeNetOutputs", "aux_logits: false"]),
    ("eps of zero", [*FIT, "--trainer.precision", "16-true"], ["AdamW's eps 1e-08", "float16", "--trainer.precision 16-mixed"]),
    ("net's option of a wrong type", [*FIT, "--model.net_options", "{widths: [a, b, c, d]}"], ["widths is ['a', 'b'"]),
    ("class of a user's", [*FIT, "--trainer.callbacks+=tests.test_cli.Particular"], ["Particular", "number=1: give 2 (", "test_cli.py, "]),
    ("scheduler's step", [*FIT, "--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR",
     "--model.lr_scheduler.step_size", "0"], ["StepLR", "integer modulo by zero"]),
    ("sparse optimizer", [*FIT, "--model.optimizer", "torch.optim.SparseAdam"], ["SparseAdam", "dense gradients"]),
    ("callback for others", [*FIT, "--trainer.callbacks+=BackboneFinetuning"], ["backbone"]),
    ("precision of a library", [*FIT, "--trainer.precision", "transformer-engine"], ["transformer_engine"]),
    ("averages of factors", [*FIT, *TUCKER, "--trainer.callbacks+=StochasticWeightAveraging",
     "--trainer.callbacks.swa_lrs", "0.01"], ["StochasticWeightAveraging", "lightning_modules.callbacks.EMA"]),
    ("no memory", [*FIT, "--model.net_options", "{hidden: 1000000000000}"], ["'cnn4'", "hidden"]),
    ("no outputs", [*FIT, "--model.net_options", "{hidden: 0}"], ["'cnn4'", "hidden is 0"]),
    ("the data's classes", [*FIT, "--model.net_options", "{num_classes: 3}"], ["net_options", "'num_classes'"]),
    ("broken YAML in an argument", [*FIT, "--model", "{net: ["], ["model", "{net: ["]),
    ("same key in an argument", [*FIT, "--model.net_options", "{hidden: 3, hidden: 4}"], ["'hidden'", "twice"]),
]  # fmt: skip
# The ways in which a checkpoint can reach a command.
READERS = {
    "report": ["report"],
    "--checkpoint": [*COMPRESS, "--checkpoint"],
    "--ckpt_path": [*VALIDATE, "--ckpt_path"],
    "--model.init_from": [*VALIDATE, "--model.init_from"],
}
CASES += [
    (f"{name} by {reader}", [*arguments, f"@{file}"], [f"@{file}", *words])
    for reader, arguments in READERS.items()
    for name, file, words in (
        ("code", "code.ckpt", ["refused", "could run code"]),
        ("pickled code", "code.pkl", ["refused", "could run code"]),
        ("version 99", "version99.ckpt", ["version 99", "reads 1", "update tnlayers"]),
        ("no layers", "no_layers.ckpt", []),
        ("unknown method", "unknown_method.ckpt", ["'Tuckr'", "expected one of", "Tucker"]),
        ("unknown layer", "unknown_layer.ckpt", ["'conv9'", "matches no layer"]),
        ("another stride", "stride.ckpt", ["conv2: stride is [2, 2] in the file and [1, 1] in the model"]),
        ("rank of all memory", "rank.ckpt", ["conv2: rank (1000000000, 2)", "attains (64, 32)"]),
        ("other shapes", "shapes.ckpt", ["fc2.weight: (10, 127) in the file, (10, 128) in the model"]),
        ("renamed keys", "renamed.ckpt", ["1 missing (fc2.weight), 1 unexpected (net.fc2.weigth)"]),
        ("integers", "integers.ckpt", ["fc2.weight: (10, 128) integer in the file"]),
        ("no state", "no_state.ckpt", ["holds no state dict"]),
        ("torn", "torn.safetensors", ["truncated"]),
        ("hostile metadata", "metadata.safetensors", ["description that is not understood", "nested too deeply"]),
        ("folder", "folder.ckpt", ["is a folder"]),
        ("unreadable", "unreadable.ckpt", ["cannot be read"]),
    )
]
# A rule, and what the message about it must hold.
RULES: list[tuple[str, list[str]]] = [
    ("{pattern: conv*, method: Tuckr, rank: 2}", ["rules[0]", "'conv*'", "'Tuckr'", "did you mean 'Tucker'"]),
    ("{pattern: conv*, method: Tucker, rnak: 2}", ["rules[0]", "'rnak'", "did you mean 'rank'"]),
    ("{pattern: conv*, rank: 2}", ["rules[0]", "has no 'method'"]),
    ("{pattern: conv*, method: Tucker}", ["rules[0]", "needs a 'rank'", "MacsKept(0.5)"]),
    ("{pattern: conv*, method: Tucker, rank: 0}", ["rules[0]", "rank 0", "at least 1"]),
    ("{pattern: conv*, method: Tucker, rank: -1}", ["rules[0]", "rank -1", "at least 1"]),
    ("{pattern: conv*, method: Tucker, rank: 0.5}",
     ["rules[0]", "bare float", "ParamsKept(0.5)", "MacsKept(0.5)", "RelativeError(0.5)"]),
    ("{pattern: conv*, method: Tucker, rank: two}", ["rules[0]", "'two'", "an int", "MacsKept(0.5)"]),
    ("{pattern: conv*, method: Tucker, rank: MacsKept(2)}", ["rules[0]", "MacsKept(2.0)", "above 0 and at most 1"]),
    ("{pattern: conv*, method: Tucker, rank: MacsKept(x)}", ["rules[0]", "'x' is not a number"]),
    ("{pattern: conv*, method: Tucker, rank: MacKept(0.5)}", ["rules[0]", "'MacKept(0.5)'", "MacsKept"]),
    ("{pattern: conv*, method: Tucker, rank: MacsKept(0.0001)}", ["0.0001", "cannot be reached", "ask for more"]),
    ("{pattern: conv*, method: Tucker, rank: [2, 2, 2]}", ["(2, 2, 2)", "3 entries", "takes 2"]),
    ("{pattern: conv*, method: Tucker, rank: 2, plan: fastest}", ["'fastest'", "'auto', 'factors', 'dense'"]),
    ("{pattern: cnov2, method: Tucker, rank: 2}", ["'cnov2'", "matches no layer", "the nearest are", "'conv2'"]),
    ("{pattern: fc*, method: Tucker, rank: 2}", ["'fc*'", "Linear", "'fc1'", "Tucker replaces convolutions"]),
    ("{pattern: conv*, method: TT, rank: 2}", ["'conv*'", "Conv2d", "TT replaces Linear"]),
    ("{pattern: conv2, method: TTConv, rank: 2, in_shape: [4, 4]}", ["'conv2'", "in_shape (4, 4)", "32"]),
    ("{pattern: conv2, method: MPS, rank: 2, order: hwi}", ["order 'hwi'", "such as 'h w i o'"]),
    ("{pattern: fc1, method: ADTN, rank: ParamsKept(0.5)}", ["ParamsKept(0.5)", "depth", "int"]),
    ("{pattern: fc1, method: ADTN, rank: 2, activation: gelu}", ["'gelu'", "leaky_relu"]),
    ("{pattern: fc1, method: TT, rank: 2, in_shape: [3, 3], out_shape: [8, 16]}", ["(3, 3)", "expected 512"]),
]  # fmt: skip


CONV2 = {
    "type": "Conv2d", "in_channels": 32, "out_channels": 64, "kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1],
    "dilation": [1, 1], "groups": 1, "padding_mode": "zeros", "bias": False,
}  # fmt: skip


class Intruder:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cnn4 that the command has trained on the digits for two epochs."""
    folder = tmp_path_factory.mktemp("dense")
    assert tnlayers("fit", *DIGITS, *output_to(folder), "--trainer.max_epochs", "2") == 0
    (path,) = folder.rglob("last.ckpt")
    return path


@pytest.fixture(scope="module")
def files(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of everything that could be given by mistake."""
    folder = tmp_path_factory.mktemp("files")
    content = dense.read_bytes()
    (folder / "dense.ckpt").write_bytes(content)
    (folder / "torn_early.ckpt").write_bytes(content[:5000])
    (folder / "torn_late.ckpt").write_bytes(content[: len(content) // 2])
    (folder / "text.ckpt").write_text("not a checkpoint")
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "code.pkl").write_bytes(pickle.dumps({"state_dict": Intruder(folder / "intruder")}))
    (folder / "broken.yaml").write_text("model: [\n")
    ours = torch.load(dense, weights_only=True)
    conv = {"method": "Tucker", "rank": [2, 2]}
    checkpoints = {
        "code": {"state_dict": Intruder(folder / "intruder")},
        "list": [1],
        "other": {"weight": torch.zeros(2, 2)},
        "bare": {"state_dict": ours["state_dict"]},
        "version99": {**ours, "tensorization": {"version": 99, "layers": []}},
        "no_layers": {**ours, "tensorization": {"version": 1}},
        "unknown_method": {
            **ours,
            "tensorization": {"version": 1, "layers": [{"pattern": "conv2", **conv, "method": "Tuckr"}]},
        },
        "unknown_layer": {**ours, "tensorization": {"version": 1, "layers": [{"pattern": "conv9", **conv}]}},
    }
    changed: dict[str, dict[str, Any]] = {
        "stride": {"rank": [2, 2], "dense": {**CONV2, "stride": [2, 2]}},
        "rank": {"rank": [10**9, 2], "dense": CONV2},
    }
    for name, entry in changed.items():
        layer = {"pattern": "conv2", "method": "Tucker", **entry}
        checkpoints[name] = {**ours, "tensorization": {"version": 1, "layers": [layer]}}
    state, key = ours["state_dict"], "net.fc2.weight"
    states: dict[str, Any] = {
        "shapes": {**state, key: state[key][:, :-1]},
        "integers": {**state, key: state[key].int()},
        "renamed": {**{name: value for name, value in state.items() if name != key}, "net.fc2.weigth": state[key]},
        "no_state": [state],
    }
    checkpoints |= {name: {**ours, "state_dict": content} for name, content in states.items()}
    checkpoints |= {part: {**ours, part: content} for part, content in SPOILT.items()}
    checkpoints["hostile_net"] = {**ours, "hyper_parameters": {**ours["hyper_parameters"], "num_classes": 10**12}}
    for name, checkpoint in checkpoints.items():
        torch.save(checkpoint, folder / f"{name}.ckpt")
    assert tnlayers("export", dense, folder / "dense.safetensors") == 0
    (folder / "torn.safetensors").write_bytes((folder / "dense.safetensors").read_bytes()[:-1])
    save_file({"weight": torch.zeros(2)}, folder / "metadata.safetensors", {"tnlayers": "[" * 10_000 + "]" * 10_000})
    (folder / "folder.ckpt").mkdir()
    (folder / "unreadable.ckpt").symlink_to("/proc/self/mem")
    for part in ("train", "test"):
        (folder / "classless" / part).mkdir(parents=True)
        for place in ("a/0", "a/1", "b/0", "b/1"):
            path = folder / "pictures" / part / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    (folder / "pictures/test/b/1.png").write_text("no picture")
    return folder


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which a command ends; no warning of ours or of a library's beside it."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)  # as in a process: it does not show them
        assert tnlayers(*arguments) == 2
    assert [str(warning.message) for warning in said] == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tnlayers: error: ")
    return lines[0]


@pytest.mark.parametrize(("arguments", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_mistakes_are_one_line(
    arguments: list[str], words: list[str], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [re.sub("^@", f"{files}/", argument) for argument in arguments]
    before = {path: path.read_bytes() for path in map(Path, given) if path.is_file() and path.name != "unreadable.ckpt"}
    message = refusal(given, capsys)
    for word in words:
        assert word.replace("@", f"{files}/") in message
    assert not (files / "intruder").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert not list(files.glob("out.*"))


# What a second configuration holds, and what the message about it must hold.
CONFIGURATIONS: list[tuple[str, list[str]]] = [
    ("", ["is empty", "'model:'"]),
    ("[1]", ["has no options"]),
    *(
        (f"{key}:{value}\nseed_everything: 1\n", [f"line 1: '{key}' is", "indented"])
        for key in SECTIONS
        if "." not in key
        for value in ("", " [1]", " 3")
    ),
    ("model:\n  optimizer:\n", ["line 2: 'model.optimizer' is empty"]),
    ("model:\n  net: cnn4\n  net: resnet20\n", ["line 3", "'net'", "twice", "line 2"]),
    ("model:\n  rules:\n  - {pattern: conv2, pattern: conv3}\n", ["line 3", "'pattern'"]),
    ("seed_everything: 2001-99-99\n", ["is not valid YAML", "month"]),
    ("model: {[1]: 2}\n", ["is not valid YAML", "unhashable key"]),
    ("model: {}\nmodel: {}\n", ["line 2", "'model'"]),
    *(
        (f"seed_everything: 1\nconfig: {value}\n", ["line 2", "-c of its own"])
        for value in ("[]", "3", "{class_path: x}", "a.yaml")
    ),
]


@pytest.mark.parametrize("command", ["fit", "compress"])
@pytest.mark.parametrize(("text", "words"), CONFIGURATIONS)
def test_nothing_given_is_dropped(
    command: str, text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "second.yaml"
    path.write_text(text)
    message = refusal([command, *DIGITS, *TUCKER, f"--config={path}"], capsys)
    for word in [str(path), *words]:
        assert word in message


def test_a_key_twice_in_a_file_that_a_configuration_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.yaml").write_text("net: cnn4\nnet: cnn4\n")
    (tmp_path / "config.yaml").write_text("model: model.yaml\n")
    message = refusal(["fit", *DIGITS, "-c", str(tmp_path / "config.yaml")], capsys)
    assert f"{tmp_path}/model.yaml, line 2: the key 'net'" in message


def test_only_files_of_options_are_read_as_such(tmp_path: Path) -> None:
    """Data of a user's own may be in files of the same kinds."""
    (tmp_path / "rows.json").write_text('{"a": 1, "a": 2}\n{"a": 3}\n')
    (config := tmp_path / "config.yaml").write_text(f"trainer:\n  default_root_dir: {tmp_path}/rows.json\n")
    found = read_yaml(["fit", "-c", str(config), "--data.annotations", str(tmp_path / "rows.json")])
    assert found == {str(config): {"trainer": {"default_root_dir": f"{tmp_path}/rows.json"}}}


def test_a_whole_epoch_between_validations_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("trainer:\n  val_check_interval: 1.0\n")
    with pytest.raises(SystemExit):
        tnlayers("fit", *DIGITS, "-c", tmp_path / "config.yaml", "--print_config")
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]["val_check_interval"]
    assert isinstance(found, float)
    assert "val_check_interval 0" in refusal(
        ["fit", *DIGITS, *output_to(tmp_path), "--trainer.val_check_interval", "0"], capsys
    )


def test_sections_are_those_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    found = set()
    for command in (["fit"], ["study", "--checkpoint", "x"]):
        with pytest.raises(SystemExit):
            tnlayers(*command, *DIGITS, "--print_config")
        plain = yaml.safe_load(capsys.readouterr().out)
        found |= {key for key, value in plain.items() if isinstance(value, dict)}
    assert found == {key for key in SECTIONS if "." not in key}


def test_a_long_key_makes_a_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.yaml"
    path.write_text(f"{'k' * 100_000}: 1\n")
    assert len(refusal(["fit", *DIGITS, "-c", str(path)], capsys)) <= 1000


PRECISIONS = ["16-mixed", "bf16-mixed", "bf16-true", "16-true", "32-true", "64-true", "16", "32", "64", "bf16"]


@pytest.mark.filterwarnings("ignore:.*(historical reasons|fp16 is not supported on CPU|Encountered `nan`)")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_works(precision: str, dense: Path, tmp_path: Path) -> None:
    options = ["--trainer.precision", precision, *TUCKER, *output_to(tmp_path)]
    assert tnlayers("test", *DIGITS, *options, "--model.init_from", dense) == 0
    reference = [*TUCKER, *output_to(tmp_path / "reference")]
    assert tnlayers("test", *DIGITS, *reference, "--model.init_from", dense) == 0
    (theirs,), (ours,) = (tmp_path / "reference").rglob("metrics.csv"), (tmp_path / "logs").rglob("metrics.csv")
    losses = [metric(path.parent, "test/loss") for path in (theirs, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--model.optimizer.eps", "1e-4"]
    taught = ["--model.teacher", dense, "--model.init_from", dense]
    assert tnlayers("fit", *DIGITS, *options, *few, *taught) == 0
    (last,) = tmp_path.rglob("last.ckpt")
    assert all(value.isfinite().all() for value in weights(last).values())
    out = tmp_path / "out"
    assert tnlayers("compress", *DIGITS, *options, "--checkpoint", dense, "--out", out) == 0
    accuracy = json.loads((out / "report.json").read_text())["accuracy"]
    assert accuracy["dense"] == pytest.approx(metric(theirs.parent, "test/accuracy"), abs=0.2)
    assert tnlayers("predict", *DIGITS, *options, "--model.init_from", dense) == 0


def test_averages_of_a_dense_net(tmp_path: Path) -> None:
    averages = ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.01"]
    few = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2"]
    assert tnlayers("fit", *DIGITS, *few, *averages, *output_to(tmp_path)) == 0


@pytest.mark.parametrize("seed", range(30))
def test_odd_commands_end_in_one_line(seed: int, dense: Path) -> None:
    assert broken_law(draw(seed), dense) == ""


@pytest.mark.parametrize(("rule", "words"), RULES, ids=[rule for rule, _ in RULES])
def test_wrong_rules_are_one_line(
    rule: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "rules.yaml"
    config.write_text(f"model:\n  rules:\n  - {rule}\n")
    arguments = [argument.replace("@", str(tmp_path)) for argument in VALIDATE]
    message = refusal([*arguments, "-c", str(config)], capsys)
    for word in words:
        assert word in message


def test_a_real_process_says_it_once(tmp_path: Path) -> None:
    rules = "[{pattern: cnov2, method: Tucker, rank: 2}]"
    command = [str(Path(sys.executable).with_name("tnlayers")), *VALIDATE, "--model.rules", rules]
    done = subprocess.run(
        [argument.replace("@", str(tmp_path)) for argument in command],
        capture_output=True,
        text=True,
        timeout=HANGING,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if "TPU" not in line and "GPU" not in line and "Seed" not in line]
    assert len(ours) == 1
    assert ours[0].startswith("tnlayers: error: pattern 'cnov2' matches no layer")


class Particular(Callback):
    """A class of a user's own, with a bug where it gets 0 and words for what it does not take."""

    def __init__(self, number: int = 1) -> None:
        if number != 0:
            raise ValueError("give 2")
        self.number = None.number  # type: ignore[attr-defined]


# A name that is taken away from a line of ours, and the options with which a command comes to it.
BUGS: list[tuple[str, list[str]]] = [
    ("lightning_modules.classifier.build_net", []),
    ("lightning_modules.trainer.keeps_whole_parameters", []),
    ("lightning_modules.nets.resnet_cifar.F", ["--model.net", "resnet20"]),
    ("lightning_modules.nets.cnn4.nn", ["--model.net_options", "{hidden: 3}"]),
    ("lightning_modules.loggers.CSVLogger.__init__", ["-c", str(CONFIGS / "logger/csv.yaml")]),
    (
        "lightning_modules.data.base.as_is",
        ["--trainer.callbacks+=tests.test_cli.Particular", "--trainer.callbacks.number", "0"],
    ),
]


@pytest.mark.parametrize(("name", "options"), BUGS, ids=[name for name, _ in BUGS])
def test_a_bug_keeps_its_traceback(
    name: str, options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only what a user gave becomes a line; a bug in code of ours, or of a user's own, is not blamed on the options beside it."""
    monkeypatch.setattr(name, None)
    with pytest.raises(Exception, match="'NoneType' object"):
        tnlayers(*(argument.replace("@", str(tmp_path)) for argument in VALIDATE), *options)


def test_a_bug_where_an_error_of_the_users_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(arguments: list[str]) -> int:
        try:
            raise UserError("a rank of 0")
        except UserError:
            raise KeyError("bug")  # noqa: B904

    monkeypatch.setattr("lightning_modules.commands.run", handle)
    with pytest.raises(KeyError, match="bug"):
        tnlayers("methods")


def test_a_command_leaves_libraries_logs_as_they_were() -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = list(logger.filters)
    with only_what_matters():
        assert logger.filters != before
    assert logger.filters == before


# ---- from a dense checkpoint to predictions


@pytest.fixture(scope="module")
def compressed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compress` makes of the dense checkpoint: Tucker convolutions and a tensor train."""
    folder = tmp_path_factory.mktemp("compressed")
    rules = ["-c", CONFIGS / "rules/tt.yaml"]
    assert (
        tnlayers("compress", *DIGITS, *rules, *output_to(folder), "--checkpoint", dense, "--out", folder / "out") == 0
    )
    return folder / "out"


def test_compress_writes_everything(compressed: Path) -> None:
    found = {path.name for path in compressed.iterdir() if path.is_file()}
    assert found == {"model.ckpt", "config.yaml", "report.md", "report.json", "layers.png", "accuracy.png"}
    report = json.loads((compressed / "report.json").read_text())
    assert set(report["accuracy"]) == {"dense", "right after"}
    assert report["totals"]["params"] < 0.5 * report["totals"]["dense_params"]
    factorized = [layer for layer in report["layers"] if layer["rank"]]
    assert all(0 < layer["error"] < 1 for layer in factorized)
    assert report["timings"].keys() == {layer["name"] for layer in factorized}
    assert all(timing["training"]["seconds"] > 0 for timing in report["timings"].values())
    assert "- timed       inference" in (compressed / "report.md").read_text()


def test_compress_heals_without_labels(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every slice is told, none gets worse, and the configuration that goes on trains what was healed."""
    out = tmp_path / "out"
    rules = ["--model.rules", "[{pattern: 'conv[234]', method: CP, rank: MacsKept(0.2)}]"]
    options = ["--healing.pictures", "200", "--healing.steps", "3", "--checkpoint", dense, "--out", out]
    assert tnlayers("compress", *DIGITS, *rules, *options, *output_to(tmp_path / "logs")) == 0
    report = json.loads((out / "report.json").read_text())
    assert [*report["accuracy"]] == ["dense", "right after", "healed"]
    assert report["accuracy"]["healed"] > report["accuracy"]["right after"]
    assert [one["name"] for one in report["healed"]] == ["conv2", "conv3", "conv4"]
    assert all(one["after"] <= one["refitted"] <= one["before"] for one in report["healed"])
    assert "3 slices with 200 unlabelled pictures" in capsys.readouterr().out
    config = ["-c", out / "config.yaml", *output_to(tmp_path / "again")]
    assert tnlayers("fit", *config, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1") == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--healing.pictures", "-1"], "healing.pictures is -1: expected a number of at least 0"),
        (["--healing.pictures", "1"], "healing.pictures is 1: expected 0, or at least 4 pictures"),
    ],
)
def test_what_no_net_can_learn_from_is_said(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    rules = ["--model.rules", "[{pattern: 'conv[234]', method: CP, rank: MacsKept(0.2)}]"]
    given = [*option, "--checkpoint", dense, "--out", tmp_path / "out", *output_to(tmp_path / "logs")]
    assert tnlayers("compress", *DIGITS, *rules, *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compressed_config_has_integer_ranks(compressed: Path, dense: Path) -> None:
    model = yaml.safe_load((compressed / "config.yaml").read_text())["model"]
    assert model["init_from"] == str(compressed / "model.ckpt")
    assert model["teacher"] == str(dense)
    ranks = {rule["pattern"]: rule["rank"] for rule in model["rules"] if rule["method"] != "dense"}
    assert {"conv3", "conv4", "fc1"} <= ranks.keys()
    assert all(isinstance(rank, int) for each in ranks.values() for rank in each)
    assert all("64x" in rule["plan"]["measured_on"] for rule in model["rules"] if rule["method"] != "dense")


def test_fit_starts_from_the_compressed_net(compressed: Path, tmp_path: Path) -> None:
    # At a learning rate of zero the parameters stay what they were.
    config = ["-c", str(compressed / "config.yaml"), "--model.optimizer.init_args.lr", "0"]
    assert tnlayers("fit", *config, *output_to(tmp_path), "--trainer.max_epochs", "1") == 0
    (last,) = tmp_path.rglob("last.ckpt")
    before, after = weights(compressed / "model.ckpt"), weights(last)
    assert before.keys() == after.keys()
    kept = [key for key in before if "running" not in key and "num_batches" not in key]
    assert "net.conv3.factors.core" in kept
    torch.testing.assert_close({key: after[key] for key in kept}, {key: before[key] for key in kept}, rtol=0, atol=0)


def test_retrain_test_and_predict(compressed: Path, tmp_path: Path) -> None:
    config = ["-c", str(compressed / "config.yaml")]
    assert tnlayers("fit", *config, *output_to(tmp_path / "fit"), "--trainer.max_epochs", "1") == 0
    (last,) = (tmp_path / "fit").rglob("last.ckpt")
    resume = ["--ckpt_path", str(last)]
    assert tnlayers("test", *config, *output_to(tmp_path / "test"), *resume) == 0
    assert tnlayers("predict", *config, *output_to(tmp_path / "predict"), *resume) == 0
    (predictions,) = (tmp_path / "predict").rglob("predictions.csv")
    with open(predictions, newline="") as file:
        rows = list(csv.DictReader(file))
    data = Digits()
    labels = [data.class_names[label] for label in data.load("test").labels]
    assert [int(row["picture"]) for row in rows] == list(range(len(labels)))
    assert {row["class"] for row in rows} <= set(data.class_names)
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    right = sum(row["class"] == label for row, label in zip(rows, labels, strict=True)) / len(labels)
    assert right == pytest.approx(metric(tmp_path / "test", "test/accuracy"), abs=1e-6)
    dense_accuracy = json.loads((compressed / "report.json").read_text())["accuracy"]["dense"]
    assert right > dense_accuracy - 0.05


def test_report_prints_the_table(
    compressed: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert tnlayers("report", str(compressed / "model.ckpt"), "--dense", str(dense), "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("conv1", "conv4", "fc2", "whole model", "Tucker", "TT"))
    there, then = (json.loads((folder / "report.json").read_text()) for folder in (out, compressed))
    figures = ("name", "method", "rank", "params", "macs")
    assert [[layer[key] for key in figures] for layer in there["layers"]] == [
        [layer[key] for key in figures] for layer in then["layers"]
    ]
    errors = [[layer["error"] for layer in report["layers"] if layer["rank"]] for report in (there, then)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_an_exported_file_goes_wherever_a_checkpoint_does(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, model = tmp_path / "small.safetensors", compressed / "model.ckpt"
    assert tnlayers("export", model, exported) == 0
    assert tnlayers("report", exported, "--dense", exported, "--batch", "1") == 0
    assert "error" in capsys.readouterr().out
    plain = [*DIGITS, "--model.init_from"]
    for name, path in (("from_ckpt", model), ("from_exported", exported)):
        assert tnlayers("test", *plain, path, *output_to(tmp_path / name)) == 0
        assert tnlayers("predict", *plain, path, *output_to(tmp_path / name / "predictions")) == 0
    found = [metric(tmp_path / name, "test/accuracy") for name in ("from_ckpt", "from_exported")]
    tables = [next((tmp_path / name).rglob("predictions.csv")).read_text() for name in ("from_ckpt", "from_exported")]
    assert found[0] == found[1]
    assert tables[0] == tables[1]
    teacher = ["--model.teacher", exported, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    assert tnlayers("fit", *DIGITS, *teacher, *output_to(tmp_path / "taught")) == 0
    rules = ["--model.rules", "[{pattern: conv2, method: Tucker, rank: 2}]"]
    again = ["--checkpoint", exported, "--out", tmp_path / "again"]
    assert tnlayers("compress", *DIGITS, *rules, *again, *output_to(tmp_path / "logs")) == 0


def test_compress_retrain_compress_further(compressed: Path, dense: Path, tmp_path: Path) -> None:
    """A budget is a fraction of the dense layers each time; what no rule matches stays as it was."""
    config = ["-c", str(compressed / "config.yaml")]
    assert tnlayers("fit", *config, *output_to(tmp_path / "one"), "--trainer.max_epochs", "1") == 0
    (retrained,) = (tmp_path / "one").rglob("last.ckpt")
    rules = ["--model.rules", "[{pattern: 'conv[234]', method: Tucker, rank: ParamsKept(0.2)}]"]
    further = ["--checkpoint", retrained, "--out", tmp_path / "two"]
    assert tnlayers("compress", *config, *rules, *further, *output_to(tmp_path / "logs")) == 0
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (compressed, tmp_path / "two"))
    assert set(second["accuracy"]) == {"before", "right after"}
    assert second["totals"]["dense_params"] == first["totals"]["dense_params"]
    assert second["totals"]["params"] < first["totals"]["params"]
    layers = {layer["name"]: layer for layer in second["layers"]}
    convs = [layers[f"conv{n}"] for n in (2, 3, 4)]
    kept = sum(layer["params"] for layer in convs) / sum(layer["dense_params"] for layer in convs)
    assert 0.15 < kept <= 0.2
    assert layers["fc1"]["method"] == "TT"
    before, after = weights(retrained), weights(tmp_path / "two/model.ckpt")
    cores = [key for key in before if key.startswith("net.fc1.")]
    torch.testing.assert_close({key: after[key] for key in cores}, {key: before[key] for key in cores}, rtol=0, atol=0)
    model = yaml.safe_load((tmp_path / "two/config.yaml").read_text())["model"]
    assert model["teacher"] == str(dense)  # the first compression's configuration names it
    again = ["-c", str(tmp_path / "two/config.yaml"), "--trainer.max_epochs", "1"]
    assert tnlayers("fit", *again, *output_to(tmp_path / "three")) == 0
    (last,) = (tmp_path / "three").rglob("last.ckpt")
    net, _ = load_net(last)
    assert sum(parameter.numel() for parameter in net.parameters()) == second["totals"]["params"]


def test_what_was_compressed_teaches_where_no_teacher_is_given(compressed: Path, tmp_path: Path) -> None:
    model, rules = compressed / "model.ckpt", ["--model.rules", "[{pattern: conv2, method: Tucker, rank: 2}]"]
    options = ["--checkpoint", model, "--out", tmp_path / "out", *output_to(tmp_path)]
    assert tnlayers("compress", *DIGITS, *rules, *options) == 0
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["model"]["teacher"] == str(model)


def test_last_is_not_another_experiments_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", *DIGITS, *output_to(tmp_path), "--trainer.limit_train_batches", "2", "--ckpt_path", "last"]
    assert tnlayers(*command, "--trainer.max_epochs", "1") == 0
    other = ["--trainer.max_epochs", "2", "--model.rules", "[{pattern: conv3, method: Tucker, rank: 8}]"]
    message = refusal([*command, *other], capsys)
    assert f"the newest run, {tmp_path}/logs/version_0, has rules" in message
    assert "default_root_dir" in message


def test_a_version_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = ["--trainer.logger.init_args.version", "0", "--trainer.max_epochs", "1"]
    command = ["fit", *DIGITS, *output_to(tmp_path), *version, "--trainer.limit_train_batches", "2"]
    assert tnlayers(*command) == 0
    assert "logs/version_0 holds a run already; go on with it by --ckpt_path last" in refusal(command, capsys)


def test_a_plateau_is_watched(tmp_path: Path) -> None:
    plateau = {
        "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
        "init_args": {"monitor": "val/loss", "patience": 0},
    }
    options = ["--model.lr_scheduler", json.dumps(plateau), "--trainer.max_epochs", "4", "--model.optimizer.lr", "0"]
    assert tnlayers("fit", *DIGITS, *output_to(tmp_path), *options, "--trainer.limit_train_batches", "2") == 0
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["lr_schedulers"][0]["best"] < float("inf")


def test_compress_with_the_default_logger(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["-c", str(CONFIGS / "rules/tucker.yaml"), "--checkpoint", str(dense), "--out", "out"]
    assert tnlayers("compress", *DIGITS, *arguments, *QUIET) == 0
    assert (tmp_path / "out/logs/metrics.csv").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_compress_of_the_digits_experiment_keeps_the_weights(dense: Path, tmp_path: Path) -> None:
    """The experiment trains its factors from scratch; to compress is to keep what was learnt all the same."""
    experiment = ["-c", str(CONFIGS / "experiment/digits.yaml")]
    arguments = [*experiment, *output_to(tmp_path), "--checkpoint", str(dense), "--out", str(tmp_path / "out")]
    assert tnlayers("compress", *arguments) == 0
    layers = json.loads((tmp_path / "out/report.json").read_text())["layers"]
    assert all(layer["error"] < 1 for layer in layers if layer["rank"])


def test_compress_again_after_a_wrong_rule(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was refused leaves nothing behind that a corrected command would stumble on."""
    out = tmp_path / "out"
    arguments = ["compress", *DIGITS, *output_to(tmp_path / "logs"), "--checkpoint", str(dense), "--out", str(out)]
    refusal([*arguments, "--model.rules", "[{pattern: cnov2, method: Tucker, rank: 4}]"], capsys)
    rules = ["--model.rules", "[{pattern: conv2, method: Tucker, rank: 4}]"]
    assert tnlayers(*arguments, *rules) == 0
    assert (out / "model.ckpt").is_file()
    again = [
        "compress",
        *DIGITS,
        *output_to(tmp_path / "logs"),
        "--checkpoint",
        str(dense),
        "--out",
        str(tmp_path / "b"),
        *rules,
    ]
    assert tnlayers(*again, "--trainer.max_steps", "7") == 0
    retrain = [
        line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("retrain ")
    ]
    forever, ending = f"tnlayers fit -c {out}/config.yaml", f"tnlayers fit -c {tmp_path}/b/config.yaml"
    assert retrain == [f"{forever} --trainer.max_epochs 15", ending]


@pytest.mark.data
def test_published_resnet20(resnet20_checkpoint: Path, cifar10_png: Path, tmp_path: Path) -> None:
    experiment = ["-c", str(CONFIGS / "experiment/cifar10_resnet20.yaml"), "--data.root", str(cifar10_png)]
    published = ["--model.rules", "[]", "--model.init_from", str(resnet20_checkpoint)]
    assert tnlayers("test", *experiment, *published, *output_to(tmp_path)) == 0
    assert 931 <= round(metric(tmp_path, "test/accuracy") * 1017) <= 933


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_is_read_no_more(unbuffered: str) -> None:
    """As that of `tnlayers methods | head -1`."""
    code = "from lightning_modules.cli import main; raise SystemExit(main(['methods']))"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as ran:
        assert ran.stdout
        ran.stdout.close()
        assert ran.stderr
        assert ran.stderr.read() == b""
    assert ran.returncode == 141
