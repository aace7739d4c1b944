"""Files that others wrote: every usual nesting and prefix, and the hostile ones."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tnlayers import CheckpointError, load_checkpoint


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "_orig_mod.", "model._orig_mod.", "module.model."])
def test_prefixes_and_formats(tmp_path: Path, suffix: str, prefix: str) -> None:
    source, target, path = net(), net(), tmp_path / f"weights{suffix}"
    state = prefixed(source.state_dict(), prefix)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    report = load_checkpoint(path, target)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert report.prefix == prefix
    assert len(report.matched) == len(state)


@pytest.mark.parametrize(
    "keys", [("state_dict",), ("model_state_dict",), ("model",), ("net",), ("model", "state_dict")]
)
def test_nesting(tmp_path: Path, keys: tuple[str, ...]) -> None:
    source, target = net(), net()
    content: Any = source.state_dict()
    for key in keys:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pt")
    load_checkpoint(tmp_path / "a.pt", target)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_another_architecture_names_the_keys_and_changes_nothing(tmp_path: Path) -> None:
    target = net()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2))
    torch.save(other.state_dict(), tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"2 missing \(2.weight, 2.bias\), 2 unexpected \(3.weight, 3.bias\)"
    ) as error:
        load_checkpoint(tmp_path / "a.pt", target)
    assert "0.weight: (5, 3, 3, 3) in the file, (4, 3, 3, 3) in the model" in str(error.value)
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)
    report = load_checkpoint(tmp_path / "a.pt", target, strict=False)
    assert report.missing == ("2.weight", "2.bias")
    assert "1.weight" in report.matched


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class Call:
    def __init__(self, function: Any, argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_odd_state_dicts_are_named(tmp_path: Path) -> None:
    state = net().state_dict()
    loop: dict[str, Any] = {}
    loop["model"] = loop
    odd = {
        "integer keys": {1: state["0.weight"]},
        "bytes keys": {b"0.weight": state["0.weight"]},
        "a loop": loop,
        "sparse": state | {"2.weight": state["2.weight"].to_sparse()},
        "integers": state | {"2.weight": state["2.weight"].int()},
        "complex": state | {"2.weight": state["2.weight"].to(torch.complex64)},
    }
    for kind, content in odd.items():
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"does not fit|holds no state dict"):
            load_checkpoint(tmp_path / "a.pt", net())
        assert kind


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    torch.save({"state_dict": net().state_dict(), "extra": Hostile(trap)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"was refused: .* could run code; save the state_dict alone"):
        load_checkpoint(tmp_path / "a.pt", net())
    for function in (os.system, print, exec):
        torch.save({"state_dict": net().state_dict(), "extra": Call(function, f"touch {trap}")}, tmp_path / "b.pt")
        with pytest.raises(CheckpointError, match="was refused"):
            load_checkpoint(tmp_path / "b.pt", net())
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_torn_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(net().state_dict(), path)
    else:
        save_file(net().state_dict(), path)
    whole = path.read_bytes()
    for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"{path} (is not a checkpoint, or it is truncated|holds)"):
            load_checkpoint(path, net())


@pytest.mark.parametrize("content", [b"not a checkpoint at all\n", b"PK\x03\x04 zip?", b"\x80\x04."])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.pt is not a checkpoint"):
        load_checkpoint(tmp_path / "a.pt", net())


def test_files_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*missing.pt"):
        load_checkpoint(tmp_path / "missing.pt", net())
    for content, message in [({"epoch": 1}, "holds no state dict"), ([1, 2], "holds a list; expected a state dict")]:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "a.pt", net())


@pytest.mark.data
def test_the_published_resnet20_loads(resnet20_checkpoint: Path) -> None:
    from lightning_modules.nets import build_net

    report = load_checkpoint(resnet20_checkpoint, build_net("resnet20", num_classes=10, input_shape=(3, 32, 32)))
    assert str(report) == "97 entries matched, prefix 'module.' taken off"
