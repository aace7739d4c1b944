"""The folders of runs: which one a run writes to, and from which one `--ckpt_path last` takes its checkpoint.

A run's checkpoints are in <save_dir>/<name>/<version>/checkpoints, in <default_root_dir>/checkpoints where nothing is
logged, or where `model_checkpoint.dirpath` says.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_modules.locks import claimed, first_unused, is_abandoned
from tnlayers import CheckpointError
from tnlayers.checkpoints import read_checkpoint
from tnlayers.errors import UserError, shortened

__all__ = ["begin_run", "newest_checkpoint"]

_NET = ("net", "net_options", "rules")
_ROOT = "--trainer.default_root_dir"
_NUMBERED = ("CSVLogger", "loggers.CSV", "TensorBoardLogger")
_OURS = {"state_dict", "pytorch-lightning_version", "global_step"}


@dataclass(frozen=True)
class _Saved:
    """A checkpoint that can be read; those of more steps come later."""

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.content["global_step"])

    @property
    def order(self) -> tuple[int, bool, float]:
        return self.step, self.path.name == "last.ckpt", self.path.stat().st_mtime

    def values(self, name: str) -> dict[Any, Any]:
        """Returns a mapping of the file, which may be anything; empty where it is none."""
        found = self.content.get(name)
        return found if isinstance(found, dict) else {}


def begin_run(config: Namespace, held: ExitStack, *, training: bool) -> None:
    """Settles which checkpoint a run takes and where it is kept: in folders that are its own until `held` is closed.

    Of several processes the first one takes them, and writes there. A job that goes on from `last` takes what holds the runs
    as well, so that no other one does so meanwhile.

    Raises:
        FolderInUse: another job has one of them.
        UserError: as the functions below.
    """
    _check_writable(config)
    first = is_first_process() and not config.trainer.fast_dev_run
    last, home = config.get("ckpt_path") == "last", _home(config)
    own = training and (last or bool(config.model_checkpoint.dirpath) or not _loggers(config))
    if first and own:
        held.enter_context(claimed(home, _ROOT))
    if last:
        _continue_last(config, training=training)
    elif config.get("ckpt_path") not in (None, "best", "hpc"):
        _check_own(config.ckpt_path)
    if first:
        new = training and not last and not config.get("ckpt_path")
        _claim_versions(config, held, {os.path.realpath(home)} if own else set(), new=new)


def is_first_process() -> bool:
    """Tells before the trainer knows; of Lightning's several nodes the first process of each would hold itself for the first."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return rank_zero_only.rank == 0 and node in ("", "0")  # type: ignore[attr-defined]


def _claim_versions(config: Namespace, held: ExitStack, taken: set[str], *, new: bool) -> None:
    """Takes each logger's folder; a new run gets a number that no other one has, even one that starts at the same moment.

    Raises:
        UserError: a new run would write over another one.
    """
    for logger in _loggers(config):
        given, name = logger.init_args, _logger_home(config, logger)
        version = given.get("version")
        if version is None and logger.class_path.endswith(_NUMBERED):
            folder = held.enter_context(first_unused(_new_versions(name), _ROOT))
            given.version = int(folder.name.removeprefix("version_"))
        elif version is not None:
            folder = _version_folder(name, version)
            if new and version != "" and ((folder / "metrics.csv").exists() or any(folder.glob("checkpoints/*.ckpt"))):
                raise UserError(
                    f"{folder} holds a run already; go on with it by --ckpt_path last, or give another version"
                )
            if os.path.realpath(folder) not in taken:
                held.enter_context(claimed(folder, _ROOT))
        else:
            continue
        taken.add(os.path.realpath(folder))


def _new_versions(home: Path) -> Iterator[Path]:
    """Returns version_<n> for the numbers after the last one that is there; what was only locked may be free again."""
    there = (path for path in home.glob("version_*") if not is_abandoned(path))
    found = [re.fullmatch(r"version_(\d+)", path.name) for path in there]
    start = max((int(each[1]) for each in found if each), default=-1) + 1
    return (home / f"version_{number}" for number in count(start))


