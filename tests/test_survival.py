"""Runs with a rank schedule in real processes: two at once, and one that is killed again and again."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands import CONFIGS, QUIET
from tests.processes import COMMAND, finish, replica, start
from tests.tolerances import EXACT

MODEL = {
    "init": "random",
    "rules": [
        {
            "pattern": "conv2",
            "method": "Tucker",
            "rank": "ParamsKept(1.0)",
        },  # dense, until a truncation wants it otherwise
        {"pattern": "conv3", "method": "Tucker", "rank": 24},
        {"pattern": "conv4", "method": "LowRank", "rank": 24},
        {"pattern": "fc1", "method": "TT", "rank": 8},
    ],
}


def config(folder: Path, ranks: dict[object, str], *callbacks: object, **trainer: object) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "options.yaml"
    averages = {"class_path": "lightning_modules.callbacks.EMA", "init_args": {"decay": 0.8}}
    options = {
        "data": {"class_path": "lightning_modules.data.Digits", "init_args": {"batch_size": 128, "augment": "crop"}},
        "model": MODEL,
        "rank_schedule": {"ranks": ranks},
        "trainer": {"callbacks": [averages, *callbacks], "accelerator": "cpu", **trainer},
    }
    path.write_text(yaml.safe_dump(options))
    return ["-c", str(path), "--trainer.default_root_dir", str(folder), *QUIET]


@pytest.mark.slow
def test_ranks_fall_in_two_processes(tmp_path: Path) -> None:
    """Replicas stay equal bit for bit, every parameter is trained on, and there is one W&B run."""
    watch = {"class_path": "tests.processes.Watch", "init_args": {"folder": str(tmp_path)}}
    replicas = {"class_path": "tests.processes.SaveReplica", "init_args": {"folder": str(tmp_path)}}
    options = config(tmp_path, {2: "ParamsKept(0.03)"}, watch, replicas, devices=2, strategy="ddp", max_epochs=4)
    command = [*COMMAND, "fit", *options, "-c", CONFIGS / "logger/wandb.yaml"]
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    home = {f"WANDB_{name}_DIR": str(tmp_path / "home") for name in ("DATA", "CACHE", "CONFIG")}
    code, said = finish(start([*command, "--trainer.logger.init_args.save_dir", tmp_path], tmp_path, **offline, **home))
    assert code == 0, said
    first, second = replica(tmp_path), replica(tmp_path, 1)
    parameters = [key for key in first if "running" not in key]  # each process has its own BatchNorm statistics
    assert "net.conv2.factors.core" in parameters
    for key in parameters:
        torch.testing.assert_close(second[key], first[key], **EXACT)
    for rank in range(2):
        assert json.loads((tmp_path / f"still{rank}.json").read_text()) == {str(epoch): [] for epoch in range(4)}
    runs = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(runs) == 1
    (last,) = tmp_path.rglob("last.ckpt")
    layers = torch.load(last, weights_only=True)["tensorization"]["layers"]
    assert {layer["pattern"] for layer in layers} == {"conv2", "conv3", "conv4", "fc1"}
