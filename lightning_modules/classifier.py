"""The training module: an image classifier whose layers may be factorized.

It takes specifications, not modules, so that its checkpoints hold plain values and reload anywhere: the net by name, the
rules as plain mappings.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.data.pictures import NO_LABEL
from lightning_modules.nets import build_net
from lightning_modules.seeds import batch_seed, drawing
from lightning_modules.tensorized import TensorizedCheckpoint, checkpoint_path, trainer_of
from tnlayers import CheckpointError, LoadReport, load_checkpoint, resolve, rules_from_plain, tensorize
from tnlayers.checkpoints import read_checkpoint
from tnlayers.errors import UserError, as_checkpoint_error
from tnlayers.factorized import Init
from tnlayers.matching import matching_state
from tnlayers.rules import Rule
from tnlayers.saved_layers import check_plain

__all__ = ["NET_ARGUMENTS", "ImageClassifier", "load_net"]

NET_ARGUMENTS = ("net", "num_classes", "input_shape", "net_options")
"""The hyperparameters that say which net a checkpoint is of."""
_MOST_PARAMS = 2**31  # a file must not ask for all memory
_WARMUP = 0.05
_EXAMPLE_BATCH = 32


class ImageClassifier(TensorizedCheckpoint):
    """Trains, evaluates and predicts; logs `train/`, `val/` and `test/` loss and accuracy.

    Args:
        net: a name for `lightning_modules.nets.build_net`.
        num_classes: how many classes.
        input_shape: (channels, height, width) of a picture.
        net_options: further arguments of the net.
        init_from: a dense or tensorized checkpoint to start from, with a fresh optimizer (`ckpt_path` resumes instead).
        rules: which layers to factorize, first match wins: {pattern, method, rank, ...}; see `tnlayers.rules`.
        init: "decompose" keeps the weights as closely as the ranks allow, "random" trains the factors from scratch.
        teacher: a checkpoint of the dense net; training then also follows its outputs (knowledge distillation, Hinton
            et al. 2015, arXiv 1503.02531).
        distill_weight: the teacher's share of the loss, 0 to 1.
        temperature: softens both outputs before they are compared.
        compile: whether training runs the net through `torch.compile`.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, stepped once an epoch; by default a cosine to zero over the whole run, after
            a short warm-up.
    """

    tensorized = "net"

    def __init__(
        self,
        net: str = "cnn4",
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (1, 8, 8),
        net_options: dict[str, Any] | None = None,
        init_from: str | None = None,
        rules: list[dict[str, Any]] | None = None,
        init: Literal["decompose", "random"] = "decompose",
        teacher: str | None = None,
        distill_weight: float = 0.9,
        temperature: float = 4.0,
        compile: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= distill_weight <= 1 or temperature <= 0:
            raise UserError(
                f"distill_weight {distill_weight} and temperature {temperature}: expected a weight from 0 to 1 and a "
                "temperature above 0"
            )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"], logger=False)
        self.rules = rules_from_plain(rules or [])
        self.net: nn.Module = self._build()
        self.example_input_array = torch.zeros(1, *input_shape)  # Lightning's summary counts with it
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.awaits_checkpoint = False  # set where one is sure to be restored, which brings weights and structure
        self._prepared = False
        self._teacher: tuple[nn.Module, ...] = ()  # in a tuple it is no submodule: checkpoints do not carry it
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=NO_LABEL)
        self.train_accuracy, self.val_accuracy, self.test_accuracy = accuracy, accuracy.clone(), accuracy.clone()

    def _build(self) -> nn.Module:
        return _build_net(self.hparams)

    @property
    def example_input(self) -> Tensor:
        """Returns zeros (n, channels, height, width) of a usual batch, on the module's device and in its precision."""
        return torch.zeros(_EXAMPLE_BATCH, *self.hparams["input_shape"], device=self.device, dtype=self.dtype)  # type: ignore[arg-type]

    @property
    def training_input(self) -> Tensor:
        """Returns zeros of a batch of the data, in the layout that the net gets."""
        trainer = trainer_of(self)
        batch = getattr(getattr(trainer, "datamodule", None), "batch_size", _EXAMPLE_BATCH)
        shape = (batch, *self.hparams["input_shape"])
        return torch.zeros(shape, device=self.device, dtype=self.dtype).contiguous(memory_format=torch.channels_last)  # type: ignore[arg-type]

    def load(self, path: str | Path) -> LoadReport:
        """Takes a checkpoint's weights, and its structure if it is tensorized."""
        self._prepared = True
        return load_checkpoint(path, self.net)

    def accuracy_of(self, net: nn.Module) -> float:
        """Returns the fraction of the validation pictures that a copy of the net gets right."""
        right = total = 0
        for pictures, labels in self.trainer.datamodule.validation_batches():  # type: ignore[attr-defined]
            x = pictures.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
            right += int((net(x).argmax(dim=1).cpu() == labels).sum())
            total += len(labels)
        return right / total

    def resolve(self, init: Init) -> list[Rule]:
        """Returns the rules with integer ranks for the net as it is."""
        return resolve(self.net, self.rules, self.example_input, init=init)

    def setup(self, stage: str) -> None:
        """Loads weights and applies the rules, once, before anything runs; a checkpoint that is to come brings both."""
        if stage == "fit" and self.rules and not self._prepared:
            _check_averages(self.trainer)
        if not self._prepared and not self.awaits_checkpoint:
            if self.hparams["init_from"]:
                self.load(self.hparams["init_from"])
            tensorize(self.net, self.resolve(self.hparams["init"]), init=self.hparams["init"])
            self._prepared = True

    def on_fit_start(self) -> None:
        if self.hparams["teacher"] and self.hparams["distill_weight"] > 0 and not self._teacher:
            teacher = self._build()
            load_checkpoint(self.hparams["teacher"], teacher)
            self._teacher = (teacher.eval().requires_grad_(False),)
        for teacher in self._teacher:
            teacher.to(self.device, self.dtype)  # type: ignore[arg-type]
        if self.hparams["compile"]:
            self.net.compile()  # in place, so that names in checkpoints stay what they are

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, classes) logits.

        Channels last is the layout in which pointwise convolutions, dense and factorized, are fastest on most machines. Pictures
        take the net's precision, and what is computed of the outputs (losses, probabilities) has at least float32's.
        """
        logits = self.net(x.to(self.dtype, memory_format=torch.channels_last))
        if not isinstance(logits, Tensor):
            raise UserError(
                f"net {self.hparams['net']!r} gives {type(logits).__name__} in training and not logits alone: leave its auxiliary outputs "
                "out, such as by --model.net_options '{aux_logits: false}'"
            )
        return logits.float() if logits.dtype.itemsize < 4 else logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        with drawing(batch_seed(self.trainer, 1), self.device):  # dropout: 0 is for the data's shifts
            logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.train_accuracy(logits, y)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        if self._teacher:
            weight = self.hparams["distill_weight"]
            loss = (1 - weight) * loss + weight * self._distillation(x, logits)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/lr", rate, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def _distillation(self, x: Tensor, logits: Tensor) -> Tensor:
        """Returns T^2 KL(teacher || student) at temperature T; the square keeps the gradients' scale (Hinton et al., section 2)."""
        temperature = self.hparams["temperature"]
        with torch.no_grad():
            theirs = self._teacher[0](x.to(self.dtype, memory_format=torch.channels_last)).to(logits.dtype)
            target = F.log_softmax(theirs / temperature, dim=1)
        ours = F.log_softmax(logits / temperature, dim=1)
        return temperature**2 * F.kl_div(ours, target, log_target=True, reduction="batchmean")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        """Counts each picture once: the metrics add up over the processes, and padding has no label."""
        x, y = batch
        logits = self(x)
        accuracy: MulticlassAccuracy = getattr(self, f"{stage}_accuracy")
        loss: MeanMetric = getattr(self, f"{stage}_loss")
        accuracy(logits, y)
        labelled = (y != NO_LABEL).sum()
        total = F.cross_entropy(logits, y, reduction="sum", ignore_index=NO_LABEL)
        loss.update(total / labelled.clamp(min=1), labelled)  # the mean alone would be nan where nothing is labelled
        self.log(f"{stage}/loss", loss, on_epoch=True)
        self.log(f"{stage}/accuracy", accuracy, on_epoch=True, prog_bar=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """(n, classes) probabilities."""
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        _check_eps(optimizer)
        if self._lr_scheduler is not None:
            scheduler = self._lr_scheduler(optimizer)
            watched = {"monitor": scheduler.monitor} if hasattr(scheduler, "monitor") else {}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **watched}}
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warmup = max(int(_WARMUP * total), 1)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["seed"] = torch.initial_seed()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the file for the truth: its structure and its weights, whatever rules `setup` went by."""
        super().on_load_checkpoint(checkpoint)
        self._prepared = True
        trainer, path = trainer_of(self), checkpoint_path(self)
        if trainer and trainer.state.fn == TrainerFn.FITTING and isinstance(checkpoint.get("seed"), int):
            torch.manual_seed(checkpoint["seed"])  # the run goes on as it began, whatever the seed of its second half
        hparams, structure = checkpoint.get("hyper_parameters"), checkpoint.get("tensorization")
        had_rules = isinstance(hparams, dict) and hparams.get("rules")
        if structure and not structure["layers"] and not had_rules and any(rule.factorization for rule in self.rules):
            raise CheckpointError(f"{path} is of a dense net; to factorize it start from it: --model.init_from {path}")
        state, _ = matching_state(checkpoint, self.net, path)
        checkpoint["state_dict"] = {f"net.{key}": value for key, value in (self.net.state_dict() | state).items()}


def _check_eps(optimizer: torch.optim.Optimizer) -> None:
    """Checks eps, by which Adam and its kin divide where a gradient's square is too small for the dtype: it must not be zero there."""
    for group in optimizer.param_groups:
        eps = group.get("eps")
        for dtype in {parameter.dtype for parameter in group["params"]}:
            if isinstance(eps, float) and eps > 0 and torch.tensor(eps, dtype=dtype) == 0:
                name = str(dtype).removeprefix("torch.")
                raise UserError(
                    f"{type(optimizer).__name__}'s eps {eps} is 0 in {name}, the dtype of the weights under --trainer.precision "
                    "16-true, and weights would become nan: give --model.optimizer.eps 1e-4, or --trainer.precision 16-mixed or bf16-true"
                )


