"""The net under study, and how each of a study's rows is measured on it."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_modules.classifier import ImageClassifier
from lightning_modules.compression import calibration_batches, recalibrate_if_better
from lightning_modules.data import ImageData
from lightning_modules.data.pictures import Batch
from lightning_modules.study.factorizations import recommend, spec_of
from lightning_modules.study.findings import Findings
from lightning_modules.study.measurement.evaluation import score, scores_of_layer, weights
from lightning_modules.study.measurement.forward import FromLayer
from lightning_modules.study.measurement.kernels import Kernel, Trial
from lightning_modules.study.measurement.retraining import retrain, training_options
from lightning_modules.study.rows import Joint, Layer, Protocol, Recommendation, Retrained, Row, Single, Study
from tnlayers import Rule, resolve, rules_of, summarize, tensorize, to_dense
from tnlayers.cuts import norm_loss
from tnlayers.errors import UserError
from tnlayers.geometry import Geometry
from tnlayers.linalg import entropy
from tnlayers.rules import fits
from tnlayers.tracing import calls_of, layer_inputs

__all__ = ["Subject"]

Tick = Callable[[], None]
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
_HELD = 2**28  # bytes of a layer's candidate weights that are held at once


class Subject:
    """A trained dense net, its layers and the pictures to measure on.

    It is evaluated in float32 whatever precision it is retrained in, and teaches the nets that are retrained, unless the model
    names another teacher or a `distill_weight` of 0.

    Args:
        model: a classifier with a fresh net; it is changed.
        data: the pictures.
        trainer: says where to compute and how to train; it stays as it is.
        checkpoint: of the net; a tensorized one is made dense.
        protocol: what will be measured.

    Attributes:
        kernels: name -> the weight of each layer that is studied, in the order in which the net calls them.
        loaded: what was taken from the checkpoint, in words.
        modules: name -> the layer.
        training: how nets are retrained, as plain values.

    Raises:
        ValueError: no layer fits the protocol's pattern, the weight of one is no parameter, there are several processes, weights
            that are not float32, or a scheduler that waits for a validation.
    """

    def __init__(
        self, model: ImageClassifier, data: ImageData, trainer: Trainer, checkpoint: str | Path, protocol: Protocol
    ) -> None:
        if trainer.world_size > 1:
            raise UserError(f"a study runs in one process and here are {trainer.world_size}: give --trainer.devices 1")
        if trainer.precision not in _PRECISIONS:
            raise UserError(
                f"a study keeps weights in float32 and --trainer.precision is {trainer.precision}: give one of {', '.join(_PRECISIONS)}"
            )
        self.training = training_options(model, data, trainer, protocol.epochs)
        loaded = model.load(checkpoint)
        factorized = len(rules_of(model.net))
        self.loaded = f"{loaded}{f'; {factorized} factorized layers made dense' if factorized else ''}"
        to_dense(model.net)
        self._model, self._data, self._trainer, self.protocol = model, data, trainer, protocol
        self._device = trainer.strategy.root_device
        self._net = model.net.to(self._device).eval()
        if model.hparams["distill_weight"] and not model.hparams["teacher"]:
            model._teacher = (self._net,)  # as after `compress`
        with torch.no_grad():
            self._forward = FromLayer(self._net, next(self._batches())[0][:2])
        self._example = model.example_input.to(self._device)  # as `compress` has it, so that plans are the same
        names = [name for name in self._forward.layers if fits(name, protocol.layers)]
        if not names:
            listed = ", ".join(self._forward.layers) or "the net's layers: it calls no nn.Conv2d and no nn.Linear"
            raise UserError(f"layers {protocol.layers!r} fits none of {listed}")
        self.modules = {name: self._net.get_submodule(name) for name in names}
        for name, module in self.modules.items():
            if "weight" not in module._parameters:
                raise UserError(
                    f"the weight of {name} is computed at each call (weight_norm?), and a study overwrites it: make it a parameter, "
                    "as torch.nn.utils.remove_weight_norm does"
                )
        self.kernels = {name: Kernel(name, module) for name, module in self.modules.items()}
        inputs = layer_inputs(self._net, self._example)
        self._calls = {name: calls_of(Geometry.of(module), inputs[name]) for name, module in self.modules.items()}
        self._macs = {layer.name: layer.macs for layer in summarize(self._net, self._example, measure=False).layers}
        self._checkpoint = Path(checkpoint)
        self._dense = score(self._net, self._batches())

    def num_steps(self, name: str, trials: int) -> int:
        """Counts how often so many truncations of a layer tick: once for each batch of pictures that each group of them sees."""
        return math.ceil(self._dense.pictures / self._data.batch_size) * math.ceil(trials / self._group(name))

    @property
    def covered(self) -> float:
        """The fraction of the net's parameters that are weights of the layers studied."""
        studied = sum(kernel.weight.numel() for kernel in self.kernels.values())
        return studied / sum(parameter.numel() for parameter in self._net.parameters())

    @property
    def epoch_cost(self) -> float:
        """What an epoch of training takes, in evaluations: forward, twice that backward, and the evaluation after it."""
        return 3 * self.training["pictures"] / self._dense.pictures + 1

    @property
    def shares(self) -> dict[str, float]:
        """Layer -> the fraction of a forward pass that is left where it goes on from there."""
        macs = [self._macs[name] for name in self._forward.layers]
        left = [sum(macs[place:]) / sum(macs) if self._forward.splits else 1.0 for place in range(len(macs))]
        return dict(zip(self._forward.layers, left, strict=True))

    @property
    def cut_sets(self) -> list[tuple[str, ...]]:
        """Every cut alone, and sets of several, that some layer has."""
        return list(dict.fromkeys(cuts for kernel in self.kernels.values() for cuts in kernel.cut_sets()))

    def study(self) -> Study:
        """Describes what the other rows are of."""
        dense = self._dense
        return Study(
            net=str(self._model.hparams["net"]),
            checkpoint=self._checkpoint.name,
            sha256=hashlib.sha256(self._checkpoint.read_bytes()).hexdigest(),
            data=type(self._data).__name__,
            pictures=dense.pictures,
            classes=self._data.num_classes,
            accuracy=dense.accuracy,
            loss=dense.loss,
            protocol=self.protocol,
            training=self.training,
        )

    def layer(self, name: str, tick: Tick) -> Layer:
        """Describes a layer before anything is truncated."""
        kernel = self.kernels[name]
        tick()
        return Layer(
            name=name,
            shape=tuple(kernel.weight.shape),
            params=kernel.weight.numel(),
            macs=self._macs[name],
            bonds={cut: len(split.values) for cut, split in kernel.splits.items()},
            entropy={cut: entropy(split.values) for cut, split in kernel.splits.items()},
        )

    def singles(self, name: str, trials: Sequence[Trial], tick: Tick) -> Iterator[Single]:
        """Truncates one layer in each of these ways; `tick` is called after every batch of pictures."""
        size = self._group(name)
        for first in range(0, len(trials), size):
            yield from self._group_of_singles(name, trials[first : first + size], tick)

    def _group(self, name: str) -> int:
        return max(1, _HELD // (4 * self.kernels[name].weight.numel()))

    def _group_of_singles(self, name: str, trials: Sequence[Trial], tick: Tick) -> Iterator[Single]:
        distinct: dict[str, Tensor] = {}  # the cuts of a 1x1 kernel are all the same
        attempts = []
        for trial in trials:
            weight, lost = self.kernels[name].attempt(trial, self.protocol.seed)
            digest = hashlib.sha256(weight.cpu().numpy().tobytes()).hexdigest()
            distinct.setdefault(digest, weight)
            attempts.append((trial, lost, digest))
        candidates = list(distinct.values())
        scores = scores_of_layer(self._forward, name, self.modules[name], candidates, self._batches(), tick)
        found = dict(zip(distinct, scores, strict=True))
        for trial, lost, digest in attempts:
            result = found[digest]
            yield Single(*trial[1:], lost.eps, lost.delta, result.accuracy, result.loss)

    def joint(self, cuts: tuple[str, ...], target: float, tick: Tick) -> Joint:
        """Truncates all layers that have these cuts, to the smallest bond dimensions that lose at most `target` there."""
        bonds = self._bonds(cuts, target)
        truncated = self._truncated(cuts, bonds)
        with weights({self.modules[name]: weight for name, weight in truncated.items()}):
            result = score(self._net, self._batches())
        tick()
        before = torch.cat([self.kernels[name].weight.flatten() for name in truncated])
        lost = norm_loss(before, torch.cat([weight.flatten() for weight in truncated.values()]))
        return Joint(cuts, target, bonds, lost.eps, lost.delta, result.accuracy, result.loss)

    def untruncated(self, tick: Tick) -> Retrained:
        """Trains the dense net as the truncations are trained, which are to be compared with it."""
        return Retrained((), 0.0, "dense", self._retrain(copy.deepcopy(self._net), tick), 1.0, 1.0)

    def retrained(self, cuts: tuple[str, ...], target: float, what: str, tick: Tick) -> Retrained:
        """Trains a joint truncation as it is ("dense") or as factors, where those have fewer parameters ("factors")."""
        bonds = self._bonds(cuts, target)
        net = copy.deepcopy(self._net)
        with torch.no_grad():
            for name, weight in self._truncated(cuts, bonds).items():
                net.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]
        rules = []
        for name, found in bonds.items():
            spec = spec_of(self.modules[name], cuts, found) if found != self.kernels[name].whole(cuts) else None
            if spec and spec.params < spec.geometry.params:
                rules.append(Rule(name, spec.method))
        factorized = tensorize(copy.deepcopy(net), resolve(net, rules, self._example))
        totals = summarize(factorized, self._example, measure=False).totals
        trained = factorized if what == "factors" else net
        return Retrained(cuts, target, what, self._retrain(trained, tick), totals.params_kept, totals.macs_kept)

    def recommendation(self, rows: Sequence[Row], tolerance: float, tick: Tick) -> Recommendation:
        """Factorizes the net as truncations that lost at most `tolerance` allow, and trains it unless another tolerance gave the same."""
        findings = Findings(rows)
        rules = recommend(findings, self.modules, self._calls, tolerance)
        resolved = [rule for rule in resolve(self._net, rules, self._example) if rule.pattern in self.modules]
        plain = tuple(rule.to_plain() for rule in resolved)
        for known in findings.recommendations:
            if json.dumps(known.rules) == json.dumps(plain):
                return replace(known, tolerance=tolerance)
        net = tensorize(copy.deepcopy(self._net), resolved)
        recalibrate_if_better(net, self._net, calibration_batches(self._data))  # as `compress` does
        totals = summarize(net, self._example, measure=False).totals
        return Recommendation(tolerance, plain, self._retrain(net, tick), totals.params_kept, totals.macs_kept)

    def _retrain(self, net: nn.Module, tick: Tick) -> tuple[float, ...]:
        protocol = self.protocol
        return retrain(self._model, net, self._data, self._trainer, protocol.epochs, protocol.seed, self._batches, tick)

    def _bonds(self, cuts: tuple[str, ...], target: float) -> dict[str, tuple[int, ...]]:
        return {name: kernel.bonds(cuts, target) for name, kernel in self.kernels.items() if kernel.has(cuts)}

    def _truncated(self, cuts: tuple[str, ...], bonds: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: self.kernels[name].truncated(cuts, found) for name, found in bonds.items()}

    def _batches(self) -> Iterator[Batch]:
        for pictures, labels in self._data.test_batches(self.protocol.pictures, self.protocol.seed):
            yield pictures.to(self._device).contiguous(memory_format=torch.channels_last), labels
