"""Which entries of a file match a model's own, and what is most likely wrong where they do not."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.errors import CheckpointError, UserError, shortened
from tnlayers.factorized import FactorizedLayer
from tnlayers.state_dicts import USUAL_KEYS, Copy, find_copies, needed, prefixes

__all__ = ["LoadReport", "matching_state"]

# torch's AveragedModel has a counter of its own.
_MAY_ADD = "n_averaged"
_WRAPPED = re.compile(r"(?:_orig_mod\.|module\.)+")
_SHOWN, _KEY, _LIST = 4, 60, 220  # entries, and characters of one and of all of them

Kind = tuple[tuple[int, ...], str]
"""The shape of an entry, and what is unusual about its numbers and its layout."""


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
                f"{shortened(key, _KEY)}: {theirs} in the file, {ours} in the model"
                if theirs != ours
                else f"{shortened(key, _KEY)}: left with its layer's other factors"
                for key, theirs, ours in self.mismatched
            ]
            parts.append(f"{len(shapes)} of another shape ({_few(shapes)})")
        if self.prefix:
            parts.append(f"prefix {shortened(self.prefix, _KEY)!r} taken off")
        if self.outside:
            parts.append(f"{len(self.outside)} without it left ({_few(self.outside)})")
        if self.left:
            parts.append(f"plain weights taken and the averaged ones under {shortened(self.left[0], _KEY)!r} left")
        return ", ".join(parts)


def matching_state(
    content: Mapping[Any, Any], model: nn.Module, path: object, *, strict: bool = True
) -> tuple[dict[str, Tensor], LoadReport]:
    """Returns what a checkpoint's contents hold for a model, by the model's own keys, and how it matches.

    Raises:
        CheckpointError: no state dict, nothing that matches, or (strict) not all.
    """
    own = model.state_dict()
    copies = find_copies(content, own)
    if not copies:
        raise CheckpointError(
            f"{path} holds no state dict; expected one at the top or under {', '.join(map(repr, USUAL_KEYS))}"
        )
    taken, *others = copies
    equals = [other for other in others if other.whole and other.preference == taken.preference]
    rivals = equals or [other for other in others if other.whole and other.keys == taken.keys]
    state, report = _match(taken, others, model, own, alone=not rivals)
    if equals or not state or (strict and (report.missing or report.unexpected or report.mismatched)):
        hint = _choice([taken, *rivals], free=not equals) if rivals else _hint(report, taken, own)
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {report}; {hint}")
    return state, report


def _match(
    taken: Copy, others: Sequence[Copy], model: nn.Module, own: Mapping[str, Tensor], *, alone: bool
) -> tuple[dict[str, Tensor], LoadReport]:
    """Returns what of a copy matches, by the model's own keys. If it is alone, what stands outside of it is no fault."""
    given = {key.removeprefix(taken.prefix): value for key, value in taken.state.items()}
    theirs, factors = {key: _kind(value) for key, value in given.items()}, _factor_keys(model)
    ours = _adopted(factors, theirs, {key: _kind(value) for key, value in own.items()})
    matched = {key for key in ours.keys() & theirs if _alike(key, theirs[key], ours[key])}
    for start in factors:  # the factors of a layer are one weight: all of them are loaded, or none
        of_layer = {key for key in ours.keys() | theirs if key.startswith(start)}
        matched -= of_layer if of_layer - matched else set()
    more = [
        key for key in taken.state if key.removeprefix(taken.prefix) not in ours and key.rpartition(".")[2] != _MAY_ADD
    ]
    outside = [key for key in more if alone and taken.whole and not key.startswith(taken.prefix)]
    mismatched = [(key, _text(theirs[key]), _text(ours[key])) for key in ours if key in theirs and key not in matched]
    averages = [other for other in others if other.averaged and not taken.averaged]
    report = LoadReport(
        matched=tuple(key for key in ours if key in matched),
        missing=tuple(key for key in ours if key not in theirs and needed(key)),
        unexpected=tuple(key for key in more if key not in outside),
        mismatched=tuple(sorted(mismatched, key=lambda entry: entry[1] == entry[2])),
        prefix=taken.prefix,
        left=tuple(
            dict.fromkeys(
                copy.prefix if copy.keys == taken.keys else ".".join(copy.keys)
                for copy in averages
                if copy.whole or (copy.found and copy.keys != taken.keys)
            )
        ),
        outside=tuple(outside),
    )
    return {key: given[key] for key in report.matched}, report