def _check_averages(trainer: Trainer) -> None:
    """Refuses Lightning's averages, which copy the net before the module's own `setup`, where layers are factorized."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback).setup in (WeightAveraging.setup, StochasticWeightAveraging.setup):
            raise UserError(
                f"{type(callback).__name__} copies the net before its layers are factorized; use lightning_modules.callbacks.EMA"
            )


def load_net(path: str | Path) -> tuple[nn.Module, tuple[int, int, int]]:
    """Builds the net of a file that `fit`, `compress` or `export` wrote; returns it and the (channels, height, width) of its pictures.

    Raises:
        CheckpointError: another file.
    """
    hparams = read_checkpoint(path).get("hyper_parameters")
    if not isinstance(hparams, dict) or any(key not in hparams for key in NET_ARGUMENTS):
        raise CheckpointError(
            f"{path} does not say which net it is of; expected a checkpoint that tnlayers fit, compress or export wrote"
        )
    given = {key: hparams[key] for key in NET_ARGUMENTS}
    with as_checkpoint_error(
        f"{path} is of a net that cannot be built", Exception
    ):  # whatever values make a constructor raise
        check_plain(given)
        with suppress(RuntimeError), torch.device("meta"):  # torchvision's regnets compute while they are built
            needed = sum(value.numel() for value in _build_net(given).state_dict().values())
            if needed > _MOST_PARAMS:
                raise UserError(f"it would have {needed} parameters; at most {_MOST_PARAMS} are taken from a file")
        net = _build_net(given)
    load_checkpoint(path, net)
    return net, tuple(given["input_shape"])


def _build_net(hparams: Mapping[str, Any]) -> nn.Module:
    options = hparams["net_options"] or {}
    shape = tuple(hparams["input_shape"])
    if fixed := {"name", "num_classes", "input_shape"} & options.keys() or {
        key for key in options if not isinstance(key, str)
    }:
        raise UserError(
            f"net_options has {', '.join(map(repr, fixed))}, which is no option of a net: the classes and the shape are the data's"
        )
    return build_net(hparams["net"], num_classes=hparams["num_classes"], input_shape=shape, **options)
