"""fit, validate, test, predict, compress and study, on LightningCLI: every option is checked against the classes' signatures."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from lightning_modules.callbacks import (
    CompressionLog,
    Interruptible,
    PredictionWriter,
    RankSchedule,
    RunCheckpoint,
    RunConfig,
)
from lightning_modules.callbacks.replaced_parameters import keeps_whole_parameters
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.classifier import ImageClassifier
from lightning_modules.compression import compress
from lightning_modules.configurations import check_yaml
from lightning_modules.console import progress_bar
from lightning_modules.data import ImageData
from lightning_modules.errors import OURS, is_bug
from lightning_modules.folders import whole_folder
from lightning_modules.loggers import log_config, run_folder
from lightning_modules.processes import check_processes
from lightning_modules.run_folders import begin_run, is_first_process
from lightning_modules.study import (
    JOURNAL,
    Protocol,
    Subject,
    log_study,
    read_rows,
    run_study,
    study_folder,
    summary,
    write_report,
)
from lightning_modules.user_methods import import_methods
from tnlayers import CheckpointError, Rule
from tnlayers.checkpoints import read_checkpoint
from tnlayers.errors import UserError
from tnlayers.files import beside, write_files

__all__ = ["CompressionTrainer", "TensorCLI", "run"]

_CHECKPOINTS = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_HARMLESS = (
    ".*LeafSpec.*",  # Lightning's own use of torch
    ".*does not have many workers.*",  # pictures in memory need none
    "Total length of `list` across ranks is zero",  # val_fraction: 0
    ".*is smaller than the logging interval.*",  # metrics are logged by epoch
    "You requested to overfit",  # Lightning's words on samplers that are not its own
    "It is recommended to use `self.log.'(compress/|train/lr)",  # the same in every process
    "The dirpath has changed from",  # a test of a checkpoint writes none
    "Checkpoint directory .* exists and is not empty",
)

_LIBRARIES = {"lightning", "pytorch_lightning", "torch"}
_SOME_EPOCHS = " --trainer.max_epochs 15"


class CompressionTrainer(Trainer):
    """Lightning's trainer, with checkpoints that are whole or not there; the signature of `compress` makes the command's options."""

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
        """Lightning takes any number for these, and divides by zero in the middle of training."""
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
        super().__init__(*args, **numbers, **kwargs)
        plugins = kwargs.get("plugins") or ()
        given = any(isinstance(each, CheckpointIO) for each in (plugins if isinstance(plugins, list) else [plugins]))
        if keeps_whole_parameters(self.strategy) and not given:
            self.strategy.checkpoint_io = AtomicCheckpointIO()

    @property
    def received_sigterm(self) -> bool:
        """Whether to stop here; not in the middle of a validation, which could not be resumed exactly."""
        if self.state.fn != TrainerFn.FITTING:
            return super().received_sigterm
        return self.stopping and not self.validating

    def compress(
        self, model: ImageClassifier, datamodule: ImageData, checkpoint: str, out: str = "runs/compressed"
    ) -> None:
        """Compresses a checkpoint by the model's rules.

        Args:
            model: the net and the rules.
            datamodule: gives pictures to calibrate and to test with.
            checkpoint: dense, or tensorized to compress it further: .pt, .pth, .th, .ckpt or .safetensors.
            out: a new folder for model.ckpt, config.yaml (for fit and test), report.md, report.json and the plots.
        """
        found = compress(model, datamodule, self, checkpoint, Path(out))
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
        _say(f"from        {checkpoint}: {subject.loaded}")
        _say(f"studied     {len(subject.kernels)} of the net's layers, {subject.covered:.1%} of its parameters")
        if path.is_file() and (begun := read_rows(path)):
            _say(f"goes on     after {len(begun)} rows of {path}")
        try:
            with progress_bar(Console(stderr=True)) as progress:
                rows = run_study(subject, path, progress)
        except KeyboardInterrupt:
            _say(f"stopped     {path} has what was measured; the same command goes on", stderr=True)
            raise
        write_report(rows, Path(out))
        log_study(self.loggers, rows, Path(out))
        for line in summary(rows):
            _say(line)


class TensorCLI(LightningCLI):
    """LightningCLI with `compress` and `study`, and without what bites: no options from checkpoints, no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """What the command writes to is its own, from before it writes there until the command ends."""
        with ExitStack() as self._held:
            super().__init__(*args, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The run keeps the configuration as it was given: `last`, not the path that this is now."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except Exception as error:  # devices that are no number, a precision that needs a library, two progress bars
            if is_bug(error):
                raise
            raise UserError(f"the trainer cannot be made of its options (--trainer): {error}") from error
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunConfig):
                callback.config = self._given
        return trainer

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        ours = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "compress": ours, "study": ours}

    def instantiate_classes(self) -> None:
        self.parser.add_instantiator(_made, object, subclasses=True)
        super().instantiate_classes()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.input_shape", "model.input_shape", apply_on="instantiate")
        parser.add_lightning_class_args(RunCheckpoint, "model_checkpoint")
        parser.set_defaults({"model_checkpoint.save_last": True, "model_checkpoint.save_on_exception": True})
        parser.add_lightning_class_args(RankSchedule, "rank_schedule")

    def _parse_ckpt_path(self) -> None:
        """Not from the checkpoint: what the command line says holds."""

    def before_instantiate_classes(self) -> None:
        """Fails early, and in one line, on what would fail late in a traceback."""
        config = self.config[self.subcommand]
        import_methods(config.model.rules or [])
        self._log_under_root(config)
        self._given = config.clone()
        if self.subcommand in ("compress", "study"):
            read_checkpoint(config.checkpoint)
            self._take_folder(config)
            logger = config.trainer.logger
            if isinstance(logger, Namespace) and logger.class_path.endswith(("CSVLogger", "loggers.CSV")):
                # All that the command writes is in one folder.
                logger.init_args.update(Namespace(save_dir=config.out, name="logs", version=""))
            return
        begin_run(config, self._held, training=self.subcommand == "fit")

    def _take_folder(self, config: Namespace) -> None:
        """Of the processes of a command the first one takes its folder."""
        out, compress = Path(config.out), self.subcommand == "compress"
        if is_first_process():
            self._held.enter_context(whole_folder(out) if compress else study_folder(out))
        config.out = str(beside(out) if compress else out)
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            folder = logger.init_args.get("save_dir") if isinstance(logger, Namespace) else None
            if folder and (within := os.path.relpath(folder, out)).split(os.sep)[0] != os.pardir:
                logger.init_args.update(Namespace(save_dir=os.path.normpath(Path(config.out, within))))

    def _expect_checkpoint(self) -> None:
        """Lightning restores after `setup`, and does not say there that it will: decomposing first would be for nothing."""
        path = self.config[self.subcommand].get("ckpt_path")
        late = self.trainer.strategy.restore_checkpoint_after_setup  # the optimizer is then made of what `setup` leaves
        self.model.awaits_checkpoint = path not in (None, "best", "hpc") and not late

    before_validate = before_test = before_predict = _expect_checkpoint

    def before_fit(self) -> None:
        if self.config["fit"].trainer.sync_batchnorm and isinstance(self.trainer.accelerator, CPUAccelerator):
            raise UserError(
                "sync_batchnorm works on GPUs and this run is on the CPU: leave --trainer.sync_batchnorm out, or give "
                "--trainer.accelerator gpu"
            )
        self._expect_checkpoint()

    def _log_under_root(self, config: Namespace) -> None:
        """A given default_root_dir takes the logs and checkpoints along, unless the logger has a folder of its own."""
        if config.trainer.logger in (None, True):  # Lightning's would be one whose runs cannot go on
            config.trainer.logger = self._parser(self.subcommand).get_defaults().trainer.logger
        root, logger = config.trainer.default_root_dir, config.trainer.logger
        if isinstance(logger, Namespace) and logger.init_args.get("save_dir") == "runs" and root:
            logger.init_args.update(Namespace(save_dir=str(root)))

    def after_compress(self) -> None:
        trainer = self.trainer
        assert isinstance(trainer, CompressionTrainer)
        if not trainer.is_global_zero:
            return
        given = yaml.safe_load(self._parser("compress").dump(self._given, skip_unset=False))
        out = Path(self._given.out)
        resolved = resolved_config(given, out, trainer.resolved_rules)
        write_files(Path(self.config.compress.out), {"config.yaml": yaml.safe_dump(resolved, sort_keys=False)})
        self._held.close()
        _say(
            f"written     {out}/: model.ckpt, config.yaml, report.md, report.json, plots\n"
            f"retrain     tnlayers fit -c {out}/config.yaml{'' if _ends(resolved['trainer']) else _SOME_EPOCHS}"
        )

    def after_study(self) -> None:
        text = self._parser("study").dump(self._given, skip_unset=False)
        for logger in self.trainer.loggers:
            log_config(logger, "cli", text)
        given = yaml.safe_load(text)
        out = Path(given["out"])
        if not _ends(given["trainer"]):
            given["trainer"]["max_epochs"] = given["protocol"]["epochs"] or None
        for key in ("checkpoint", "out", "config", "protocol"):
            given.pop(key, None)
        given["model"]["rules"] = yaml.safe_load((out / "rules.yaml").read_text())["model"]["rules"]
        write_files(out, {"config.yaml": yaml.safe_dump(given, sort_keys=False)})
        _say(
            f"written     {out}/: study.jsonl, report.md, report.html, rules.yaml, config.yaml, plots\n"
            f"compress    tnlayers compress -c {out}/config.yaml --checkpoint {self._given.checkpoint} --out {out}/compressed"
        )

    def after_fit(self) -> None:
        saved = self.trainer.checkpoint_callback
        if self.trainer.is_global_zero and isinstance(saved, ModelCheckpoint) and saved.last_model_path:
            path = _shown(saved.last_model_path)
            _say(f"checkpoint  {path}")
            if (config := Path(saved.last_model_path).parents[1] / "config.yaml").is_file():
                command = f"tnlayers test -c {_shown(str(config))} --ckpt_path {path}"
                _say(f"test        {command}")

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            folder = _shown(str(run_folder(self.trainer)))
            _say(f"written     {folder}/predictions.csv")


