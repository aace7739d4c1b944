"""Starting real processes in a test, and what those processes run."""

import json
import os
import signal
import subprocess
import sys
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
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
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


class SaveReplica(Callback):
    """Keeps the weights of each process."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"replica{trainer.global_rank}.pt")


def replica(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"replica{rank}.pt", weights_only=True)


class Signalled(Callback):
    """Sends its own process a signal after a step, which is another one for each process; not in a run that was resumed."""

    def __init__(self, name: str, step: int) -> None:
        self.signal, self.step = getattr(signal, name), step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.resumed = trainer.global_step > 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step + trainer.global_rank and not self.resumed:
            os.kill(os.getpid(), self.signal)


class OddDigits(Digits):
    """33 test pictures: two processes with batches of 16 take two batches each, the last of which is nothing but padding."""

    def load(self, part: Literal["train", "test"]) -> PictureSet:
        every = super().load(part)
        return every if part == "train" else Pictures(*every.__getitems__(range(33)))


if __name__ == "__main__":
    sys.exit(max(main(command) for command in json.loads(Path(sys.argv[1]).read_text())))
