"""Starting real processes in a test, and what those processes run."""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.cli import main
from lightning_modules.data import Digits
from lightning_modules.data.pictures import Pictures, PictureSet

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MODULE = ["-m", "lightning_modules.cli"]
COMMAND = [sys.executable, *MODULE]


def start(command: Sequence[object], folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """Starts a command in `folder`, with this checkout's code and one thread."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [str(argument) for argument in command],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", timeout: float = 90) -> tuple[int, str]:
    """The exit code and the last of what a process said; none of its processes outlives the timeout."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said[-3000:]


class ForkServer:
    """A process that has imported everything, and forks a child for each command: one that can be killed costs no imports."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", "from tests.processes import serve; serve()"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **pipes)

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: Any) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

    def run(self, command: Sequence[object], log: Path, kill_after: float | None = None) -> int:
        """The exit code, negative for a signal; SIGKILL comes after so many seconds, and whatever hangs is killed too."""
        job = {"command": [str(argument) for argument in command], "log": str(log), "kill_after": kill_after or 90}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())


def serve() -> None:
    """Runs the commands that come as lines of JSON, and answers each with its exit code."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        if (child := os.fork()) == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                code = main(job["command"])
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)
        alarm = threading.Timer(job["kill_after"], os.kill, (child, signal.SIGKILL))
        alarm.start()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        alarm.cancel()
        print(code, file=answers, flush=True)


class SaveReplica(Callback):
    """Keeps the weights of each process."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"replica{trainer.global_rank}.pt")


class Watch(Callback):
    """Writes which parameters the steps of each epoch left as they were, once it has checked what the optimizer holds."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.still: dict[int, list[str]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = dict(pl_module.named_parameters())
        self.still[trainer.current_epoch] = [name for name in now if torch.equal(now[name], self.before[name])]
        held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in now.values()]
        assert {id(p) for p in trainer.optimizers[0].state} <= {id(p) for p in held}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.folder / f"still{trainer.global_rank}.json").write_text(json.dumps(self.still))


def replica(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"replica{rank}.pt", weights_only=True)


class Preempted(Callback):
    """Sends its own process a cluster's signals after a number of steps, unless it has been through that already."""

    def __init__(self, step: int, signals: list[str], folder: str) -> None:
        self.step, self.signals, self.mark = step, signals, Path(folder) / "preempted"

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            for name in self.signals:
                os.kill(os.getpid(), getattr(signal, name))


class OddDigits(Digits):
    """33 test pictures: two processes with batches of 16 take two batches each, the last of which is nothing but padding."""

    def load(self, part: Literal["train", "test"]) -> PictureSet:
        every = super().load(part)
        return every if part == "train" else Pictures(*every.__getitems__(range(33)))


if __name__ == "__main__":
    sys.exit(max(main(command) for command in json.loads(Path(sys.argv[1]).read_text())))
