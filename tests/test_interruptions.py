"""Runs that are killed, stopped or out of space: what is left is whole, and the same command goes on from it."""

import csv
import gc
import os
import random
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from lightning_modules import plots
from lightning_modules.callbacks import compression_log
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.ctrl_c import interruptible
from lightning_modules.run_folders import newest_checkpoint
from tests.commands import DIGITS, QUIET, output_to, tnlayers
from tests.killed_commands import RULES, STEPS
from tests.processes import Forks, finish, start


def fit(epochs: int = 500, *options: str) -> list[str]:
    """The command of a job script: the same each time it is started."""
    return ["fit", *DIGITS, *RULES, *QUIET, "--trainer.max_epochs", str(epochs), "--ckpt_path", "last", *options]


def checkpoints(folder: Path, version: str = "logs/version_0") -> dict[str, int]:
    """The steps of the checkpoints of a run, all of which can be read."""
    paths = (folder / "runs" / version / "checkpoints").iterdir()
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in paths if path.suffix == ".ckpt"}


def rows(folder: Path, version: str = "version_0") -> list[dict[str, str]]:
    with open(folder / "runs/logs" / version / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def reached(folder: Path, epoch: int) -> bool:
    """Whether the checkpoint of an epoch, or a later one, is there."""
    names = [path.name for path in (folder / "runs").rglob("epoch=*.ckpt")]
    return any(int(name.split("=")[1].split("-")[0]) >= epoch for name in names)


# ---- writing


SAVE = """
import resource, signal, sys, torch
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from tnlayers.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
content = {"x": torch.ones(10_000)}
for size in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        AtomicCheckpointIO().save_checkpoint(content, sys.argv[1])
    except UserError as error:
        print(error)
"""


def test_a_save_is_whole_or_not_there(tmp_path: Path) -> None:
    """Over the same name, cut off by a limit on the size of files at several places."""
    path, io = tmp_path / "run" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"x": torch.zeros(10_000)}, path)
    before = path.read_bytes()
    sizes = ["0", "100", "20000", str(len(before) - 100)]
    code, said = finish(start([sys.executable, "-c", SAVE, path, *sizes], tmp_path))
    assert code == 0, said
    assert said.count(f"cannot write {path}: File too large") == len(sizes)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".epoch=7.ckpt.partial").write_text("half of one")
    for name in (".notes.tmp", "old.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".cache.ckpt.partial").mkdir()
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(10)}, tmp_path / "last.ckpt")
    found = {each.name for each in tmp_path.iterdir()}
    assert found == {".notes.tmp", "old.partial", ".cache.ckpt.partial", "last.ckpt"}


def test_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"x": pytest.raises}, tmp_path / "code.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "code.ckpt", weights_only=False)


