"""W&B: offline where it cannot be reached, and what a run leaves there, read back from its file."""

import json
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from wandb.proto import wandb_internal_pb2

from lightning_modules.loggers import WandB
from lightning_modules.study import Findings, read_rows
from tests.commands import CONFIGS, DIGITS, QUIET, tnlayers
from tests.processes import COMMAND, HANGING, Forks, finish, start

RULES = ["--model.rules", "[{pattern: conv3, method: Tucker, rank: 8}]"]


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which nobody has logged in, and where W&B keeps everything to the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    yield
    wandb.finish()
    wandb.teardown()


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB after a header of 7 bytes."""
    content, offset, parts = path.read_bytes(), 7, []
    while offset + 7 <= len(content):
        left = 32768 - offset % 32768
        length, kind = struct.unpack("<HB", content[offset + 4 : offset + 7])
        if left < 7 or kind == 0:
            offset += left
            continue
        if offset + 7 + length > len(content):  # what a killed process has left unfinished
            return
        parts.append(content[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The configuration and the history of the only run in a folder, read once it has ended."""
    wandb.finish()  # as the end of a process does
    wandb.teardown()  # only then is the file whole
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    config, history, kinds = read_file(path)
    assert "exit" in kinds
    return config, history


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, list[Any]], set[str]]:
    """The configuration, the history, and the kinds of records in a file."""
    config: dict[str, Any] = {}
    history: dict[str, list[Any]] = {}
    kinds = set()
    for record in records(path):
        kinds.add(record.WhichOneof("record_type"))
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
        for item in record.history.item:
            history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    return config, history, kinds


