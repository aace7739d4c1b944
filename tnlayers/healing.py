"""A compressed net learns from the dense one, a slice at a time, without labels.

A slice is a part of the net that the dense net has too: a block of a repeated kind, or a single layer where there are no blocks.
From the front to the back each one is fitted to what the dense net's makes of the dense net's own features, given the features
that the slices in front of it, fitted already, bring. So it corrects what was lost before it, too.

First the factors of its layers are fitted one layer after the other to the dense layers' outputs, and the statistics of its BatchNorms
are taken anew, both without a gradient of the slice. Then all its parameters are trained: the recipe is that of layer-wise
distillation (Romero et al., FitNets: hints for thin deep nets, 2015, arXiv 1412.6550), with the compressed net's own inputs:
mean squared error, Adam with a rate that falls to 0 along a cosine, BatchNorm by batches.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.errors import UserError
from tnlayers.features import Features, Part
from tnlayers.interim import digest, read_interim, write_interim
from tnlayers.linalg import wide
from tnlayers.normalisation import batch_norms, normalising_by_batches, take_statistics
from tnlayers.refitting import refit_layers
from tnlayers.slices import at, has_module, held_elsewhere, in_order, module_of, slices_of
from tnlayers.tracing import Example, arguments_of, evaluating, factorized_layers, plain_attention, tensors_in
from tnlayers.tuning import Progress

__all__ = ["Healed", "heal"]

_STEPS, _RATE = 60, 3e-3
_JUDGED = 8  # one batch of so many tells whether a fit helps, and takes no part in it


@dataclass(frozen=True)
class Healed:
    """What became of a slice.

    Attributes:
        name: of the module.
        before: its error, on batches that it was not fitted to: ||y - y'||^2 / ||y||^2 of the dense slice's outputs y.
        refitted: the same after its factors were fitted and its normalisations' statistics taken anew.
        after: the same after training. What did not help was undone, so that the errors do not rise.
    """

    name: str
    before: float
    refitted: float
    after: float


def heal(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Example],
    *,
    slices: Sequence[str] | None = None,
    refits: bool = True,
    steps: int = _STEPS,
    rate: float = _RATE,
    seed: int = 0,
    interim: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Healed]:
    """Fits each slice of a compressed model to the same slice of the dense one, front to back, in place.

    All parameters of a slice that require gradients are trained, not those of its factors alone, but for those that the model holds
    elsewhere too; BatchNorm's statistics are those of the batches. Dropout is off. What is worse on the batches set aside than what was
    there is undone. A slice that the model calls several times is fitted to its first call.

    Args:
        model: with factorized layers.
        dense: the model that it was made of, as it was; it is not changed.
        batches: what the models take, two batches or more, of unlabelled data; gone through once for each slice and model.
        slices: names of slices of both models; by default those of `slices_of` that the batches reach.
        refits: whether the factors are fitted layer by layer first; alone, with no steps, it is the closed form of healing.
        steps: how many there are for each slice, of one batch each; 0 trains nothing.
        rate: the learning rate of Adam at the first step.
        seed: of the order of the batches.
        interim: a file that keeps what is done after each slice. The same call with the same models and batches goes on there after it
            was killed, and ends in the same model; the file stays.
        progress: is told of each slice; nothing is printed.

    Raises:
        UserError: fewer than two batches, or one of a single sample where there is a BatchNorm; a slice that one of the models does not
            have, or that the batches do not reach; models on two devices; training in float16; an
            interim file of another job.
    """
    given = list(batches) if not isinstance(batches, Sequence) else batches
    _check(model, dense, given, trains=steps > 0)
    order = _ordered(model, dense, given[0], slices)
    recipe = {"slices": order, "batches": len(given), "refits": refits, "steps": steps, "rate": rate, "seed": seed}
    done: list[Any] = []
    if interim is not None:
        recipe["weights and data"] = digest(model.state_dict(), dense.state_dict(), given[0])
        done = read_interim(Path(interim), model, recipe)
    for number, name in enumerate(order[len(done) :], len(done)):
        if progress is not None:
            progress(name, number, len(order))
        with TemporaryDirectory() as folder, plain_attention():  # torch's fast path hands on tensors of another kind
            one = _slice_of(model, dense, name, given, Path(folder), seed + number)
            done.append((name, *one.healed(refits=refits, steps=steps, rate=rate)))
        if interim is not None:
            write_interim(Path(interim), model, recipe, done)
    return [Healed(*each) for each in done]


def _ordered(model: nn.Module, dense: nn.Module, batch: Example, slices: Sequence[str] | None) -> list[str]:
    """Returns the names of the slices in the order of their calls."""
    names = list(slices_of(model, dense) if slices is None else slices)
    for name in names:
        if not all(has_module(each, name) for each in (model, dense)):
            raise UserError(f"slice {name!r}: expected the name of a module of both models")
    order = in_order(model, names, batch)
    if slices and (missed := [name for name in names if name not in order]):
        raise UserError(f"the batches do not reach {missed[0]!r}; leave it out of `slices`")
    return order


def _slice_of(
    model: nn.Module, dense: nn.Module, name: str, batches: Sequence[Example], folder: Path, seed: int
) -> "_Slice":
    """Returns a slice with what reaches it in both models as they are now; the folder is for what does not fit into memory."""
    features = Features(folder)
    for batch in batches:
        ours, _ = at(model, name, batch, output=False)
        theirs, target = at(dense, name, batch, output=True)
        features.append((ours, theirs, target))
    return _Slice(module_of(model, name), module_of(dense, name), held_elsewhere(model, name), features, seed)


@dataclass(frozen=True)
class _Slice:
    """A module, the dense one that it stands for, and for each batch the arguments of both and the dense one's output.

    Its parameters that the model holds `elsewhere` too stay as they are.
    """

    module: nn.Module
    dense: nn.Module
    elsewhere: Collection[nn.Parameter]
    features: Features
    seed: int

    @property
    def judged(self) -> Sequence[int]:
        return range(0, len(self.features), _JUDGED)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [each for each in self.module.parameters() if each.requires_grad and each not in self.elsewhere]

    @property
    def fitted(self) -> Sequence[int]:
        return [place for place in range(len(self.features)) if place not in self.judged]

    def healed(self, *, refits: bool, steps: int, rate: float) -> tuple[float, float, float]:
        """Fits the module; returns its errors before, between and after."""
        before = self.error()
        refitted = self.unless_worse(before, self.refit) if refits else before
        after = self.unless_worse(refitted, lambda: self.train(steps, rate)) if steps and self.trained else refitted
        return before, refitted, after

    def error(self) -> float:
        """Returns the mean error in evaluation on the batches set aside."""
        found = []
        torch.clear_autocast_cache()
        with evaluating(self.module):
            for place in self.judged:
                (args, kwargs), _, target = self.features[place]
                found.append(float(_distance(self.module(*args, **kwargs), target)))
        return sum(found) / len(found)

    def unless_worse(self, before: float, change: Callable[[], None]) -> float:
        """Changes the module, and undoes that if its error is not less; returns the error."""
        layers = factorized_layers(self.module).values()
        start, errors = copy.deepcopy(self.module.state_dict()), [layer.decomposition_error for layer in layers]
        change()
        after = self.error()
        better = after < before
        if not better:
            self.module.load_state_dict(start)
        for layer, error in zip(layers, errors, strict=True):
            layer.decomposition_error = None if better else error
        return after if better else before

    def refit(self) -> None:
        """Fits the factors of the layers that the dense slice has too, and takes the normalisations' statistics anew."""
        part = Part(self.features, self.fitted)
        refit_layers(self.module, self.dense, part, self.seed, self.elsewhere)
        take_statistics(self.module, (ours for ours, _, _ in part), self.elsewhere)

    def train(self, steps: int, rate: float) -> None:
        optimizer = torch.optim.Adam(self.trained, lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        drawn = self.features.drawn(self.fitted, self.seed)
        with normalising_by_batches(self.module), torch.enable_grad():
            for _, ((args, kwargs), _, target) in zip(range(steps), drawn, strict=False):
                optimizer.zero_grad()
                torch.clear_autocast_cache()  # each step casts its weights anew
                # Adam asks for no scale, and gradients of a mean over many values may be too small for 16 bits.
                entries = sum(tensor.numel() for tensor in tensors_in(target))
                (entries * _distance(self.module(*args, **kwargs), target)).backward()
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        take_statistics(self.module, (ours for ours, _, _ in Part(self.features, self.fitted)), self.elsewhere)


def _check(model: nn.Module, dense: nn.Module, batches: Sequence[Example], *, trains: bool) -> None:
    """Refuses what would fail in the middle."""
    if len(batches) < 2:
        raise UserError(
            f"{len(batches)} batches: expected two or more, since some only judge what was fitted to the others"
        )
    devices = [{parameter.device for parameter in each.parameters()} for each in (model, dense)]
    if devices[0] != devices[1]:
        raise UserError(f"the model is on {devices[0]} and the dense one on {devices[1]}; move it there too")
    if trains and any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise UserError(
            "gradients of float16 parameters vanish: heal in float32 or bfloat16, or without training (steps=0)"
        )
    sizes = {len(tensor) for batch in batches for tensor in [next(tensors_in(arguments_of(batch)))] if tensor.dim()}
    if batch_norms(model) and min(sizes, default=2) < 2:
        raise UserError("BatchNorm has no variance of one sample: give batches of two or more, as with drop_last=True")


def _distance(output: Any, target: Any) -> Tensor:
    """Returns ||y - y'||^2 / ||y||^2 over all tensors of an output, of those that are real numbers."""
    pairs = [
        (wide(ours), wide(theirs))
        for ours, theirs in zip(tensors_in(output), tensors_in(target), strict=True)
        if theirs.is_floating_point()
    ]
    lost = torch.stack([(ours - theirs).square().sum() for ours, theirs in pairs]).sum()
    return lost / torch.stack([theirs.square().sum() for _, theirs in pairs]).sum().clamp_min(1e-30)