def test_no_space_left(forks: Forks, tmp_path: Path) -> None:
    assert forks.start(fit(1), tmp_path).wait() == 0
    before = checkpoints(tmp_path)
    size = (tmp_path / "runs/logs/version_0/checkpoints/last.ckpt").stat().st_size
    run = forks.start(fit(2), tmp_path, largest_file=size // 2)
    assert run.wait() == 2
    errors = [line for line in run.said.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert re.match(r"tnlayers: error: cannot write runs/.*epoch=1.*: File too large; ", errors[0])
    assert "Traceback" not in run.said
    assert checkpoints(tmp_path) == before
    assert not list(tmp_path.rglob("*.tmp"))
    assert forks.start(fit(2), tmp_path).wait() == 0
    assert checkpoints(tmp_path) == {"epoch=1-step=42.ckpt": 2 * STEPS, "last.ckpt": 2 * STEPS}


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("a file")
    command = ["fit", *DIGITS, *QUIET, "--trainer.default_root_dir", str(tmp_path / "runs")]
    assert tnlayers(*command) == 2
    assert f"tnlayers: error: the run cannot be kept in {tmp_path}/runs/logs: " in capsys.readouterr().err


# ---- kills


def test_killed_and_started_again(forks: Forks, tmp_path: Path) -> None:
    """Twice, at random moments; then it ends as one run, in one folder, that logged each epoch once."""
    steps = [0]
    for _ in range(2):
        run = forks.start(fit(), tmp_path)
        run.until(lambda: reached(tmp_path, max(steps) // STEPS + 1))
        time.sleep(random.uniform(0, 0.5))
        run.kill()
        assert run.wait() == -signal.SIGKILL
        steps.append(max(checkpoints(tmp_path).values()))
    epochs = steps[-1] // STEPS + 2
    run = forks.start(fit(epochs), tmp_path)
    assert run.wait() == 0
    assert "Restored all states from the checkpoint at runs/logs/version_0" in run.said
    assert [path.name for path in (tmp_path / "runs/logs").iterdir()] == ["version_0"]
    assert checkpoints(tmp_path)["last.ckpt"] == epochs * STEPS
    assert not [name for name in checkpoints(tmp_path) if "-v" in name]
    validated, trained = (
        [(int(row["epoch"]), int(row["step"])) for row in rows(tmp_path) if row[name]]
        for name in ("val/accuracy", "train/loss")
    )
    assert validated == [(epoch, STEPS * (epoch + 1) - 1) for epoch in range(epochs)]
    # Lightning logs an epoch's training after its checkpoint: the row of an epoch with a kill between them is lost.
    assert trained == sorted(set(trained))
    assert {epoch for epoch, _ in set(validated) - set(trained)} <= {step // STEPS - 1 for step in steps[1:]}
    first = yaml.safe_load((tmp_path / "runs/logs/version_0/config.yaml").read_text())
    assert (first["ckpt_path"], first["trainer"]["max_epochs"]) == ("last", 500)
    resumed = yaml.safe_load((tmp_path / "runs/logs/version_0/config-resumed-1.yaml").read_text())
    assert resumed["trainer"]["max_epochs"] == epochs
    assert not (tmp_path / "runs/logs/version_0/config-resumed-2.yaml").exists()  # the second start was like the first

    again = forks.start(fit(epochs), tmp_path)  # what is finished stays as it is
    assert again.wait() == 0
    assert checkpoints(tmp_path)["last.ckpt"] == epochs * STEPS
    assert len([row for row in rows(tmp_path) if row["train/loss"]]) == len(trained)


def test_terminated_in_training(forks: Forks, tmp_path: Path) -> None:
    run = forks.start(fit(), tmp_path)
    run.until(lambda: reached(tmp_path, 0))
    time.sleep(random.uniform(0, 0.5))
    run.kill(signal.SIGTERM)
    assert run.wait() == 143
    stopped = checkpoints(tmp_path)["last.ckpt"]
    ours = [line for line in run.said.splitlines() if "stopped at" in line]
    assert ours == [
        f"stopped at step {stopped}; --ckpt_path last goes on from runs/logs/version_0/checkpoints/last.ckpt"
    ]
    assert "Traceback" not in run.said
    assert len(checkpoints(tmp_path)) == 2  # last.ckpt, and that of the last whole epoch
    epochs = stopped // STEPS + 1
    assert forks.start(fit(epochs), tmp_path).wait() == 0
    assert checkpoints(tmp_path) == {
        f"epoch={epochs - 1}-step={epochs * STEPS}.ckpt": epochs * STEPS,
        "last.ckpt": epochs * STEPS,
    }
    assert [int(row["epoch"]) for row in rows(tmp_path) if row["train/loss"]] == list(range(epochs))


def test_terminated_before_training(forks: Forks, tmp_path: Path) -> None:
    run = forks.start(fit(), tmp_path)
    run.until(lambda: run.said)  # the seed is what is said first
    run.kill(signal.SIGTERM)
    assert run.wait() == 143
    assert "Traceback" not in run.said


def test_interrupted_by_hand(forks: Forks, tmp_path: Path) -> None:
    """Ctrl-C may come in the middle of a step: what was saved before stands."""
    run = forks.start(fit(), tmp_path)
    run.until(lambda: reached(tmp_path, 0))
    run.kill(signal.SIGINT)
    assert run.wait() == 130
    assert run.said.splitlines()[-1] == "tnlayers: interrupted"
    assert "Traceback" not in run.said
    assert all(step % STEPS == 0 for step in checkpoints(tmp_path).values())


@pytest.mark.parametrize("name", ["epoch=1", "last"])
@pytest.mark.parametrize("often", [[], ["--model_checkpoint.every_n_train_steps", "3"]], ids=["epochs", "steps"])
def test_killed_between_the_last_two_files(often: list[str], name: str, forks: Forks, tmp_path: Path) -> None:
    """There may be nothing left to train then; where the exit code is 0 last.ckpt is of the end."""
    end = 2 * STEPS
    killed = {"class_path": "tests.processes.KilledAtSave", "init_args": {"name": name, "step": end}}
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [killed]}}))
    assert forks.start([*fit(2, *often), "-c", "killed.yaml"], tmp_path).wait() == -signal.SIGKILL
    assert (checkpoints(tmp_path).get("last.ckpt") == end) == (name == "last")
    assert forks.start(fit(2, *often), tmp_path).wait() == 0
    assert checkpoints(tmp_path)["last.ckpt"] == end
    last = tmp_path / "runs/logs/version_0/checkpoints/last.ckpt"
    written = last.stat().st_mtime_ns
    assert forks.start(fit(2, *often), tmp_path).wait() == 0
    assert last.stat().st_mtime_ns == written  # what is finished stays as it is


# ---- Ctrl-C where an exception is lost


@pytest.fixture(autouse=True)
def _heeded() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which a shell's background jobs, such as a run of these tests, do not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def lost_in_a_callback() -> None:
    """Ctrl-C comes in a weak reference's callback, out of which Python lets no exception."""
    target = Figure()
    reference = weakref.ref(target, lambda _: signal.raise_signal(signal.SIGINT))
    del target
    gc.collect()
    assert reference() is None


def lost_in_compiled_code() -> None:
    """Another error comes out of it."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise ValueError("Invalid bounding box")


@pytest.mark.parametrize("lose", [lost_in_a_callback, lost_in_compiled_code])
def test_ctrl_c_in_a_schedules_plotting(
    lose: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plot(spectra: Sequence[plots.Spectrum]) -> Figure:
        lose()
        return plots.plot_spectra(spectra)

    monkeypatch.setattr(compression_log, "plot_spectra", plot)
    schedule = ["--rank_schedule.ranks", "{1: 4}", "--trainer.max_epochs", "500"]
    assert tnlayers("fit", *DIGITS, *RULES, *output_to(tmp_path), *schedule) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "tnlayers: interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_hundred_ctrl_cs_while_a_picture_is_drawn() -> None:
    """At drawn moments: none is lost, and none becomes another error."""
    spectrum = plots.Spectrum("conv1", (1.0, 0.5, 0.2), (1.0, 0.5), (3,), (2,), 0.1)
    plots.png(plots.plot_spectra([spectrum]))
    begin = time.perf_counter()
    plots.png(plots.plot_spectra([spectrum]))
    whole, me = time.perf_counter() - begin, threading.get_ident()

    def draw(timer: threading.Timer) -> None:
        with interruptible():
            timer.start()
            while timer.is_alive():
                plots.png(plots.plot_spectra([spectrum]))
            time.sleep(5)  # what was lost comes again in it

    for _ in range(100):
        timer = threading.Timer(random.uniform(0, whole), signal.pthread_kill, [me, signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            draw(timer)


def test_ctrl_c_that_a_job_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_sigterm_that_python_would_lose_comes_again() -> None:
    class Late:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def lose() -> None:
        with interruptible():
            late = Late()
            del late
            time.sleep(5)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit) as ended:
            lose()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143


# ---- last


def saved(path: Path, step: int, age: float = 0, **content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2", "global_step": step, **content}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def torn(path: Path, age: float) -> Path:
    content = saved(path, 99).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_newest_checkpoint(tmp_path: Path) -> None:
    """The run that was written to last; in it the most steps, then last.ckpt, then the newest."""
    old, new, empty = (tmp_path / name / "checkpoints" for name in ("version_10", "version_9", "version_11"))
    empty.mkdir(parents=True)
    saved(old / "last.ckpt", 99, age=10)
    saved(new / "a.ckpt", 20, age=5)
    folders = [old, new, empty, tmp_path / "none"]

    def newest() -> Path | None:
        found = newest_checkpoint(folders)
        return found.path if found else None

    assert newest() == new / "a.ckpt"
    b = saved(new / "b.ckpt", 20, age=2)
    assert newest() == b
    last = saved(new / "last.ckpt", 20, age=3)
    assert newest() == last
    (new / ".c.ckpt.tmp").write_bytes(last.read_bytes())
    assert newest() == last
    c = saved(new / "c.ckpt", 21, age=4)
    assert newest() == c
    broken = torn(new / "d.ckpt", age=1)
    with pytest.warns(UserWarning, match=f"{re.escape(str(broken))} .*; using {re.escape(str(c))} .step 21. instead"):
        assert newest() == c
    assert newest_checkpoint([empty]) is None


def test_a_torn_checkpoint_is_skipped(forks: Forks, tmp_path: Path) -> None:
    assert forks.start(fit(1), tmp_path).wait() == 0
    last = tmp_path / "runs/logs/version_0/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    run = forks.start(fit(2), tmp_path)
    assert run.wait() == 0
    (warning,) = [line for line in run.said.splitlines() if "warning" in line]
    assert "checkpoints/last.ckpt is not a checkpoint" in warning
    assert "using runs/logs/version_0/checkpoints/epoch=0-step=21.ckpt (step 21) instead" in warning
    assert checkpoints(tmp_path)["last.ckpt"] == 2 * STEPS
    assert not [name for name in checkpoints(tmp_path) if "-v" in name]


def test_nothing_to_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path), *QUIET]
    assert tnlayers("test", *DIGITS, *root, "--ckpt_path", "last") == 2
    assert f"--ckpt_path last: no checkpoint in {tmp_path}/logs yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        (["--trainer.logger", "false"], "runs/checkpoints"),
        (["--model_checkpoint.dirpath", "kept"], "kept"),
        (["--trainer.logger", "true"], "runs/logs/version_0/checkpoints"),
        (["-c", "two.yaml"], "runs/logs/version_0/checkpoints"),
    ],
    ids=["no logger", "dirpath", "the default logger", "two loggers"],
)
def test_last_is_found_where_checkpoints_are(options: list[str], folder: str, forks: Forks, tmp_path: Path) -> None:
    loggers = [
        {"class_path": name, "init_args": {"save_dir": place, "name": "logs"}}
        for name, place in (("lightning_modules.loggers.CSV", "runs"), ("TensorBoardLogger", "boards"))
    ]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    top = ["--model_checkpoint.monitor", "val/loss", "--model_checkpoint.save_top_k", "2"]
    first = forks.start([*fit(1), *options, *top], tmp_path)
    assert first.wait() == 0
    assert "starts from the beginning" in first.said
    (tmp_path / "boards/logs/version_7").mkdir(parents=True)  # of another run, so that a new one would be 8
    assert forks.start([*fit(4), *options, *top], tmp_path).wait() == 0
    found = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / folder).glob("*.ckpt")}
    assert found["last.ckpt"]["global_step"] == 4 * STEPS
    assert len(found) == 3  # the best two, as one run would have left
    assert forks.start(["test", *fit()[1:], *options], tmp_path).wait() == 0
    if options[0] == "-c":  # fit twice into one folder; the test has one of its own
        boards = [path.parent.name for path in (tmp_path / "boards/logs").glob("*/events*")]
        assert sorted(boards) == ["version_0", "version_0", "version_8"]