def logged_to(folder: Path) -> list[str | Path]:
    return [
        *("-c", CONFIGS / "logger/wandb.yaml", "--trainer.logger.init_args.save_dir", folder),
        *("--trainer.default_root_dir", folder, "--trainer.log_every_n_steps", "5", *QUIET),
    ]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of our logger, leaving out what wandb writes for its own developers."""
    return [record.getMessage() for record in caplog.records if record.name == "lightning_modules.loggers"]


def test_fit_and_compress_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit, compress = tmp_path / "fit", tmp_path / "compress"
    assert tnlayers("fit", *DIGITS, *RULES, *logged_to(fit), "--trainer.max_epochs", "2") == 0
    (message,) = said(caplog)
    assert "W&B is offline (no API key" in message
    assert f"wandb sync {fit}/wandb/offline-run-*" in message
    config, history = read_run(fit)
    assert config["cli"]["model"]["rules"] == [{"pattern": "conv3", "method": "Tucker", "rank": 8}]
    assert config["cli"]["trainer"]["max_epochs"] == 2
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert len(history[name]) == 2, name
    assert history["train/loss"][1] < history["train/loss"][0]
    assert history["compress/conv3/rank0"][-1] == 8
    assert not list(fit.rglob("metrics.csv"))

    dense = tmp_path / "dense.ckpt"
    (last,) = fit.rglob("last.ckpt")
    last.rename(dense)
    out = tmp_path / "out"
    rules = ["--model.rules", "[{pattern: conv4, method: Tucker, rank: 8}]"]
    arguments = [*DIGITS, *rules, *logged_to(compress), "--checkpoint", dense, "--out", out]
    assert tnlayers("compress", *arguments) == 0
    config, history = read_run(compress)
    assert config["cli"]["checkpoint"] == str(dense)
    totals = json.loads((out / "report.json").read_text())["totals"]
    assert history["compress/params_kept"] == pytest.approx([totals["params_kept"]])
    assert history["compress/conv4/rank0"] == [8]
    assert len(history["test/accuracy"]) == 2  # dense, and right after
    (table,) = compress.glob("wandb/offline-run-*/files/media/table/compress/layers*.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]][-1] == "whole model"


def test_study_offline(tmp_path: Path) -> None:
    """The figures, the rows as tables and every plot."""
    few = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1", *logged_to(tmp_path / "fit")]
    assert tnlayers("fit", *DIGITS, *few) == 0
    wandb.finish()
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    protocol = {"layers": "conv[12]", "losses": "[0.5]", "retrain": "[]", "epochs": "0", "pictures": "50"}
    options = [part for name, value in protocol.items() for part in (f"--protocol.{name}", value)]
    out, logs = tmp_path / "out", tmp_path / "study"
    assert tnlayers("study", *DIGITS, "--checkpoint", checkpoint, "--out", out, *options, *logged_to(logs)) == 0
    config, history = read_run(logs)
    assert config["cli"]["protocol"]["losses"] == [0.5]
    measured = Findings(read_rows(out / "study.jsonl"))
    assert measured.recommendation is not None
    assert history["study/accuracy_dense"] == [measured.study.accuracy]
    assert history["study/recommended/params_kept"] == [pytest.approx(measured.recommendation.params_kept)]
    (table,) = logs.glob("wandb/offline-run-*/files/media/table/study/layers*.json")
    assert {row[0] for row in json.loads(table.read_text())["data"]} == {"conv1", "conv2"}
    assert history["study/plots/count"] == [len(list(out.glob("*.png")))]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_mode_wins(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked the network"))
    logger = WandB(save_dir=str(tmp_path / "run"))
    logger.log_metrics({"x": 1.0})
    assert logger.experiment.offline == (mode == "offline")
    assert logger.experiment.disabled == (mode == "disabled")
    assert said(caplog) == []
    if mode == "offline":
        assert read_run(tmp_path / "run")[1]["x"] == [1.0]


@pytest.mark.parametrize("source", ["environment", "netrc"])
def test_a_key_without_a_network_goes_offline(
    source: str,
    closed_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
    if source == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    else:
        Path(os.environ["NETRC"]).write_text(f"machine 127.0.0.1\n  login user\n  password {'0' * 40}\n")
    logger = WandB(save_dir=str(tmp_path / "run"))
    logger.log_metrics({"x": 1.0})
    (message,) = said(caplog)
    assert "W&B is offline (127.0.0.1 cannot be reached" in message
    assert read_run(tmp_path / "run")[1]["x"] == [1.0]


def test_offline_can_be_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = dict(os.environ)
    logger = WandB(save_dir=str(tmp_path / "run"), offline=True)
    logger.log_metrics({"x": 1.0})
    assert read_run(tmp_path / "run")[1]["x"] == [1.0]
    assert said(caplog) == []
    assert os.environ.get("WANDB_MODE") == environment.get("WANDB_MODE")


ACCOUNT = (
    "HOME",
    "NETRC",
    "WANDB_DIR",
    "WANDB_DATA_DIR",
    "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR",
    "WANDB_ERROR_REPORTING",
)


def job(epochs: int, *options: str) -> list[str]:
    """The command of a job script: the same each time it is started."""
    logger = ["-c", str(CONFIGS / "logger/wandb.yaml"), "--trainer.max_epochs", str(epochs), "--ckpt_path", "last"]
    return ["fit", *DIGITS, *RULES, *QUIET, *logger, *options]


def steps_of(path: Path) -> list[int]:
    return read_file(path)[1]["trainer/global_step"]


def test_killed_and_started_again(forks: Forks, tmp_path: Path) -> None:
    """Two files of one run, which is what `wandb sync` makes of them."""
    account = {name: os.environ[name] for name in ACCOUNT}
    run = forks.start(job(500), tmp_path, **account)
    run.until(lambda: any(path.stat().st_size > 10_000 for path in tmp_path.rglob("*.wandb"))).kill()
    assert run.wait() == -signal.SIGKILL
    (last,) = tmp_path.rglob("last.ckpt")
    step = torch.load(last, weights_only=True)["global_step"]
    epochs = step // 21 + 2
    assert forks.start(job(epochs), tmp_path, **account).wait() == 0

    first, second = sorted(
        (tmp_path / "runs/wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    )
    run_id = last.parents[1].name
    assert first.name == second.name == f"run-{run_id}.wandb"
    assert last.parent.parent.parent == tmp_path / "runs/tnlayers"
    assert {record.run.run_id for path in (first, second) for record in records(path) if record.run.run_id} == {run_id}
    assert "exit" not in read_file(first)[2]
    assert "exit" in read_file(second)[2]
    (name,) = [name for name in read_file(second)[0] if name.startswith("cli")]
    assert name == "cli-resumed-1"  # with another number of epochs
    assert read_file(second)[0][name]["ckpt_path"] == "last"
    assert sorted({0, *steps_of(first)}) == [0, *range(20, max(steps_of(first)) + 1, 21)]
    assert sorted(set(steps_of(second))) == list(range(step + 20, 21 * epochs, 21))
    axes = {(record.metric.glob_name, record.metric.step_metric) for record in records(second)}
    assert ("*", "trainer/global_step") in axes
    assert torch.load(last, weights_only=True)["global_step"] == 21 * epochs
    assert (last.parents[1] / "config.yaml").is_file()


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """Also when it is stopped, by a signal to the first of them, and goes on."""
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    process = start([*COMMAND, *job(500, *two)], tmp_path)
    end = time.monotonic() + HANGING
    while not list(tmp_path.rglob("last.ckpt")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    process.terminate()
    code, said = finish(process)
    assert code == 143, said
    assert "Traceback" not in said
    assert (said.count("stopped at step"), said.count("W&B is offline")) == (1, 1)
    assert "sync_dist" not in said
    (last,) = tmp_path.rglob("last.ckpt")
    stopped = torch.load(last, weights_only=True)["global_step"]
    code, said = finish(start([*COMMAND, *job(stopped // 10 + 1, *two)], tmp_path))
    assert code == 0, said
    assert torch.load(last, weights_only=True)["global_step"] > stopped
    assert [path.name for path in (tmp_path / "runs/tnlayers").iterdir()] == [last.parents[1].name]
    files = sorted((tmp_path / "runs/wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert [path.name for path in files] == [f"run-{last.parents[1].name}.wandb"] * 2
    config, history, _ = read_file(files[0])
    assert config["cli"]["trainer"]["devices"] == "2"
    assert len(history["train/loss"]) == len(set(history["epoch"]))
    assert min(steps_of(files[1])) >= stopped


def test_what_is_handed_to_wandb(tmp_path: Path) -> None:
    """Lightning hands `anonymous` on, of which wandb warns whatever it is; and a killed process loses a second at most."""
    handed = WandB(save_dir=str(tmp_path), offline=True)._wandb_init
    assert (handed["mode"], handed.keys() & {"anonymous", "settings"}) == ("offline", {"settings"})
    assert WandB(save_dir=str(tmp_path), offline=True, settings={"silent": True})._wandb_init["settings"] == {
        "silent": True
    }
