"""Starting real processes in a test, and what those processes run."""

import atexit
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

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


HANGING = 1200.0
"""Seconds after which a process hangs, on a machine that does much else beside."""


def finish(process: "subprocess.Popen[str]", timeout: float = HANGING) -> tuple[int, str]:
    """The exit code and the last of what a process said; none of its processes outlives the timeout."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said[-3000:]


class Forks:
    """A process that has imported everything and forks for each command: seconds sooner there than a new process.

    Use as a context, and start one command after the other.
    """

    running: "Fork | None" = None

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # or a line could hide from select in a buffer
            cwd=ROOT,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait(HANGING)

    def start(self, arguments: Sequence[object], folder: Path, *, largest_file: int = -1, **environment: str) -> "Fork":
        """Runs `tnlayers` with these arguments in `folder`; what it says goes to said.txt there.

        `largest_file` limits what it can write, in bytes.
        """
        if self.running:  # a test that failed has left it
            self.running.kill()
            self.running.wait()
        job = [[str(argument) for argument in arguments], str(folder), largest_file, environment]
        assert self._server.stdin is not None
        self._server.stdin.write(f"{json.dumps(job)}\n".encode())
        self.running = Fork(int(self.answer(HANGING)), folder / "said.txt", self)
        return self.running

    def answer(self, timeout: float) -> str:
        assert self._server.stdout is not None
        assert select.select([self._server.stdout], [], [], timeout)[0], f"no answer in {timeout} s"
        return self._server.stdout.readline().decode()


class Fork:
    """A command that runs in a process of its own, to be waited for or killed."""

    def __init__(self, pid: int, output: Path, forks: Forks) -> None:
        self.pid, self._output, self._forks = pid, output, forks

    @property
    def said(self) -> str:
        return self._output.read_text() if self._output.is_file() else ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = HANGING) -> int:
        """The exit code; minus the signal's number where one has ended it."""
        code = int(self._forks.answer(timeout))
        self._forks.running = None
        return code

    def until(self, happened: Callable[[], object], timeout: float = HANGING) -> Self:
        """Waits for something that the command does."""
        end = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < end, f"not in {timeout} s: {self.said[-2000:]}"
            os.kill(self.pid, 0)
            time.sleep(0.01)
        return self


def serve() -> None:
    """What `Forks` starts: a command a line on stdin; its process and then its exit code on stdout."""
    for line in sys.stdin:
        arguments, folder, largest_file, environment = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            os.environ.update(environment)
            os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            sys.argv = ["tnlayers", *arguments]
            os._exit(_exit_code())
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _exit_code() -> int:
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    return code


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


class Signalled(Callback):
    """Sends its own process a signal after a step, which is another one for each process; not in a run that was resumed."""

    def __init__(self, name: str, step: int) -> None:
        self.signal, self.step = getattr(signal, name), step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.resumed = trainer.global_step > 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step + trainer.global_rank and not self.resumed:
            os.kill(os.getpid(), self.signal)


class KilledAtSave(Callback):
    """Kills its own process once a checkpoint of this name and step is written, before anything else is."""

    def __init__(self, name: str, step: int) -> None:
        self.name, self.step = name, step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        files = trainer.strategy.checkpoint_io
        save = files.save_checkpoint

        def save_and_die(checkpoint: dict[str, Any], path: str, *options: Any, **more: Any) -> None:
            save(checkpoint, path, *options, **more)
            if checkpoint["global_step"] == self.step and Path(path).name.startswith(self.name):
                os.kill(os.getpid(), signal.SIGKILL)

        files.save_checkpoint = save_and_die  # type: ignore[method-assign]


class OddDigits(Digits):
    """33 test pictures: two processes with batches of 16 take two batches each, the last of which is nothing but padding."""

    def load(self, part: Literal["train", "test"]) -> PictureSet:
        every = super().load(part)
        return every if part == "train" else Pictures(*every.__getitems__(range(33)))


if __name__ == "__main__" and len(sys.argv) == 1:
    import lightning_modules.lightning_cli  # noqa: F401

    serve()
elif __name__ == "__main__":
    sys.exit(max(main(command) for command in json.loads(Path(sys.argv[1]).read_text())))