def resolved_config(config: dict[str, Any], out: Path, rules: list[Rule]) -> dict[str, Any]:
    """What `fit` and `test` take to go on from a compression: integer ranks, the new checkpoint, a teacher.

    The teacher is the given one, else what was compressed.
    """
    checkpoint = config.pop("checkpoint")
    for key in ("out", "config"):
        config.pop(key, None)
    config["model"] |= {
        "init_from": str(out / "model.ckpt"),
        "init": "decompose",
        "rules": [rule.to_plain() for rule in rules],
    }
    config["model"]["teacher"] = config["model"].get("teacher") or checkpoint
    return config


def _made(kind: type, *args: Any, **options: Any) -> Any:
    """An object of a class; what a library's does not take is an error of whoever gave the options, as is what another refuses."""
    try:
        return kind(*args, **options)
    except Exception as error:
        package = kind.__module__.partition(".")[0]
        if package in OURS or is_bug(error, *{package} - _LIBRARIES):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise UserError(f"{kind.__name__} cannot be made with the options {given}: {error}") from error


def _ends(trainer: dict[str, Any]) -> bool:
    """Whether it says when to end; Lightning would train 1,000 epochs."""
    return any(trainer[name] not in (None, -1) for name in ("max_epochs", "max_steps", "max_time"))


