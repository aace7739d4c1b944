"""How the entries of a file fit a model: which are its own, and what is most likely wrong where they do not fit."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.errors import CheckpointError, shortened
from tnlayers.factorized import FactorizedLayer
from tnlayers.state_dicts import USUAL_KEYS, Copy, convertible, find_copies, needed, prefixes

__all__ = ["LoadReport", "fitting_state"]

# torch's AveragedModel has a counter of its own.
_MAY_ADD = "n_averaged"
_WRAPPED = re.compile(r"(?:_orig_mod\.|module\.)+")
_SHOWN, _KEY, _LIST = 4, 60, 220  # entries, and characters of one and of all of them


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        matched: keys of the model that were loaded.
        missing: keys of the model that the file does not have.
        unexpected: keys of the file that the model does not have, as they stand in the file.
        mismatched: keys that both have with another shape or kind of number: (key, the file's, the model's). The factors of a
            layer are loaded together, so that those which would fit follow where one of them does not.
        prefix: what was taken off the file's keys.
        left: under which keys the file has averaged weights beside the plain ones, which were taken.
        outside: keys without the prefix, where all of the model's are behind it: a loss's weights, a metric's counts.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, str, str], ...]
    prefix: str
    left: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} entries matched"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_few(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected ({_few(self.unexpected)})")
        if self.mismatched:
            shapes = [
                f"{shortened(key, _KEY)}: "
                + (
                    f"{theirs} in the file, {ours} in the model"
                    if theirs != ours
                    else "left with its layer's other factors"
                )
                for key, theirs, ours in self.mismatched[:_SHOWN]
            ]
            parts.append(f"{len(self.mismatched)} of another shape ({_few(shapes, len(self.mismatched))})")
        if self.prefix:
            parts.append(f"prefix {shortened(self.prefix, _KEY)!r} taken off")
        if self.outside:
            parts.append(f"{len(self.outside)} without it left ({_few(self.outside)})")
        if self.left:
            parts.append(f"plain weights taken and the averaged ones under {shortened(self.left[0], _KEY)!r} left")
        return ", ".join(parts)


def fitting_state(
    content: Mapping[Any, Any], model: nn.Module, path: object, *, strict: bool = True
) -> tuple[dict[str, Tensor], LoadReport]:
    """Returns what a checkpoint's contents hold for a model, by the model's own keys, and how it fits.

    Raises:
        CheckpointError: no state dict, nothing that matches, or (strict) not all.
    """
    copies = find_copies(content, model.state_dict())
    if not copies:
        raise CheckpointError(
            f"{path} holds no state dict; expected one at the top or under {', '.join(map(repr, USUAL_KEYS))}"
        )
    taken, *others = copies
    alike = [other for other in others if other.like(taken)]
    beside = [other for other in others if other.whole and other.keys == taken.keys]
    state, report = _fit(taken, model, alone=not beside)
    report = replace(report, left=_left(taken, others))
    if alike or not state or (strict and (report.missing or report.unexpected or report.mismatched)):
        hint = _choice(taken, alike or beside, free=not alike) if alike or beside else _hint(report, taken, model)
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {report}; {hint}")
    return state, report


def _fit(taken: Copy, model: nn.Module, *, alone: bool) -> tuple[dict[str, Tensor], LoadReport]:
    """Returns what of a copy fits, by the model's own keys; `alone` where no other whole one is beside it."""
    given = {key.removeprefix(taken.prefix): value for key, value in taken.state.items()}
    present = model.state_dict()
    own = {
        key: _kind(present[key]) if key in present and present[key].shape == shape else str(shape)
        for key, shape in _adopted_shapes(model, given).items()
    }
    fits = {key for key in own if key in given and _alike(key, _kind(given[key]), own[key])}
    for start in _factor_keys(model):  # the factors of a layer are one weight: all of them are loaded, or none
        factors = {key for key in own.keys() | given if key.startswith(start)}
        fits -= factors if factors - fits else set()
    mismatched = [(key, _kind(given[key]), own[key]) for key in own if key in given and key not in fits]
    more = [
        key for key in taken.state if key.removeprefix(taken.prefix) not in own and key.rpartition(".")[2] != _MAY_ADD
    ]
    outside = [key for key in more if alone and taken.whole and not key.startswith(taken.prefix)]
    report = LoadReport(
        matched=tuple(key for key in own if key in fits),
        missing=tuple(key for key in own if key not in given and needed(key)),
        unexpected=tuple(key for key in more if key not in outside),
        mismatched=tuple(sorted(mismatched, key=lambda entry: entry[1] == entry[2])),
        prefix=taken.prefix,
        outside=tuple(outside),
    )
    return {key: given[key] for key in report.matched}, report


def _alike(key: str, theirs: str, ours: str) -> bool:
    """Tells whether one kind can be loaded as the other. A counter may have gone through `half()` with all the rest."""
    return theirs == ours or (not needed(key) and theirs == ours.removesuffix(" integer"))


