"""Commands on the digits that are killed with SIGKILL at drawn moments and started again; `check` states the laws.

    python -m tests.killed_commands compress --kills 20 --seed 0
    python -m tests.killed_commands fit --kills 20 --seed 0

Counts how they went on, and lists the kills after which a law was broken.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_modules.locks import LOCK
from tests.commands import DIGITS, QUIET, weights
from tests.processes import Fork, Forks
from tests.tolerances import EXACT
from tnlayers import CheckpointError
from tnlayers.checkpoints import read_checkpoint

__all__ = ["RULES", "STEPS", "Job", "check", "compress", "fit", "run_whole"]

RULES = ["--model.rules", "[{pattern: conv3, method: Tucker, rank: 8}]"]
COMPRESSED = {"model.ckpt", "config.yaml", "report.md", "report.json", "layers.png", "accuracy.png", "logs"}
EPOCHS, STEPS = 4, 21  # an epoch of the digits has 21 steps
ENDED_BEFORE = "ended before the kill"


@dataclass(frozen=True)
class Job:
    """A command, and how its end is known."""

    arguments: list[str]
    result: Callable[[Path], Path | None]
    """The checkpoint of the whole result in this folder; None where there is no result yet."""
    again: int
    """The exit code where there is one."""
    said_again: str
    """What the command says then."""


def compress(dense: Path) -> Job:
    arguments = ["compress", *DIGITS, *RULES, *QUIET, "--checkpoint", str(dense), "--out", "out"]
    return Job(arguments, _compressed, 2, "tnlayers: error: out already holds a run; give another --out")


def fit() -> Job:
    arguments = ["fit", *DIGITS, *RULES, *QUIET, "--trainer.max_epochs", str(EPOCHS), "--ckpt_path", "last"]
    return Job(arguments, _trained, 0, "Restored all states from the checkpoint at ")


def _compressed(folder: Path) -> Path | None:
    out = folder / "out"
    if not out.exists():
        return None
    found = {path.name for path in out.iterdir()} - {LOCK}
    assert found == COMPRESSED, f"out holds {sorted(found)}"
    return out / "model.ckpt"


def _trained(folder: Path) -> Path | None:
    """Of the run that got to the last step; an epoch is in its log once."""
    last = next((path for path in folder.rglob("last.ckpt") if _steps(path) == EPOCHS * STEPS), None)
    if last is None:
        return None
    with open(last.parents[1] / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    validated, trained = ([int(row["epoch"]) for row in rows if row[name]] for name in ("val/accuracy", "train/loss"))
    assert validated == list(range(EPOCHS)), f"the log has validations of the epochs {validated}"
    # Lightning logs an epoch's training after its checkpoint: the row of an epoch with a kill between them is lost.
    assert trained == sorted(set(trained)), f"the log has trainings of the epochs {trained}"
    return last


def _steps(path: Path) -> int:
    return read_checkpoint(path)["global_step"]


def run_whole(job: Job, forks: Forks, folder: Path) -> tuple[float, Path]:
    """The seconds of a run that nobody kills, and its checkpoint."""
    begin = time.monotonic()
    _run(job, forks, folder, 0)
    seconds, path = time.monotonic() - begin, job.result(folder)
    assert path is not None, "exit code 0 without a result"
    return seconds, path


def _run(job: Job, forks: Forks, folder: Path, code: int) -> Fork:
    fork = forks.start(job.arguments, folder)
    found = fork.wait()
    assert found == code, f"exit code {found} and not {code}: {fork.said[-2000:]}"
    assert "Traceback" not in fork.said, fork.said[-2000:]
    return fork


def check(job: Job, forks: Forks, folder: Path, moment: float, whole: Path) -> str:
    """Kills a job after so many seconds, and runs it again.

    The laws:
    - After the kill whatever has a name is whole: each checkpoint can be read, and a result is there in whole or not at all.
    - The same command then ends with exit code 0, and with the weights of a run that nobody has killed, bit for bit.
    - Where there is a result it changes nothing: `compress` refuses with exit code 2 and one line, `fit` has nothing to train.
    - Nothing that is hidden, a lock or half a file, remains beside the result or in it.

    Args:
        job: what is run.
        forks: runs it.
        folder: an empty one.
        moment: seconds until it is killed.
        whole: the checkpoint of `run_whole`.

    Returns:
        How it went on.

    Raises:
        AssertionError, CheckpointError: a law is broken.
    """
    fork = forks.start(job.arguments, folder)
    time.sleep(moment)
    with suppress(ProcessLookupError):  # it may have ended by itself
        fork.kill()
    killed = fork.wait()
    assert killed in (0, -9), f"exit code {killed} of the first run: {fork.said[-2000:]}"
    for path in folder.rglob("[!.]*.ckpt"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            read_checkpoint(path)
    outcome = ENDED_BEFORE if killed == 0 else "had a whole result"
    if job.result(folder) is None:
        again = _run(job, forks, folder, 0)
        outcome = "went on" if job.said_again in again.said else "began anew"
    result = job.result(folder)
    assert result is not None, "exit code 0 without a result"
    torch.testing.assert_close(weights(result), weights(whole), **EXACT)
    before = result.read_bytes()
    said = _run(job, forks, folder, job.again).said
    assert job.said_again in said, said[-2000:]
    assert job.result(folder) == result, f"{result} is not the result any more"
    assert result.read_bytes() == before, f"{result} was written again"
    # A run that was killed before its first checkpoint stays as a record where it has more than its lock.
    given_up = [path for path in folder.rglob("version_*") if path not in result.parents]
    left = [path for path in folder.rglob(".*") if not any(path.is_relative_to(run) for run in given_up)]
    assert not left, f"left behind: {left}"
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compress", "fit"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, counts, broken = random.Random(given.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as temporary, Forks() as forks:
        folder = Path(temporary)
        (folder / "whole").mkdir()
        few = ["--trainer.max_epochs", "1", "--trainer.logger", "false", "--trainer.default_root_dir", "dense"]
        assert forks.start(["fit", *DIGITS, *QUIET, *few], folder).wait() == 0
        job = fit() if given.command == "fit" else compress(folder / "dense/checkpoints/last.ckpt")
        seconds, whole = run_whole(job, forks, folder / "whole")
        tries = 0
        while counts.total() - counts[ENDED_BEFORE] + broken < given.kills:
            tries += 1
            place, moment = folder / str(tries), rng.uniform(0.02, 1) * seconds
            place.mkdir()
            try:
                outcome = check(job, forks, place, moment, whole)
            except (AssertionError, CheckpointError) as error:
                broken += 1
                print(f"killed after {moment:.2f} s: {error}", flush=True)
                continue
            counts[outcome] += 1
            if outcome == ENDED_BEFORE:  # the machine has got faster
                seconds = moment
    shown = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    print(f"{given.kills} kills of {given.command} from seed {given.seed}, {broken} broke a law; {shown}")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
