"""A run that was stopped in the middle of an epoch ends as one that was not, bit for bit."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.commands import output_to, tnlayers
from tests.processes import replica
from tests.tolerances import EXACT

# All that draws random numbers at once: the order, the shifts, and dropout.
PIECES = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
MODEL = {"net": "timm/vit_tiny_patch16_224", "net_options": PIECES | {"drop_rate": 0.3, "proj_drop_rate": 0.3}}
DATA = {"class_path": "lightning_modules.data.Digits", "init_args": {"batch_size": 64, "augment": "crop"}}


def fit(folder: Path, *callbacks: dict[str, object], **checkpoints: object) -> list[str]:
    """Two epochs of 21 batches; the weights at the end go to `folder`."""
    pytest.importorskip("timm")
    folder.mkdir()
    save = {"class_path": "tests.processes.SaveReplica", "init_args": {"folder": str(folder)}}
    trainer = {"accelerator": "cpu", "max_epochs": 2, "callbacks": [save, *callbacks]}
    options = {"data": DATA, "model": MODEL, "trainer": trainer, "model_checkpoint": checkpoints}
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    return ["fit", "-c", str(folder / "options.yaml"), *output_to(folder)]


@pytest.mark.parametrize(
    ("step", "options", "again"),
    [
        (8, [], []),
        (24, [], ["--seed_everything", "5"]),  # the seed of the run's beginning holds
        (24, ["--data.num_workers", "1"], []),  # which reads ahead of what was trained on
        (8, ["--trainer.accumulate_grad_batches", "2"], []),
        (16, ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "8"], []),
    ],
    ids=["first epoch", "second epoch, other seed", "workers", "accumulation", "accumulation, validation"],
)
def test_resume_in_the_middle_of_an_epoch(step: int, options: list[str], again: list[str], tmp_path: Path) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    assert tnlayers(*fit(whole, every_n_train_steps=8, save_top_k=-1), *options) == 0
    (middle,) = whole.rglob(f"*-step={step}.ckpt")
    assert tnlayers(*fit(rest), *options, *again, "--ckpt_path", middle) == 0
    torch.testing.assert_close(replica(rest), replica(whole), **EXACT)


@pytest.mark.parametrize("step", [21, 26], ids=["last batch of an epoch", "middle"])
def test_resume_after_sigterm(step: int, tmp_path: Path) -> None:
    whole, stopped, rest = tmp_path / "whole", tmp_path / "stopped", tmp_path / "rest"
    assert tnlayers(*fit(whole)) == 0
    term = {"class_path": "tests.processes.Signalled", "init_args": {"name": "SIGTERM", "step": step}}
    assert tnlayers(*fit(stopped, term)) == 143
    assert not list(stopped.glob("replica*"))
    (saved,) = stopped.rglob("last.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == step
    assert tnlayers(*fit(rest), "--ckpt_path", saved) == 0
    torch.testing.assert_close(replica(rest), replica(whole), **EXACT)


def test_what_early_stopping_ended_stays_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 10}}
    command = [*fit(tmp_path / "run", stopping), "--ckpt_path", "last", "--trainer.max_epochs", "9"]
    assert tnlayers(*command) == 0
    (last,) = tmp_path.rglob("last.ckpt")
    before = last.read_bytes()
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert tnlayers(*command) == 0
    assert "EarlyStopping on val/loss ended this training in epoch 1: nothing is left" in caplog.text
    assert last.read_bytes() == before
