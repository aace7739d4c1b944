"""The main job on data that is always there: train a dense CNN, compress it, retrain it, report."""

from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from rich.console import Console

from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.classifier import ImageClassifier
from lightning_modules.compression import Compression, accuracy_on_test, compress
from lightning_modules.console import silenced_lightning
from lightning_modules.data import Digits
from lightning_modules.folders import clear
from lightning_modules.locks import first_unused
from lightning_modules.loggers import CSV

__all__ = ["RULES", "run_quickstart"]

RULES = [
    {"pattern": "conv1", "method": "dense"},
    {"pattern": "fc2", "method": "dense"},
    {"pattern": "conv*", "method": "Tucker", "rank": "MacsKept(0.3, multiple=8)"},
    {"pattern": "fc1", "method": "TT", "rank": "ParamsKept(0.4)"},
]
_EPOCHS, _RETRAIN_EPOCHS = 12, 10


def run_quickstart(out: Path, seed: int, console: Console) -> Compression:
    """Writes checkpoints, logs, the report and plots to `out`, or to a numbered neighbour of it that is new.

    Where the job fails it removes what it has written.
    """
    neighbours = (out.with_name(f"{out.name}-{number}") for number in count(1))
    with first_unused(chain([out], neighbours)) as folder:
        try:
            return _run(folder, seed, console)
        except BaseException:
            clear(folder)
            raise


def _run(out: Path, seed: int, console: Console) -> Compression:
    seed_everything(seed, verbose=False)
    data = Digits(batch_size=64, val_fraction=0)
    with silenced_lightning():
        console.print(f"[bold]1[/] training a dense CNN on scikit-learn's digits, {_EPOCHS} epochs")
        dense = _classifier(data)
        _trainer(out, "dense", _EPOCHS).fit(dense, datamodule=data)
        checkpoint = out / "dense.ckpt"
        dense.trainer.save_checkpoint(checkpoint, weights_only=True)

        console.print("[bold]2[/] compressing its convolutions (Tucker) and its large linear (tensor train)")
        model = _classifier(data, rules=RULES, teacher=str(checkpoint))
        trainer = _trainer(out, "retrain", _RETRAIN_EPOCHS)
        folder = out / "compressed"
        folder.mkdir()
        found = compress(model, data, trainer, checkpoint, folder, tunes=True)

        console.print(f"[bold]3[/] retraining the factors with the dense CNN as teacher, {_RETRAIN_EPOCHS} epochs")
        trainer.fit(model, datamodule=data)
        trainer.save_checkpoint(out / "retrained.ckpt", weights_only=True)
        accuracy = {**found.report.accuracy, "retrained": accuracy_on_test(trainer, model, data)}
    report = replace(found.report, title="cnn4 on digits: dense, compressed, retrained", accuracy=accuracy)
    report.write(out)
    report.show(console)
    console.print(
        f"written     {out}/report.md, report.json, layers.png, accuracy.png, checkpoints and logs",
        highlight=False,
        soft_wrap=True,
    )
    return replace(found, report=report)


def _classifier(data: Digits, **options: object) -> ImageClassifier:
    return ImageClassifier(net="cnn4", num_classes=data.num_classes, input_shape=data.input_shape, **options)  # type: ignore[arg-type]


def _trainer(out: Path, name: str, epochs: int) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        logger=CSV(out / "logs", name=name, version=""),
        default_root_dir=out,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
