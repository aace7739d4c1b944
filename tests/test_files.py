"""Full disks and several jobs at once: what a command writes is there in whole or not at all, and one job at a time writes it."""

import errno
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_modules import quickstart
from lightning_modules.folders import whole_folder
from lightning_modules.locks import LOCK, FolderInUse, claimed, first_unused, try_lock
from tests import killed_commands
from tests.commands import DIGITS, QUIET, tnlayers
from tests.killed_commands import RULES
from tests.processes import Forks
from tnlayers.errors import UserError
from tnlayers.files import append, beside, write_files


def everything(folder: Path) -> dict[str, bytes]:
    """What is in all files under a folder; empty folders are nothing."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    assert tnlayers("fit", *DIGITS, *QUIET, *few, "--trainer.default_root_dir", folder) == 0
    return folder / "logs/version_0/checkpoints/last.ckpt"


def test_locks_leave_nothing_for_later_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[object] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **hook: hooks.append(hook))
    for name in "abc":
        with try_lock(tmp_path / name) as file:
            assert file is not None
    assert len(hooks) <= 1  # none where an earlier test has come first


def compress(dense: Path, out: Path) -> list[str]:
    return ["compress", *DIGITS, *RULES, *QUIET, "--checkpoint", str(dense), "--out", str(out)]


# ---- a disk that is full, or may only be read


class Failing:
    """The operating system's function, which fails at its n-th call and from then on."""

    def __init__(self, function: Callable[..., object], number: int, code: int) -> None:
        self.function, self.left, self.code = function, number, code

    def __call__(self, *arguments: object, **options: object) -> object:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.function(*arguments, **options)


@pytest.mark.parametrize("seed", range(20))
def test_files_are_written_whole_or_not_at_all(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    folder = tmp_path / "a/b"
    new = {f"{number}.txt": str(draw.random()) for number in range(4)}
    if draw.random() < 0.7:
        write_files(folder, dict.fromkeys(draw.sample(sorted(new), 2), "before"))
    before = everything(tmp_path), sorted(tmp_path.rglob("*"))
    code = draw.choice([errno.ENOSPC, errno.EROFS, errno.EDQUOT])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Failing(os.fsync, draw.randrange(4), code))
        with pytest.raises(UserError, match=r"cannot write .*/\d\.txt: .*; what was there before is intact"):
            write_files(folder, new)
    assert (everything(tmp_path), sorted(tmp_path.rglob("*"))) == before
    write_files(folder, new)
    assert everything(folder) == {name: content.encode() for name, content in new.items()}


def test_rows_are_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    for before in (None, "one\n"):
        if before:
            append(path, before)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Failing(os.fsync, 0, errno.ENOSPC))
            with pytest.raises(UserError, match=f"cannot write {re.escape(str(path))}: No space left"):
                append(path, "two\n", synced=True)
        assert (path.read_text() if path.exists() else None) == before


COMMANDS = {
    "report": ["report", "@dense", "--out", "@/out/report", "--batch", "2"],
    "compress": ["compress", *DIGITS, *RULES, *QUIET, "--checkpoint", "@dense", "--out", "@/out/c"],
    "study": ["study", *DIGITS, *QUIET, "--checkpoint", "@dense", "--out", "@/out/s"],
    "test": ["test", *DIGITS, *QUIET, "--ckpt_path", "@dense", "--trainer.default_root_dir", "@/out"],
    "predict": ["predict", *DIGITS, *QUIET, "--ckpt_path", "@dense", "--trainer.default_root_dir", "@/out"],
    "quickstart": ["quickstart", "--out", "@/out/q"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line(
    name: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_EPOCHS", 1)
    command = [each.replace("@dense", str(dense)).replace("@", str(tmp_path)) for each in COMMANDS[name]]
    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, 0, errno.ENOSPC))
    assert tnlayers(*command) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "error" in line.lower()]
    assert re.match(r"tnlayers: error: cannot write .*: No space left on device", line)
    assert "Traceback" not in said
    assert not everything(tmp_path)


# ---- one job at a time


def test_a_folder_is_one_jobs(tmp_path: Path) -> None:
    """Its lock goes with the job, and so does a folder that stays empty."""
    folder = tmp_path / "a/b"
    with claimed(folder):
        message = f"{folder} is being written by another job: wait for it to end, or give another --out"
        with pytest.raises(FolderInUse, match=re.escape(message)), claimed(folder):
            pass
        assert (folder / LOCK).is_file()
    assert not list(tmp_path.iterdir())
    with claimed(folder):
        (folder / "file").touch()
    assert list(everything(tmp_path)) == ["a/b/file"]


