"""A compressed net learns from the dense one, a slice at a time, without labels.

A slice is a part of the net that the dense net has too: a block of a repeated kind, or a single layer where there are no blocks.
From the front to the back each one is fitted to what the dense net's makes of the dense net's own features, given the features
that the slices in front of it, fitted already, bring. So it corrects what was lost before it, too.

The recipe is that of layer-wise distillation (Romero et al., FitNets: hints for thin deep nets, 2015, arXiv 1412.6550), with the
compressed net's own inputs: mean squared error, Adam with a rate that falls to 0 along a cosine, BatchNorm by batches.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.errors import UserError
from tnlayers.factorized import FactorizedLayer
from tnlayers.tracing import Example, arguments_of, evaluating, map_tensors, modes_kept, tensors_in
from tnlayers.tuning import Progress

__all__ = ["Healed", "heal", "slices_of"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_STEPS, _RATE = 150, 3e-3
_JUDGED = 8  # one batch of so many tells whether a fit helps, and takes no part in it
_IN_MEMORY = 2 << 30  # bytes of features; what is more lies in files


@dataclass(frozen=True)
class Healed:
    """What became of a slice.

    Attributes:
        name: of the module.
        before: its error, on batches that it was not fitted to: ||y - y'||^2 / ||y||^2 of the dense slice's outputs y.
        after: the same after the fit; as before where the fit did not help and was undone.
    """

    name: str
    before: float
    after: float


def heal(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Example],
    *,
    slices: Sequence[str] | None = None,
    steps: int = _STEPS,
    rate: float = _RATE,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Healed]:
    """Fits each slice of a compressed model to the same slice of the dense one, front to back, in place.

    All parameters of a slice that require gradients are fitted, not those of its factors alone, and BatchNorm's statistics are
    those of the batches. Dropout is off. A fit that is worse on the batches set aside than what was there is undone.

    Args:
        model: with factorized layers.
        dense: the model that it was made of, as it was; it is not changed.
        batches: what the models take, two batches or more, of unlabelled data; gone through once for each slice and model.
        slices: names of modules of both models; by default `slices_of`.
        steps: how many there are for each slice, of one batch each.
        rate: the learning rate of Adam at the first step.
        seed: of the order of the batches.
        progress: is told of each slice; nothing is printed.

    Raises:
        UserError: fewer than two batches, a name that one of the models does not have, or one that the batches do not reach.
    """
    names = list(slices_of(model, dense) if slices is None else slices)
    for name in names:
        if not all(_has(each, name) for each in (model, dense)):
            raise UserError(f"slice {name!r}: expected the name of a module of both models")
    given = list(batches) if not isinstance(batches, Sequence) else batches
    if len(given) < 2:
        raise UserError(
            f"{len(given)} batches: expected two or more, since some only judge what was fitted to the others"
        )
    order = _in_order(model, names, given[0])
    if missed := [name for name in names if name not in order]:
        raise UserError(f"the batches do not reach {missed[0]!r}; leave it out of `slices`")
    found = []
    for number, name in enumerate(order):
        if progress is not None:
            progress(name, number, len(order))
        with TemporaryDirectory() as folder:
            features = _Features(Path(folder))
            for batch in given:
                inputs, _ = _at(model, name, batch, output=False)
                _, target = _at(dense, name, batch, output=True)
                features.append((*inputs, target))
            found.append(_fitted(model.get_submodule(name), name, features, steps, rate, seed + number))
    return found


def slices_of(model: nn.Module, dense: nn.Module) -> list[str]:
    """Finds the slices of a compressed model that hold factorized layers, by the module tree.

    They are the elements of `nn.Sequential`, `nn.ModuleList` and `nn.ModuleDict` that are no such containers themselves, the
    outermost ones: residual blocks, transformer layers, convolutions with their normalisation. Elsewhere they are single layers, or
    the smallest module around them that the dense model has too.
    """
    found: list[str] = []

    def walk(name: str, module: nn.Module, *, element: bool) -> None:
        held = dict(module.named_children())
        factorized = {key for key, child in held.items() if _holds_factors(child)}
        alike = isinstance(module, FactorizedLayer) or not all(_has(dense, _joined(name, key)) for key in factorized)
        if alike or (element and type(module) not in _CONTAINERS):
            found.append(name)
            return
        for key in held:
            if key in factorized:
                walk(_joined(name, key), held[key], element=type(module) in _CONTAINERS)

    if _holds_factors(model):
        walk("", model, element=False)
    return found


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _holds_factors(module: nn.Module) -> bool:
    return any(isinstance(each, FactorizedLayer) for each in module.modules())


def _has(model: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in model.named_modules(remove_duplicate=False))


class _Reached(BaseException):
    """Ends a forward pass from which nothing more is needed; no code that catches exceptions of its own takes it."""


def _in_order(model: nn.Module, names: Sequence[str], batch: Example) -> list[str]:
    """Returns the names in the order in which the model calls them; those that it does not call are absent."""
    seen: dict[str, None] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.setdefault(name))
        for name in names
    ]
    try:
        _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def _at(model: nn.Module, name: str, batch: Example, *, output: bool) -> tuple[Any, Any]:
    """Returns the arguments of a module's first call on a batch, and with `output` what it returns, all of them copies."""
    found: list[Any] = [None, None]

    def copied(value: Any) -> Any:
        return map_tensors(value, lambda tensor: tensor.detach().clone())

    def enters(_: nn.Module, args: Any, kwargs: Any) -> None:
        if found[0] is None:
            found[0] = copied((args, kwargs))
            if not output:
                raise _Reached

    def leaves(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        found[1] = copied(out)
        raise _Reached

    module = model.get_submodule(name)
    handles = [module.register_forward_pre_hook(enters, with_kwargs=True)]
    if output:
        handles.append(module.register_forward_hook(leaves, with_kwargs=True))
    try:
        _run(model, batch)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0], found[1]


