"""The script for a CUDA card, tiny and on the CPU, so that it does not fail for a slip where a card is lent for minutes."""

import io
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import device, rows
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import conformance, layers, nets, training
from benchmarks.gpu.pictures import read
from benchmarks.gpu.tables import tables
from benchmarks.rows import LostDevice, Row, Rows
from benchmarks.timing import LEAST_ROUNDS, medians
from lightning_modules.nets import build_net
from tests.tolerances import EXACT

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def torch_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("benchmark", "benchmark_limit", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Ten classes with one picture for training and one for testing, each of one grey; the classes are not in order."""
    path = tmp_path / "pictures.tar.xz"
    with tarfile.open(path, "w:xz") as files:
        for number in reversed(range(10)):
            for part in ("test", "train"):
                content = io.BytesIO()
                Image.fromarray(np.full((16, 16, 3), 25 * number, dtype=np.uint8)).save(content, "JPEG")
                member = tarfile.TarInfo(f"./{part}/class{number}/0.jpg")
                member.size = len(content.getvalue())
                content.seek(0)
                files.addfile(member, content)
    return path


def test_pictures_keep_their_labels(archive: Path) -> None:
    part = read(archive, CPU)["train"]
    greys = part.pictures.float().mean((1, 2, 3))
    torch.testing.assert_close(greys, 25.0 * part.labels, rtol=0, atol=2)
    x, y = part.epoch(torch.Generator().manual_seed(0))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert sorted(y.tolist()) == list(range(10))
    brightest = x.amax((1, 2, 3))  # the corner that is shifted in is black
    assert torch.equal(brightest.argsort(), y.argsort())


@pytest.mark.slow
def test_the_whole_script_tiny_on_the_cpu(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "resnet20.th"
    net = build_net("resnet20", num_classes=10, input_shape=(3, 32, 32))
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, checkpoint)
    out = tmp_path / "results.json"
    given = ["--quick", "--device", "cpu", "--out", out, "--data", archive, "--checkpoint", checkpoint]
    assert script.main(list(map(str, given))) == 0
    result = json.loads(out.read_text())
    assert {row["part"] for row in result["rows"]} == set(script.PARTS)
    assert not [row for row in result["rows"] if "error" in row or row.get("wrong")]
    assert not result["left_out"]
    assert result["commit"] is None or len(result["commit"]) == 40
    written = tables(result)
    assert "0 went wrong" in written
    assert all(f"## {part.capitalize()}" in written for part in script.PARTS)
    capsys.readouterr()

    assert script.main(list(map(str, given))) == 0  # a later run finds all of them
    assert json.loads(out.read_text())["rows"] == result["rows"]
    assert ": done" not in capsys.readouterr().out


def test_the_parts_share_the_time() -> None:
    assert sum(share for _, share in script.PARTS.values()) == pytest.approx(1)


def test_where_there_is_no_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert script.main(["--out", str(tmp_path / "results.json")]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


# ---- rows


class Clock:
    """Stands still, except where rows take their time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(rows.time, "monotonic", lambda: self.now)

    def row(self, name: str, seconds: float, guess: float = 1.0) -> Row:
        def make() -> dict[str, Any]:
            self.now += seconds
            return {}

        return Row(name, guess, make)


def made(path: Path) -> list[str]:
    return [row["name"] for row in json.loads(path.read_text())["rows"]]


def test_no_row_starts_that_would_not_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, found = Clock(monkeypatch), Rows(tmp_path / "rows.json", {}, CPU)
    # The first shows that rows take three times their guess: 9 seconds and a margin are not left for the second.
    found.fill("part", [clock.row("a", 6, guess=2), clock.row("b", 9, guess=3), clock.row("c", 3)], until=15)
    assert made(found.path) == ["a", "c"]
    assert found.left_out == ["part: b"]


def test_rows_that_raise_are_kept_and_made_again_when_asked(tmp_path: Path) -> None:
    tried: list[str] = []

    def fail() -> dict[str, Any]:
        tried.append("a")
        raise ValueError("no such layer")

    def broken() -> Iterator[Row]:
        yield Row("a", 0, fail)
        yield Row("b", 0, lambda: {"value": 1})
        raise OSError("no data")

    path = tmp_path / "rows.json"
    Rows(path, {}, CPU).fill("part", broken(), until=float("inf"))
    first = json.loads(path.read_text())["rows"]
    assert made(path) == ["a", "b", "further rows"]
    assert first[0]["error"] == "ValueError: no such layer"
    assert first[2]["error"] == "OSError: no data"
    Rows(path, {}, CPU).fill("part", broken(), until=float("inf"))
    assert tried == ["a"]
    again = Rows(path, {}, CPU)
    again.forget_errors()
    again.fill("part", broken(), until=float("inf"))
    assert tried == ["a", "a"]


def test_a_device_that_answers_no_more_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    found = Rows(tmp_path / "rows.json", {}, CUDA)
    monkeypatch.setattr(torch, "ones", lost)
    with pytest.raises(LostDevice, match="illegal memory access"):
        found.fill("part", [Row("a", 0, lost), Row("b", 0, dict)], until=float("inf"))
    assert made(found.path) == ["a"]


# ---- what only a card runs, on a stand-in for it


class Card:
    """Stands in for torch.cuda: counts events, and a graph replays what was called last while it was captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = self.synchronized = 0
        for name in ("Event", "Stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **__: self)
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)

    def __enter__(self) -> None:
        self.captures += 1

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, stream: "Card") -> None:
        assert stream is self

    def record(self) -> None:
        pass

    def elapsed_time(self, end: "Card") -> float:
        return 0.25

    def replay(self) -> None:
        pass

    def synchronize(self) -> None:
        self.synchronized += 1


def test_short_calls_are_repeated_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    card, calls = Card(monkeypatch), []
    seconds = medians({"a": lambda: calls.append("a")}, 3, CUDA)
    assert seconds == {
        "a": pytest.approx(0.25e-3 / 20)
    }  # of twenty calls: 0.25 ms for one is a twentieth of the least time
    assert len(calls) == 2 + 3 * (1 + 20)
    assert card.synchronized == 2 * (2 + 3)


def test_what_is_captured_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card, calls = Card(monkeypatch), []

    def call() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return torch.zeros(1)

    replay, out = device.captured(call, CUDA)
    replay()
    assert calls == [False] * 4  # three to warm up, one to capture
    assert torch.equal(out, torch.zeros(1))
    parameter, grads = torch.nn.Parameter(torch.ones(1)), []

    def step() -> None:
        grads.append(parameter.grad)
        (2 * parameter).sum().backward()

    device.captured_step(step, [parameter], CUDA)()
    assert grads == [None] * 4
    assert card.captures == 4  # two streams, two graphs
    assert device.peak_bytes(call, CUDA) == 250
    device.synchronize(CUDA)
    assert conformance.capturable(CUDA) == {"capturable": True}


# ---- what is measured


def test_on_the_cpu_a_replay_is_a_call() -> None:
    x = torch.zeros(2)
    replay, out = device.captured(lambda: x + 1, CPU)
    x.fill_(3)
    replay()
    torch.testing.assert_close(out, torch.full((2,), 4.0), **EXACT)
    assert device.peak_bytes(lambda: None, CPU) == 0


def test_the_peak_of_a_call_on_the_cpu_is_of_all_that_lives_at_once() -> None:
    def call() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first
        third = torch.zeros(500)
        del second, third

    assert device.peak_bytes(call, CPU) == pytest.approx(4 * 3000, abs=128)  # torch rounds up to its alignment


def test_rounds_end_when_their_time_is_over_but_for_the_first_ones() -> None:
    calls: list[str] = []
    seconds = medians({"a": lambda: calls.append("a") or time.sleep(6e-3)}, 10, seconds=0)
    assert len(calls) == 2 + 2 * LEAST_ROUNDS  # each turn begins with a call that is not timed
    assert seconds["a"] >= 6e-3


def test_every_layer_of_the_list_can_be_built() -> None:
    for name, (sizes, side) in layers.CONVS.items():
        subject = layers.conv(sizes, side)
        assert subject.dense()(torch.zeros(1, *subject.shape)).shape[2:] == (side, side), name
    for features in layers.LINEARS.values():
        assert layers.linear(features).dense()(torch.zeros(1, features[0])).shape == (1, features[1])


def test_the_nets_of_the_list_have_a_stem() -> None:
    assert {name for name, _ in (*nets.ORDER, *nets.COMPILED, *nets.TINY)} == nets.STEMS.keys()
    assert {method for _, method in nets.ORDER} == nets.METHODS.keys()


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [training.rate_at(step, 100, 0.5) for step in range(101)]
    assert max(rates) == rates[4] == rates[5] == 0.5
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_a_checks_row_tells_what_differs() -> None:
    checks = conformance.Checks()
    checks.near("near", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]), 1e-2)
    checks.near("far", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), 1e-2)
    checks.near("not a number", torch.tensor([float("nan")]), torch.tensor([1.0]), 1e-2)
    checks.near("of another shape", torch.ones(2, 1), torch.ones(1, 1), 1e-2)
    assert checks.made == 4
    assert [text.split(" differs")[0] for text in checks.wrong] == ["far", "not a number", "of another shape"]


@pytest.mark.parametrize("path", sorted((ROOT / "results/gpu").glob("*.json")), ids=lambda path: path.stem)
def test_the_page_is_that_of_the_results(path: Path) -> None:
    assert tables(json.loads(path.read_text())) in (ROOT / "docs/gpu.md").read_text()