def test_a_lock_is_not_a_forked_workers(tmp_path: Path) -> None:
    """A worker that loads data notices seconds later that its process was killed."""
    with try_lock(tmp_path / "lock"):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
    time.sleep(0.2)
    with try_lock(tmp_path / "lock") as lock:
        assert lock
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


def test_neighbours(tmp_path: Path) -> None:
    """Each of two gets one of its own; a lock that a killed job has left is in nobody's way, its files are."""
    places = [tmp_path / name for name in "abc"]
    write_files(places[0], {"file": ""})
    places[1].mkdir()
    (places[1] / LOCK).touch()
    with first_unused(places) as first, first_unused(places) as second:
        assert [first, second] == places[1:]


def test_a_run_that_came_to_nothing_but_its_lock(tmp_path: Path) -> None:
    """Killed runs do not pile up: its number is the next one's."""
    run = tmp_path / "logs/version_0"
    run.mkdir(parents=True)
    (run / LOCK).touch()
    options = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--ckpt_path", "last"]
    assert tnlayers("fit", *DIGITS, *QUIET, *options, "--trainer.default_root_dir", tmp_path) == 0
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "metrics.csv"]


def test_two_writers_of_a_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with whole_folder(out) as folder:
        message = f"{out} is being written by another job"
        with pytest.raises(FolderInUse, match=re.escape(message)), whole_folder(out):
            pass
        (folder / "file").touch()
    assert list(everything(tmp_path)) == ["out/file"]


# ---- kill -9


def test_compress_is_killed_and_started_again(forks: Forks, dense: Path, tmp_path: Path) -> None:
    """Before its folder is complete there is none, and the same command begins anew; a result is not written over."""
    job = killed_commands.compress(dense)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    seconds, whole = killed_commands.run_whole(job, forks, tmp_path / "whole")
    moment = random.uniform(0.2, 0.9) * seconds
    how = killed_commands.check(
        job, forks, tmp_path / "killed", moment, whole
    )  # which asserts what `compress` promises
    assert how in ("began anew", "had a whole result", killed_commands.ENDED_BEFORE)


def test_fit_on_a_run_that_another_job_trains(forks: Forks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second `last` is refused and changes nothing; a run that is new gets a folder of its own."""
    command = ["fit", *DIGITS, *QUIET, "--trainer.default_root_dir", str(tmp_path / "runs")]
    run = forks.start([*command, "--trainer.max_epochs", "1000", "--ckpt_path", "last"], tmp_path)
    last = tmp_path / "runs/logs/version_0/checkpoints/last.ckpt"
    run.until(last.is_file)
    capsys.readouterr()
    assert tnlayers(*command, "--trainer.max_epochs", "1", "--ckpt_path", "last") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(r"runs/logs is being written by another job: wait .* --trainer\.default_root_dir", line)
    assert tnlayers(*command, "--trainer.max_epochs", "1") == 0
    assert (tmp_path / "runs/logs/version_1/checkpoints/last.ckpt").is_file()
    run.kill()
    run.wait()


def test_a_lock_that_a_killed_job_left_is_no_hindrance(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK).touch()
    assert tnlayers(*compress(dense, out)) == 0
    assert (out / "model.ckpt").is_file()
    assert not (out / LOCK).exists()


def test_a_loggers_folder_in_the_result_is_part_of_it(dense: Path, tmp_path: Path) -> None:
    """Whatever else its logger's folder is called, nothing stands in the finished result's way."""
    logger = ["--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger"]
    where = ["--trainer.logger.init_args.save_dir", str(tmp_path / "out")]
    assert tnlayers(*compress(dense, tmp_path / "out"), *logger, *where) == 0
    assert (tmp_path / "out/model.ckpt").is_file()
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_the_current_folder_is_refused_for_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(UserError, match=r"^\. is the current folder; give a folder in it: --out run$"),
        whole_folder(Path(".")),
    ):
        pass


def test_a_result_that_cannot_get_its_name_stays(tmp_path: Path) -> None:
    def late() -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "model.ckpt").write_text("whole")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/other").touch()

    with pytest.raises(UserError, match="the result is whole where it is"):
        late()
    assert (beside(tmp_path / "out") / "model.ckpt").read_text() == "whole"


def test_a_job_is_not_kept_out_by_itself(tmp_path: Path) -> None:
    few = [
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    same = ["--trainer.logger.init_args.version", "0", "--model_checkpoint.dirpath", f"{tmp_path}/x/../logs/version_0"]
    (tmp_path / "x").mkdir()
    assert tnlayers("fit", *DIGITS, *QUIET, *few, *same) == 0