def _run(model: nn.Module, batch: Example) -> None:
    device = next(model.parameters()).device
    args, kwargs = arguments_of(map_tensors(batch, lambda tensor: tensor.to(device)))
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        model(*args, **kwargs)


class _Features:
    """Features of batches, in memory as far as they fit there, else in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._bytes = folder, 0
        self._kept: list[Any] = []

    def append(self, features: Any) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(features))
        if self._bytes + size > _IN_MEMORY:
            path = self._folder / f"{len(self._kept)}.pt"
            torch.save(features, path)
            features = path
        else:
            self._bytes += size
        self._kept.append(features)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: int) -> Any:
        kept = self._kept[place]
        return torch.load(kept, weights_only=True) if isinstance(kept, Path) else kept

    def drawn(self, places: Sequence[int], seed: int) -> Iterator[Any]:
        """Yields batches without end, of samples in random order; where samples cannot be told apart, the batches as they are."""
        generator = torch.Generator().manual_seed(seed)
        kept = [self._kept[place] for place in places]
        if any(isinstance(one, Path) for one in kept) or not all(map(_samples, kept)):
            while True:
                yield from (self[places[n]] for n in torch.randperm(len(places), generator=generator).tolist())
        whole, size = _concatenated(kept), _samples(kept[0])
        while True:
            # The last samples of a round are left out where they fill no batch, for the sake of BatchNorm.
            order = torch.randperm(sum(map(_samples, kept)), generator=generator)
            for part in order[: len(order) // size * size].split(size):
                yield map_tensors(whole, partial(_picked, part))


def _picked(places: Tensor, tensor: Tensor) -> Tensor:
    return tensor[places.to(tensor.device)]


def _samples(features: Any) -> int:
    """Returns how many samples all tensors hold along their first dimension; 0 where they differ."""
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors_in(features)}
    return sizes.pop() if len(sizes) == 1 else 0


def _concatenated(every: Sequence[Any]) -> Any:
    """Returns features of one nesting with all samples in each tensor."""
    columns = zip(*(tensors_in(features) for features in every), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return map_tensors(every[0], lambda _: next(joined))


def _fitted(module: nn.Module, name: str, features: _Features, steps: int, rate: float, seed: int) -> Healed:
    """Fits a module to outputs, and undoes that if it does not help on the batches set aside."""
    judged = range(0, len(features), _JUDGED)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before, start = _error(module, features, judged), copy.deepcopy(module.state_dict())
    if not trained or not steps:
        return Healed(name, before, before)
    optimizer = torch.optim.Adam(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    drawn = features.drawn([place for place in range(len(features)) if place not in judged], seed)
    with modes_kept(module), torch.enable_grad():
        _normalise_by_batches(module)
        for _, (args, kwargs, target) in zip(range(steps), drawn, strict=False):
            optimizer.zero_grad()
            _distance(module(*args, **kwargs), target).backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    after = _error(module, features, judged)
    if not after < before:
        module.load_state_dict(start)
        after = before
    return Healed(name, before, after)


def _normalise_by_batches(module: nn.Module) -> None:
    """Sets evaluation mode, so that nothing is dropped, but for BatchNorm."""
    module.eval()
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.train()


def _error(module: nn.Module, features: _Features, places: Iterable[int]) -> float:
    """Returns the mean error in evaluation on some of the batches."""
    found = []
    with evaluating(module):
        for place in places:
            args, kwargs, target = features[place]
            found.append(float(_distance(module(*args, **kwargs), target)))
    return sum(found) / len(found)


def _distance(output: Any, target: Any) -> Tensor:
    """Returns ||y - y'||^2 / ||y||^2 over all tensors of an output, of those that are real numbers."""
    pairs = [
        (ours.float(), theirs.float())
        for ours, theirs in zip(tensors_in(output), tensors_in(target), strict=True)
        if theirs.is_floating_point()
    ]
    lost = torch.stack([(ours - theirs).square().sum() for ours, theirs in pairs]).sum()
    return lost / torch.stack([theirs.square().sum() for _, theirs in pairs]).sum().clamp_min(1e-30)