def _adopted(
    factors: Mapping[str, FactorizedLayer], theirs: Mapping[str, Kind], ours: Mapping[str, Kind]
) -> dict[str, Kind]:
    """Returns what the model's entries will be like: its layers adopt the ranks of whole sets of factors."""
    adopted = dict(ours)
    for start, layer in factors.items():
        given = {key: kind for key, kind in theirs.items() if key.startswith(start)}
        if any(unusual for _, unusual in given.values()):
            continue
        with suppress(UserError):
            layer.spec.of_parameters({key.removeprefix(start): shape for key, (shape, _) in given.items()})
            adopted = {key: kind for key, kind in adopted.items() if not key.startswith(start)}
            for key, kind in given.items():
                adopted[key] = ours[key] if key in ours and ours[key][0] == kind[0] else kind
    return adopted


def _factor_keys(model: nn.Module) -> dict[str, FactorizedLayer]:
    """Returns the factorized layers of a model, by what the state dict's keys of their factors start with."""
    layers = model.named_modules(remove_duplicate=False)
    return {f"{name}.factors.".lstrip("."): layer for name, layer in layers if isinstance(layer, FactorizedLayer)}


def _kind(value: Tensor) -> Kind:
    number = "" if value.is_floating_point() else " complex" if value.is_complex() else " integer"
    number = " quantized" if value.is_quantized else number if _convertible(value.dtype) else f" {value.dtype}"
    layout = " without data" if value.is_meta else "" if value.layout is torch.strided else " sparse"
    return tuple(value.shape), number + layout


def _text(kind: Kind) -> str:
    shape, unusual = kind
    return f"{shape}{unusual}"


@cache
def _convertible(dtype: torch.dtype) -> bool:
    """Tells whether torch can make other numbers of these; of some packed ones it cannot."""
    if not dtype.is_floating_point:
        return True
    try:
        torch.empty(1, dtype=dtype).to(torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _alike(key: str, theirs: Kind, ours: Kind) -> bool:
    """Tells whether one kind can be loaded as the other. A counter may have gone through `half()` with all the rest."""
    return theirs == ours or (not needed(key) and (theirs[1], *ours) == ("", theirs[0], " integer"))


def _choice(copies: Sequence[Copy], *, free: bool) -> str:
    """Says that a file holds several copies, and how to choose one."""
    names = [repr(shortened(str(copy), _KEY)) for copy in copies]
    said = (
        f"it holds these weights {len(names)} times, under the prefixes {_few(names)}; save those that you mean alone"
    )
    return f"{said}, or load with strict=False, which takes {names[0]}" if free else said


def _hint(report: LoadReport, taken: Copy, own: Mapping[str, Tensor]) -> str:
    """Says what is most likely wrong, and what to do about it."""
    size, found = len(own), prefixes(taken.state, own)
    mismatched = [key for key, *_ in report.mismatched]
    if _factors(report.unexpected):
        return "it holds factorized layers: tensorize the model by the same rules first"
    if _factors(mismatched):
        return "its factorized layers are of another method or shape: tensorize the model by the file's rules"
    if _factors(report.missing):
        return "its layers are dense and the model's are factorized: load it before you tensorize the model"
    best = max(found, key=found.__getitem__)
    if found[best] > taken.found and 2 * found[best] >= size:
        return f"{found[best]} of its keys are the model's after the prefix {shortened(best, _KEY)!r}: take it off"
    shapes = [(taken.state[report.prefix + key].shape, own[key].shape) for key in mismatched]
    layers = {key.rpartition(".")[0] for key in mismatched}
    if len(layers) == 1 and not (report.missing or report.unexpected) and all(starmap(_other_outputs, shapes)):
        theirs, ours = shapes[0]
        return (
            f"its head {shortened(layers.pop(), _KEY)!r} has {theirs[0]} classes and the model's {ours[0]}: build the model "
            f"with num_classes {theirs[0]}, or load with strict=False, which keeps the model's head"
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


def _other_outputs(theirs: torch.Size, ours: torch.Size) -> bool:
    """Tells whether two shapes differ in the number of outputs, and in nothing else."""
    return bool(theirs and ours) and theirs[0] != ours[0] and theirs[1:] == ours[1:]


def _few(items: Sequence[str]) -> str:
    """Returns the first of some texts, in bounded length."""
    shown = ", ".join(shortened(item, _LIST) for item in items[:_SHOWN])
    return shortened(shown + (", ..." if len(items) > _SHOWN else ""), _LIST)
