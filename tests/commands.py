"""Running the command in a test, and reading what it wrote."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
DIGITS = ["-c", str(CONFIGS / "data/digits.yaml")]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def tnlayers(*arguments: str | Path) -> int:
    """Runs the command in this process as its own would; the seeds that Lightning leaves in the environment go again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tnlayers", *map(str, arguments)])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        return main()


def output_to(folder: Path) -> list[str]:
    """Options that keep what a command writes inside of `folder`."""
    written = ["--trainer.default_root_dir", str(folder), "--trainer.logger.init_args.save_dir", str(folder)]
    return ["-c", str(CONFIGS / "logger/csv.yaml"), *written, *QUIET]


def metric(folder: Path, name: str) -> float:
    """The last value of a metric that the CSVLogger wrote somewhere in the folder."""
    (path,) = folder.rglob("metrics.csv")
    with open(path, newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]][-1]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]