def _no_advertising(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _say(text: str, *, stderr: bool = False) -> None:
    """As it is: no colours for numbers, no markup, no line broken where it is to be copied."""
    Console(stderr=stderr).print(text, highlight=False, markup=False, soft_wrap=True)


def _shown(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def run(arguments: list[str]) -> int:
    """Runs one Lightning command; returns the exit code."""
    check_yaml(arguments)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertising)
    with _shown_progress(), warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        warnings.showwarning = _one_line
        return _run(arguments)


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning without the file and the line of code that it comes from."""
    print(f"tnlayers: warning: {' '.join(str(message).split())}", file=file or sys.stderr)


@contextmanager
def _shown_progress() -> Iterator[None]:
    """What the layers log while they are fitted, on stderr and there alone."""
    logger, handler = logging.getLogger("tnlayers"), logging.StreamHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _restored(error: BaseException) -> str:
    """The checkpoint that Lightning was taking a run's state from when an error came; empty if it was not."""
    place = error.__traceback__
    while place is not None:
        frame = place.tb_frame
        if frame.f_code.co_name.startswith("restore") and frame.f_globals["__name__"] == _CHECKPOINTS:
            return str(frame.f_locals["self"].trainer.ckpt_path)
        place = place.tb_next
    return ""


def _run(arguments: list[str]) -> int:
    try:
        TensorCLI(
            ImageClassifier,
            ImageData,
            subclass_mode_data=True,
            trainer_class=CompressionTrainer,
            trainer_defaults={
                "callbacks": [Interruptible(), CompressionLog(), PredictionWriter()],
                "logger": {
                    "class_path": "lightning_modules.loggers.CSV",
                    "init_args": {"save_dir": "runs", "name": "logs"},
                },
                "default_root_dir": "runs",
            },
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False, "prog": "tnlayers"},
            # Processes that Lightning starts run the same command line again, so it has to come from there.
            args=None if arguments == sys.argv[1:] else arguments,
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and (path := _restored(error)):
            raise CheckpointError(
                f"{path} cannot be resumed ({type(error).__name__}: {error}); start from its weights instead: "
                f"--model.init_from {path}"
            ) from error
        raise
    except SIGTERMException:
        # A process of Lightning's that ends with an error makes it kill the first one, which may still be writing.
        return 143 if rank_zero_only.rank == 0 else 0  # type: ignore[attr-defined]
    return 0