def _continue_last(config: Namespace, *, training: bool) -> None:
    """Puts a path in the place of `last`; a training goes on in the folder of its run, with the same loggers' versions.

    Where there is no checkpoint yet a training starts from the beginning, so that a job's command is always the same.

    Raises:
        UserError: there is none to evaluate.
    """
    found = newest_checkpoint(_folders(config))
    if found is None:
        said = f"--ckpt_path last: no checkpoint in {_home(config)} yet"
        if not training:
            raise UserError(f"{said}; train first, or give the path of one")
        rank_zero_info(f"{said}; training starts from the beginning")
    elif training:
        if "class_path" not in config.model:
            _check_same_net(found, config)
        for place, logger in enumerate(_loggers(config)):
            folder = found.path.parents[1].name if place == 0 and not config.model_checkpoint.dirpath else None
            version = found.values("logger_versions").get(logger.class_path.rpartition(".")[2], folder)
            if isinstance(version, int) or (isinstance(version, str) and re.fullmatch(r"[\w.-]*\w[\w.-]*", version)):
                logger.init_args.version = version
            if logger.class_path.endswith("TensorBoardLogger"):
                # What was logged later is about to be logged again.
                logger["dict_kwargs"] = {**(logger.get("dict_kwargs") or {}), "purge_step": found.step}
    config.ckpt_path = str(found.path) if found else None


def _check_same_net(found: _Saved, config: Namespace) -> None:
    """Checks that the newest run is the one that was meant: a folder may hold runs of several experiments."""
    hparams = found.values("hyper_parameters")
    for key in _NET:
        ours, theirs = config.model.get(key), hparams.get(key)
        if key in hparams and (ours or None) != (theirs or None):
            theirs = shortened(str(theirs), 300)
            raise UserError(
                f"--ckpt_path last: the newest run, {found.path.parents[1]}, has {key} {theirs} and not {ours}; give the path of the "
                "checkpoint that you mean, or each experiment a --trainer.default_root_dir of its own"
            )


def newest_checkpoint(
    folders: list[Path], usable: Callable[[dict[str, Any]], bool] = lambda content: True
) -> _Saved | None:
    """Returns the checkpoint of the most steps in the folder that was written to last; None where there is none.

    Args:
        folders: may hold checkpoints.
        usable: leaves out those whose contents will not do.

    Raises:
        CheckpointError: there are some, and none can be read.
    """
    runs = [files for folder in folders if (files := list(folder.glob("*.ckpt")))]
    runs.sort(key=lambda files: max(path.stat().st_mtime for path in files), reverse=True)
    problems: list[str] = []
    for files in runs:
        saved = []
        for path in sorted(files):
            try:
                found = _Saved(path, _check_own(path))
            except UserError as error:
                problems.append(str(error))
            else:
                saved += [found] if usable(found.content) else []
        if saved:
            best = max(saved, key=lambda each: each.order)
            if problems:
                rank_zero_warn(f"{'; '.join(problems)}; using {best.path} (step {best.step}) instead")
            return best
    if problems:
        raise CheckpointError(f"no checkpoint can be read: {'; '.join(problems)}; to begin anew leave --ckpt_path out")
    return None


def _check_own(path: str | Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint of a training.

    Raises:
        CheckpointError: the file cannot be read.
        UserError: it is of something else.
    """
    content = read_checkpoint(path)
    if not content.keys() >= _OURS or not isinstance(content["global_step"], int):
        raise UserError(f"{path} holds no run of tnlayers; load its weights with --model.init_from {path} instead")
    return content


def _check_writable(config: Namespace) -> None:
    """Makes the run's folder.

    Raises:
        UserError: it cannot, or nothing can be written there.
    """
    home = _home(config)
    try:
        home.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(home, os.W_OK | os.X_OK) else "it may not be written to"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise UserError(f"the run cannot be kept in {home}: {reason}; give another --trainer.default_root_dir")


def _loggers(config: Namespace) -> list[Namespace]:
    loggers = config.trainer.logger
    return [each for each in (loggers if isinstance(loggers, list) else [loggers]) if isinstance(each, Namespace)]


def _home(config: Namespace) -> Path:
    """Returns the folder that holds those of the runs of this name, or of the only one."""
    root = config.trainer.default_root_dir or "."
    if config.model_checkpoint.dirpath:
        return Path(config.model_checkpoint.dirpath)
    if not _loggers(config):
        return Path(root)
    return _logger_home(config, _loggers(config)[0])


def _logger_home(config: Namespace, logger: Namespace) -> Path:
    """Returns the folder that holds those of a logger's runs."""
    given, root = logger.init_args, config.trainer.default_root_dir or "."
    return Path(given.get("save_dir") or root, given.get("project") or given.get("name") or "")


def _version_folder(home: Path, version: int | str) -> Path:
    return home / (f"version_{version}" if isinstance(version, int) else str(version))


def _folders(config: Namespace) -> list[Path]:
    """Returns the folders that may hold checkpoints."""
    home = _home(config)
    if config.model_checkpoint.dirpath:
        return [home]
    return list(home.glob("*/checkpoints")) if _loggers(config) else [home / "checkpoints"]
