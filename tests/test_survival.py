"""Runs with a rank schedule in real processes: two at once, and one that is killed again and again."""

import json
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands import CONFIGS, QUIET
from tests.processes import COMMAND, Forks, finish, replica, start
from tests.tolerances import EXACT
from tnlayers import CheckpointError
from tnlayers.checkpoints import read_checkpoint

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
        "autotune": {"enabled": False},  # of several runs each would measure something else
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


KILLS, TRUNCATED = 20, 11  # an epoch has 11 steps, and the first truncation comes after one


def steps_saved(folder: Path) -> int:
    """The steps of the furthest checkpoint that can be read; 0 where there is none yet."""
    steps = [0]
    for path in folder.rglob("*.ckpt"):
        try:
            steps.append(read_checkpoint(path)["global_step"])
        except CheckpointError:
            assert path.name.startswith("."), f"{path} is torn"  # one that was being written
    return max(steps)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("epoch=*.ckpt")}


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    """At random moments, of one run after another: each goes on from its last checkpoint, and ends as if nothing had been."""
    ranks: dict[object, str] = {1: "ParamsKept(0.3)", "3-4": "ParamsKept(0.05)"}
    steps = ["--model_checkpoint.every_n_train_steps", "3"]
    moments = random.Random(0)
    with Forks() as forks:

        def run(name: str, kill: bool) -> tuple[int, str]:
            """Every other kill comes soon after a new checkpoint, so that they fall all over the run on any machine."""
            options = [*config(tmp_path / name, ranks, max_epochs=6), *steps, "--ckpt_path", "last"]
            before = names(tmp_path / name)
            fork = forks.start(["fit", *options], tmp_path / name)
            with suppress(ProcessLookupError):  # it may have ended by itself
                if kill and moments.random() < 0.5:
                    fork.until(lambda: names(tmp_path / name) - before)
                    time.sleep(moments.uniform(0, 0.6))
                    fork.kill()
                elif kill:
                    time.sleep(moments.uniform(0.2, 2.5))
                    fork.kill()
            return fork.wait(), fork.said[-3000:]

        code, said = run("whole", kill=False)
        assert code == 0, said
        (end,) = (tmp_path / "whole").rglob("last.ckpt")
        expected = read_checkpoint(end)
        kills, runs, places = 0, 0, set[int]()
        while kills < KILLS:
            name, code, saved = f"run{runs}", -1, 0
            while code:
                last_try = kills >= KILLS
                code, said = run(name, kill=not last_try)
                assert code in ((0,) if last_try else (0, -9)), said
                assert steps_saved(tmp_path / name) >= saved
                saved = steps_saved(tmp_path / name)
                kills += code != 0
                places.add(saved)
            (end,) = (tmp_path / name).rglob("last.ckpt")
            found = read_checkpoint(end)
            assert found["global_step"] == expected["global_step"]
            for part in ("state_dict", "current_model_state", "optimizer_states"):
                torch.testing.assert_close(found[part], expected[part], **EXACT)
            assert found["tensorization"] == expected["tensorization"]
            runs += 1
        assert len([step for step in places if step > TRUNCATED]) >= 3, (
            places
        )  # checkpoints of truncated nets among them
