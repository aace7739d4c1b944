"""Going on where a SLURM job's time ran out."""

import signal
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["Requeue"]


class Requeue(Callback):
    """On SIGUSR1 in a SLURM job: saves hpc_ckpt_N.ckpt after the step, puts the job into the queue again, and stops.

    That is what Lightning's handler does, which saves wherever the signal falls: inside of a step, and in each process
    at another place, where they wait for each other for ever. It is not installed where the signal has a handler.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and SLURMEnvironment.detect():
            self._asked = False
            self._before = signal.signal(signal.SIGUSR1, self._ask)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
            self._before = None

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._before is None or not stepped:
            return
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):  # all processes, after the same step
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)  # type: ignore[arg-type]
            raise SIGTERMException
