"""A few epochs of training on, and the accuracy after each."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_modules.classifier import ImageClassifier
from lightning_modules.console import silenced_lightning
from lightning_modules.data import ImageData
from lightning_modules.data.pictures import Batch
from lightning_modules.study.measurement.evaluation import score
from tnlayers.errors import UserError
from tnlayers.tracing import evaluating

__all__ = ["retrain", "training_options"]

_MODEL = ("distill_weight", "temperature")
_DATA = ("batch_size", "val_fraction", "split_seed", "augment")
_CLIPPING = ("gradient_clip_val", "gradient_clip_algorithm")
_TRAINER = ("precision", *_CLIPPING, "accumulate_grad_batches", "limit_train_batches")


def retrain(
    model: ImageClassifier,
    net: nn.Module,
    data: ImageData,
    like: Trainer,
    epochs: int,
    seed: int,
    batches: Callable[[], Iterable[Batch]],
    tick: Callable[[], None],
) -> tuple[float, ...]:
    """Trains a net in place and returns its accuracy before the first epoch and after each.

    Args:
        model: how to train: loss, teacher, optimizer.
        net: what to train instead of the model's own net.
        data: gives the training pictures.
        like: the trainer whose device, precision, clipping and accumulation are taken over; it stays as it is.
        epochs: the whole schedule, warm-up and cosine.
        seed: what shuffles, shifts and dropout are drawn from.
        batches: gives the pictures to evaluate on, on the device, and labels.
        tick: called after each epoch.
    """
    student = copy.copy(model)
    student._modules = dict(model._modules)
    student.net = net.train()
    accuracies = [_accuracy(net, batches())]

    class Evaluate(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            accuracies.append(_accuracy(net, batches()))
            tick()

    if epochs:
        with silenced_lightning(), torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                _trainer(like, epochs, Evaluate()).fit(student, datamodule=data)
            except SIGTERMException:
                raise
            except SystemExit:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
    return tuple(accuracies)


def training_options(model: ImageClassifier, data: ImageData, like: Trainer, epochs: int) -> dict[str, Any]:
    """Lists what the outcome of `retrain` depends on beside the net, the number of epochs and the seed, as plain values.

    Raises:
        ValueError: a scheduler that waits for a validation, of which there is none.
    """
    optimizer = model._optimizer([nn.Parameter(torch.zeros(1))])
    scheduler = model._lr_scheduler(optimizer) if model._lr_scheduler else None
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "lr_scheduler ReduceLROnPlateau: a study retrains without validating; leave it out for a cosine"
        )
    return {
        "pictures": data.num_train,
        "optimizer": f"{type(optimizer).__name__} {optimizer.defaults}",
        "learning_rates": _rates(optimizer, scheduler, epochs) if scheduler else None,
        "teacher": (model.hparams["teacher"] or "the dense net") if model.hparams["distill_weight"] else None,
        **{name: model.hparams[name] for name in _MODEL},
        **{name: getattr(data, name) for name in _DATA},
        **{name: getattr(like, name) for name in _TRAINER},
    }


def _rates(optimizer: Optimizer, scheduler: LRScheduler, epochs: int) -> tuple[float, ...]:
    """Finds the learning rate of each epoch."""
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return tuple(rates)


def _accuracy(net: nn.Module, batches: Iterable[Batch]) -> float:
    with evaluating(net):
        return score(net, batches).accuracy


def _trainer(like: Trainer, epochs: int, callback: Callback) -> Trainer:
    device, taken_over = like.strategy.root_device, {name: getattr(like, name) for name in _TRAINER}
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        **taken_over,
        limit_val_batches=0,
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
