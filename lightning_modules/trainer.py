"""Lightning's trainer as the commands use it."""

from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from lightning_modules.callbacks.autotune import Autotune
from lightning_modules.callbacks.replaced_parameters import keeps_whole_parameters
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.classifier import ImageClassifier
from lightning_modules.compression import compress
from lightning_modules.console import progress_bar, say
from lightning_modules.data import ImageData
from lightning_modules.healing import Healing
from lightning_modules.processes import check_processes
from lightning_modules.restoring import Restoring
from lightning_modules.study import JOURNAL, Protocol, Subject, log_study, read_rows, run_study, summary, write_report
from tnlayers import Rule
from tnlayers.errors import UserError

__all__ = ["CompressionTrainer"]


class CompressionTrainer(Trainer):
    """Lightning's trainer, which writes checkpoints whole or not at all, says which one does not fit, compresses and studies.

    The signatures of `compress` and `study` are those commands' options.
    """

    resolved_rules: list[Rule]
    """What the last `compress` resolved the rules to."""

    stopping = False
    """Whether the processes have agreed to stop training after this step."""

    def __init__(
        self,
        *args: Any,
        accumulate_grad_batches: PositiveInt = 1,
        check_val_every_n_epoch: PositiveInt | None = 1,
        gradient_clip_val: NonNegativeFloat | None = None,
        val_check_interval: int | float | str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Narrows the types of the arguments that it names: Lightning takes any number, and divides by zero while it trains."""
        if isinstance(val_check_interval, (int, float)) and not val_check_interval > 0:
            raise UserError(
                f"val_check_interval {val_check_interval}: expected a number of batches, or a part of an epoch, above 0"
            )
        devices = str(kwargs.get("devices"))
        # Of other devices there are only so many.
        if kwargs.get("accelerator", "auto") in ("auto", "cpu") and devices.isdecimal():
            check_processes("trainer.devices", int(devices))
        numbers = {
            "accumulate_grad_batches": accumulate_grad_batches,
            "check_val_every_n_epoch": check_val_every_n_epoch,
            "gradient_clip_val": gradient_clip_val,
            "val_check_interval": val_check_interval,
        }
        try:
            super().__init__(*args, **numbers, **kwargs)
        except Exception as error:  # devices that are no number, a precision that needs a library, two progress bars
            raise UserError(f"the trainer cannot be made of its options (--trainer): {error}") from error
        self._checkpoint_connector = Restoring(self)
        plugins = kwargs.get("plugins") or ()
        given = any(isinstance(each, CheckpointIO) for each in (plugins if isinstance(plugins, list) else [plugins]))
        if keeps_whole_parameters(self.strategy) and not given:
            self.strategy.checkpoint_io = AtomicCheckpointIO()

    @property
    def received_sigterm(self) -> bool:
        """Says whether to stop here; not in the middle of a validation, which could not be resumed exactly."""
        if self.state.fn != TrainerFn.FITTING:
            return super().received_sigterm
        return self.stopping and not self.validating

    def compress(
        self,
        model: ImageClassifier,
        datamodule: ImageData,
        checkpoint: str,
        out: str = "runs/compressed",
        healing: Healing = Healing(),  # noqa: B008  (frozen)
    ) -> None:
        """Compresses a checkpoint by the model's rules.

        Args:
            model: the net and the rules.
            datamodule: gives pictures to calibrate and to test with.
            checkpoint: dense, or tensorized to compress it further: .pt, .pth, .th, .ckpt or .safetensors.
            out: a new folder for model.ckpt, config.yaml (for fit and test), report.md, report.json and the plots.
            healing: how the compressed net learns from the dense one without labels.
        """
        tunes = any(isinstance(each, Autotune) and each.measures(self) for each in self.callbacks)  # type: ignore[attr-defined]
        found = compress(model, datamodule, self, checkpoint, Path(out), tunes=tunes, healing=healing)
        if self.is_global_zero:
            found.report.show(Console())
        self.resolved_rules = found.rules

    def study(
        self,
        model: ImageClassifier,
        datamodule: ImageData,
        checkpoint: str,
        out: str = "runs/study",
        protocol: Protocol = Protocol(),  # noqa: B008  (frozen)
    ) -> None:
        """Truncates a trained net's layers along every cut, alone and together, and retrains: how compressible is it?

        Args:
            model: the net, and how it is retrained; its rules are not used.
            datamodule: gives the test pictures to evaluate on and the training pictures.
            checkpoint: of the dense net: .pt, .pth, .th, .ckpt or .safetensors.
            out: a folder for study.jsonl, report.md, report.html, rules.yaml, config.yaml and the plots; a study that is there goes on.
            protocol: what is measured.
        """
        subject, path = Subject(model, datamodule, self, checkpoint, protocol), Path(out) / JOURNAL
        say(f"from        {checkpoint}: {subject.loaded}")
        say(f"studied     {len(subject.kernels)} of the net's layers, {subject.covered:.1%} of its parameters")
        if path.is_file() and (begun := read_rows(path)):
            say(f"goes on     after {len(begun)} rows of {path}")
        try:
            with progress_bar(Console(stderr=True)) as progress:
                rows = run_study(subject, path, progress)
        except KeyboardInterrupt:
            say(f"stopped     {path} has what was measured; the same command goes on", stderr=True)
            raise
        write_report(rows, Path(out))
        log_study(self.loggers, rows, Path(out))
        for line in summary(rows):
            say(line)