def _left(taken: Copy, others: Sequence[Copy]) -> tuple[str, ...]:
    """Returns where a file has averages that were not taken."""
    if taken.averaged:
        return ()
    nested = [".".join(copy.keys) for copy in others if copy.averaged and copy.found and copy.keys != taken.keys]
    beside = [copy.prefix for copy in others if copy.averaged and copy.whole and copy.keys == taken.keys]
    return tuple(dict.fromkeys(nested + beside))


def _choice(taken: Copy, others: Sequence[Copy], *, free: bool) -> str:
    """Says that a file holds several copies, and how to choose one."""
    names = [repr(shortened(str(copy), _KEY)) for copy in (taken, *others)]
    said = (
        f"it holds these weights {len(names)} times, under the prefixes {_few(names)}; save those that you mean alone"
    )
    return f"{said}, or load with strict=False, which takes {names[0]}" if free else said


def _hint(report: LoadReport, taken: Copy, model: nn.Module) -> str:
    """Says what is most likely wrong, and what to do about it."""
    own = model.state_dict()
    size, found = len(own), prefixes(taken.state, own)
    if _factors(report.unexpected):
        return "it holds factorized layers: tensorize the model by the same rules first"
    if _factors([key for key, *_ in report.mismatched]):
        return "its factorized layers are of another method or shape: tensorize the model by the file's rules"
    if _factors(report.missing):
        return "its layers are dense and the model's are factorized: load it before you tensorize the model"
    best = max(found, key=found.__getitem__)
    if found[best] > taken.found and 2 * found[best] >= size:
        return f"{found[best]} of its keys are the model's after the prefix {shortened(best, _KEY)!r}: take it off"
    if not (report.missing or report.unexpected) and (head := _head(report.mismatched)):
        name, theirs, ours = head
        return (
            f"its head {name!r} has {theirs} classes and the model's {ours}: build the model with num_classes {theirs}, or "
            "load with strict=False, which keeps the model's head"
        )
    if not (report.missing or report.mismatched):
        return "all of the model's entries are there: load with strict=False to leave the others"
    if 2 * len(report.matched) >= size:
        return "most of it fits: build the model with the options that the file's was built with"
    if own and all(_WRAPPED.match(key) and _WRAPPED.sub("", key) in taken.state for key in filter(needed, own)):
        return "the model is a wrapper (of torch.compile or for parallel training): give the net inside of it"
    return "is it a checkpoint of another architecture?"


def _factors(keys: Sequence[str]) -> bool:
    return any(".factors." in f".{key}" for key in keys)


def _head(mismatched: Sequence[tuple[str, str, str]]) -> tuple[str, int, int] | None:
    """Finds the one layer that differs, in its outputs alone: its name, and the outputs in the file and in the model."""
    names = {key.rpartition(".")[0] for key, *_ in mismatched}
    shapes = [[re.findall(r"\d+", kind) for kind in kinds] for _, *kinds in mismatched]
    if len(names) != 1 or not all(theirs and ours and theirs[1:] == ours[1:] for theirs, ours in shapes):
        return None
    theirs, ours = shapes[0]
    return shortened(names.pop(), _KEY), int(theirs[0]), int(ours[0])


def _adopted_shapes(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the model's state has once this one is loaded: its layers adopt the ranks of whole sets of factors."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for start, layer in _factor_keys(model).items():
        given = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        if not all(map(_holds_numbers, given.values())):
            continue
        shapes = {key: tuple(value.shape) for key, value in given.items()}
        with suppress(ValueError):
            layer.spec.of_parameters(shapes)
            own = {key: shape for key, shape in own.items() if not key.startswith(start)}
            own |= {f"{start}{key}": shape for key, shape in shapes.items()}
    return own


def _factor_keys(model: nn.Module) -> dict[str, FactorizedLayer]:
    """Returns the factorized layers of a model, by what the state dict's keys of their factors start with."""
    layers = model.named_modules(remove_duplicate=False)
    return {f"{name}.factors.".lstrip("."): layer for name, layer in layers if isinstance(layer, FactorizedLayer)}


def _holds_numbers(factor: Tensor) -> bool:
    number = factor.is_floating_point() and convertible(factor.dtype)
    return number and factor.layout is torch.strided and not factor.is_meta


def _kind(value: Tensor) -> str:
    """Returns the shape, and the kind of number and the layout where they are not the usual ones."""
    number = "" if value.is_floating_point() else " complex" if value.is_complex() else " integer"
    number = " quantized" if value.is_quantized else number if convertible(value.dtype) else f" {value.dtype}"
    layout = " without data" if value.is_meta else "" if value.layout is torch.strided else " sparse"
    return f"{tuple(value.shape)}{number}{layout}"


def _few(items: Sequence[str], count: int = 0) -> str:
    """Returns the first of some texts, of which there are `count` in all, in bounded length."""
    shown = ", ".join(shortened(item, _LIST) for item in items[:_SHOWN])
    return shortened(shown + (", ..." if max(count, len(items)) > _SHOWN else ""), _LIST)
