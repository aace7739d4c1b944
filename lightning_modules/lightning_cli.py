"""fit, validate, test, predict, compress and study, on LightningCLI: every option is checked against the classes' signatures."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_modules.callbacks import (
    Autotune,
    CompressionLog,
    Interruptible,
    PredictionWriter,
    RankSchedule,
    RunCheckpoint,
    RunConfig,
)
from lightning_modules.classifier import ImageClassifier
from lightning_modules.configurations import read_yaml, with_config_paths
from lightning_modules.console import only_what_matters, say, shown_path
from lightning_modules.data import ImageData
from lightning_modules.folders import whole_folder
from lightning_modules.library_errors import made_of_options, refusal_in_a_run
from lightning_modules.loggers import log_config, run_folder
from lightning_modules.model_class import model_options, names_model_class
from lightning_modules.run_folders import begin_run, is_first_process
from lightning_modules.shipped_configs import config_names
from lightning_modules.study import study_folder
from lightning_modules.trainer import CompressionTrainer
from lightning_modules.user_methods import import_methods
from tnlayers import Rule
from tnlayers.checkpoints import read_checkpoint
from tnlayers.errors import UserError
from tnlayers.files import beside, write_files

__all__ = ["TensorCLI", "run"]

_SOME_EPOCHS = " --trainer.max_epochs 15"


class TensorCLI(LightningCLI):
    """LightningCLI with `compress` and `study`; it takes no options from checkpoints, and none that are abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Runs a command, which has what it writes to for itself from before it writes there until it ends.

        Raises:
            UserError: of a library's error as well, where options have caused it.
        """
        with ExitStack() as self._held:
            try:
                super().__init__(*args, **kwargs)
            except (UserError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if refusal := refusal_in_a_run(error):
                    raise refusal from error
                raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer, whose run keeps the configuration as it was given: `last`, not the path that this is now."""
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunConfig):
                callback.config = self._given
        return trainer

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        names = ", ".join(config_names())
        return super().init_parser(epilog=f"-c takes the name of a configuration of the package too: {names}", **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        ours = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "compress": ours, "study": ours}

    def instantiate_classes(self) -> None:
        self.parser.add_instantiator(made_of_options, object, subclasses=True)
        super().instantiate_classes()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.model_class:  # a user's own asks for what it needs
            parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
            parser.link_arguments("data.input_shape", "model.input_shape", apply_on="instantiate")
        parser.add_lightning_class_args(RunCheckpoint, "model_checkpoint")
        parser.set_defaults({"model_checkpoint.save_last": True, "model_checkpoint.save_on_exception": True})
        parser.add_lightning_class_args(RankSchedule, "rank_schedule")
        parser.add_lightning_class_args(Autotune, "autotune")

    def _parse_ckpt_path(self) -> None:
        """Takes no options from a checkpoint: what the command line says holds."""

    def before_instantiate_classes(self) -> None:
        """Fails early, and in one line, on what would fail late in a traceback."""
        config = self.config[self.subcommand]
        if self.model_class is None and self.subcommand in ("compress", "study"):
            raise UserError(
                f"{self.subcommand} takes the nets of ImageClassifier, and --model is {config.model.class_path}: give --model.net, "
                "or compress your module in Python by tnlayers.tensorize"
            )
        rules = model_options(config).get("rules")
        import_methods(rules if isinstance(rules, list) else [])
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
        """Takes the folder of a command, by the first of its processes."""
        out, compress = Path(config.out), self.subcommand == "compress"
        if is_first_process():
            self._held.enter_context(whole_folder(out) if compress else study_folder(out))
        config.out = str(beside(out) if compress else out)
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            folder = logger.init_args.get("save_dir") if isinstance(logger, Namespace) else None
            if folder and (within := os.path.relpath(folder, out)).split(os.sep)[0] != os.pardir:
                logger.init_args.update(Namespace(save_dir=os.path.normpath(Path(config.out, within))))

    def _log_under_root(self, config: Namespace) -> None:
        """Moves logs and checkpoints to a default_root_dir that is given, unless the logger has a folder of its own."""
        if config.trainer.logger in (None, True):  # Lightning's would be one whose runs cannot go on
            config.trainer.logger = self._parser(self.subcommand).get_defaults().trainer.logger
        root, logger = config.trainer.default_root_dir, config.trainer.logger
        if isinstance(logger, Namespace) and logger.init_args.get("save_dir") == "runs" and root:
            logger.init_args.update(Namespace(save_dir=str(root)))

    def _expect_checkpoint(self) -> None:
        """Tells the module, in whose `setup` Lightning does not say that it restores later: decomposing first would be for nothing."""
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

    def after_compress(self) -> None:
        trainer = self.trainer
        assert isinstance(trainer, CompressionTrainer)
        if not trainer.is_global_zero:
            return
        given = yaml.safe_load(self._parser("compress").dump(self._given, skip_unset=False))
        out = Path(self._given.out)
        retraining = retraining_config(given, out, trainer.resolved_rules)
        write_files(Path(self.config.compress.out), {"config.yaml": yaml.safe_dump(retraining, sort_keys=False)})
        self._held.close()
        say(
            f"written     {out}/: model.ckpt, config.yaml, report.md, report.json, plots\n"
            f"retrain     tnlayers fit -c {out}/config.yaml{'' if _ends(retraining['trainer']) else _SOME_EPOCHS}"
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
        say(
            f"written     {out}/: study.jsonl, report.md, report.html, rules.yaml, config.yaml, plots\n"
            f"compress    tnlayers compress -c {out}/config.yaml --checkpoint {self._given.checkpoint} --out {out}/compressed"
        )

    def after_fit(self) -> None:
        saved = self.trainer.checkpoint_callback
        if self.trainer.is_global_zero and isinstance(saved, ModelCheckpoint) and saved.last_model_path:
            path = shown_path(saved.last_model_path)
            say(f"checkpoint  {path}")
            config = Path(saved.last_model_path).parents[1] / "config.yaml"
            if config.is_file() and is_overridden("test_step", self.model):
                say(f"test        tnlayers test -c {shown_path(config)} --ckpt_path {path}")

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            suffix = "csv" if isinstance(self.datamodule, ImageData) else "pt"
            say(f"written     {shown_path(run_folder(self.trainer))}/predictions.{suffix}")


def retraining_config(config: dict[str, Any], out: Path, rules: list[Rule]) -> dict[str, Any]:
    """Returns what `fit` and `test` take to go on from a compression: integer ranks, the new checkpoint, a teacher.

    The teacher is the one that was given, else what was compressed.
    """
    checkpoint = config.pop("checkpoint")
    for key in ("out", "config", "healing"):
        config.pop(key, None)
    config["model"] |= {
        "init_from": str(out / "model.ckpt"),
        "init": "decompose",
        "rules": [rule.to_plain() for rule in rules],
    }
    config["model"]["teacher"] = config["model"].get("teacher") or checkpoint
    return config


def _ends(trainer: dict[str, Any]) -> bool:
    """Returns whether the trainer's options say when to end; Lightning would train 1,000 epochs."""
    return any(trainer[name] not in (None, -1) for name in ("max_epochs", "max_steps", "max_time"))


def run(arguments: list[str]) -> int:
    """Runs one Lightning command; returns the exit code."""
    arguments = with_config_paths(arguments)
    ours = not names_model_class(arguments, read_yaml(arguments))
    with only_what_matters():
        try:
            TensorCLI(
                ImageClassifier if ours else None,
                ImageData if ours else None,
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
                args=arguments,
            )
        except SIGTERMException:
            # A process of Lightning's that ends with an error makes it kill the first one, which may still be writing.
            return 143 if rank_zero_only.rank == 0 else 0  # type: ignore[attr-defined]
        return 0
