"""Callbacks that let a training be stopped at any moment and go on: when it stops, what it saves then, where its log goes on."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.callbacks.replaced_parameters import callbacks_of
from lightning_modules.loggers import CSV
from lightning_modules.seeds import generator_states, set_generator_states
from tnlayers.errors import UserError, as_checkpoint_error

__all__ = ["Interruptible", "RunCheckpoint"]


class RunCheckpoint(ModelCheckpoint):
    """Saves like Lightning's `ModelCheckpoint`, for runs that are stopped and go on in the same folder.

    With `save_on_exception` it writes last.ckpt where a signal ends training, between two steps. Any other exception
    may come in the middle of one (Ctrl-C, memory that runs out) and saves nothing: it could not be resumed exactly.

    A checkpoint has the states of the first process's random generators, so that what a module, its transforms and its loaders
    draw from them goes on from the end of an epoch as it would have. In the middle of an epoch that takes a loader with a
    `state_dict`; Lightning begins the epoch of any other loader anew.
    """

    _save_at_epoch_end = False
    _generators: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Waits for the end of an epoch after its last batch: a run that goes on from there would lose count of its epochs."""
        self._save_at_epoch_end = is_last_batch(trainer)
        if not self._save_at_epoch_end:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._save_at_epoch_end and not self._should_skip_saving_checkpoint(trainer):
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        self._save_at_epoch_end = False
        super().on_train_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException):
            return
        if self._should_save_on_exception(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.save_last is not True:  # a link is no file of its own
                self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
            self._save_last_checkpoint(trainer, candidates)
        if saved := self.last_model_path or self._last_checkpoint_saved:
            rank_zero_info(f"stopped at step {trainer.global_step}; --ckpt_path last goes on from {saved}")
        watching = [each for each in callbacks_of(trainer) if isinstance(each, Interruptible)]
        if trainer.is_global_zero and any(each.requeues for each in watching):
            _requeue()  # last of all: it may end the job at once

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes last.ckpt what training ended with, also where checkpoints are saved every so many steps."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does the same where nothing was left to train: a process killed between two files had not come to last.ckpt."""
        resumed = trainer.ckpt_path and os.path.abspath(trainer.ckpt_path)
        if resumed != os.path.abspath(self.last_model_path):  # what is finished stays as it is
            self.on_train_end(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._generators:
            with as_checkpoint_error(
                "the checkpoint has states of random generators that are not understood", Exception
            ):
                set_generator_states(self._generators)
            self._generators = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"generators": generator_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the files of a folder that goes on for this run's, whatever path it had before."""
        self._generators = state_dict.pop("generators", None)
        folder = str(self.dirpath)
        last = os.path.join(folder, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        goes_on = Path(last).is_file()
        super().load_state_dict(_moved(state_dict, state_dict.get("dirpath"), folder) if goes_on else state_dict)
        if goes_on:  # the state may be older than the file, which would then be followed by last-v1.ckpt
            self.last_model_path = last


def is_last_batch(trainer: Trainer) -> bool:
    """Tells whether the epoch ends with this batch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _moved(state: Any, before: str | None, after: str) -> Any:
    """Returns the state with one folder in place of another in all paths."""
    if isinstance(state, dict):
        return {_moved(key, before, after): _moved(value, before, after) for key, value in state.items()}
    if isinstance(state, str) and before and (state == before or state.startswith(before + os.sep)):
        return after + state.removeprefix(before)
    return state


class Interruptible(Callback):
    """Notes SIGTERM, and in a SLURM job SIGUSR1, which all processes heed after the same step.

    Training then ends as `RunCheckpoint` says; after SIGUSR1, which a job gets before its time runs out, the job is put into
    the queue again too. Lightning's own handlers talk to the other processes from within, while they may be talking of a
    step: that can hang, and what they save may be of the middle of a step.
    """

    def __init__(self) -> None:
        self._sigterm = self._sigusr1 = False
        self.requeues = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(trainer, "stopping"):
            raise UserError(
                "Interruptible needs lightning_modules.trainer.CompressionTrainer, which stops when it says so"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a training that early stopping had ended stay ended, as one does whose epochs or time are over."""
        for each in trainer.early_stopping_callbacks:
            if each.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                trainer.should_stop = True
                rank_zero_info(
                    f"EarlyStopping on {each.monitor} ended this training in epoch {each.stopped_epoch}: nothing is left to train; "
                    "to go on nevertheless leave that callback out"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        same = trainer.strategy.broadcast(trainer.ckpt_path) == trainer.ckpt_path
        if not trainer.strategy.reduce_boolean_decision(same, all=True):
            raise UserError(
                f"--ckpt_path last is not the same in all processes ({trainer.ckpt_path}): another job is writing it"
            )
        self._sigterm = self._sigusr1 = self.requeues = trainer.stopping = False  # type: ignore[attr-defined]
        signal.signal(signal.SIGTERM, self._note_sigterm)  # the trainer puts back the handlers of before
        if SLURMEnvironment.detect():
            signal.signal(signal.SIGUSR1, self._note_sigusr1)
        # Loggers count batches, of which several optimizers make several steps each.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        for logger in trainer.loggers:
            if isinstance(logger, CSV):
                logger.rewind(trainer.global_step if pl_module.automatic_optimization else batches)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends, before training, the processes that this one started, which would wait for it."""
        launcher = trainer.strategy.launcher
        if launcher and isinstance(exception, SystemExit) and not isinstance(exception, SIGTERMException):
            launcher.kill(signal.SIGKILL)

    def _note_sigterm(self, *_: Any) -> None:
        self._sigterm = True

    def _note_sigusr1(self, *_: Any) -> None:
        self._sigusr1 = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Else gradients would be lost, or the count of the epochs.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not is_last_batch(trainer):
            self._agree(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        asked = self._sigterm or self._sigusr1
        trainer.stopping = trainer.strategy.reduce_boolean_decision(asked, all=False)  # type: ignore[attr-defined]
        if trainer.stopping:  # type: ignore[attr-defined]
            self.requeues = trainer.strategy.reduce_boolean_decision(self._sigusr1, all=False)


def _requeue() -> None:
    """Puts this SLURM job into the queue again, as the task of an array that it may be."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"job {job} could not be put into the queue again: {error}; start it by the same command")
