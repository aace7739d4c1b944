"""Files of weights, and of the structure that goes with them: ours, and those that somebody else wrote.

Nothing in a file is ever executed. A tensorized network is saved as a plain .safetensors file, whose metadata holds the
description of `tnlayers.saved_layers`.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tnlayers.errors import CheckpointError, UserError, as_checkpoint_error, shortened
from tnlayers.files import write_files
from tnlayers.saved_layers import adopted_shapes, check_plain, factor_keys, restructure, structure_of
from tnlayers.state_dicts import USUAL_KEYS, Copy, convertible, find_copies, needed, prefixes
from tnlayers.surgery import replace_layers

__all__ = ["LoadReport", "fitting_state", "load_checkpoint", "read_checkpoint", "save_safetensors"]

_METADATA = "tnlayers"

# torch's AveragedModel has a counter of its own.
_MAY_ADD = "n_averaged"
_WRAPPED = re.compile(r"(?:_orig_mod\.|module\.)+")
_SHOWN = 4
_KEY = 60
_LIST = 220
# How torch says that a pickle names a class or a function that is not on its list.
_CODE = ("Unsupported global", "Unsupported class", "not an allowed global", "unrecognized function", "is blocked")


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


def save_safetensors(model: nn.Module, path: str | Path, hyper_parameters: Mapping[str, Any] | None = None) -> None:
    """Saves a network with its structure; `load_checkpoint` reads it into a freshly built dense one.

    The file is there in whole or not at all, and what was there before is replaced. Any reader of safetensors sees the
    tensors of the state dict; those that several keys share are stored once.

    Args:
        model: dense or tensorized.
        path: a name that ends in .safetensors.
        hyper_parameters: further plain values for `read_checkpoint` to give back.

    Raises:
        UserError: another suffix, an entry of the state dict that is no ordinary tensor, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: No such file or directory; make its folder first")
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[Any, str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise UserError(f"{key} is no ordinary tensor, and safetensors holds nothing else")
        owner = owners.setdefault((value.data_ptr(), value.device, value.dtype, value.shape, value.stride()), key)
        if owner == key:
            tensors[key] = value.detach().cpu().contiguous().clone()
        else:
            shared[key] = owner
    about = {"tensorization": structure_of(model), "shared": shared, "hyper_parameters": dict(hyper_parameters or {})}
    check_plain(about)
    metadata = {"format": "pt", _METADATA: json.dumps(about, allow_nan=False)}
    write_files(path.parent, {path.name: save(tensors, metadata)})


def load_checkpoint(path: str | Path, model: nn.Module, *, strict: bool = True) -> LoadReport:
    """Loads a file's weights into a model, and its structure: `.pt`, `.pth`, `.th`, `.ckpt` or `.safetensors`.

    A file of ours says which layers are tensorized, and how: the model's layers become those, whatever they were. Any other
    file has to have the model's own, of which factorized ones may have other ranks: the model's layers adopt those. The state
    dict may be nested under a usual key and its keys may carry usual prefixes (`module.`, `model.`, `net.`, `_orig_mod.`,
    `ema_model.`, `ema.`, in any combination), or either may be any other under which all the model's keys are found. Averaged
    weights (`state_dict_ema`, `model_ema`, `ema`) are taken where a file has no plain ones. Of copies that nothing but their
    names tells apart (`student`, `teacher`) none is taken: save the one that you mean alone. Counters of batches may be missing.

    Args:
        path: the file.
        model: gets the weights, in place; unchanged when an error is raised.
        strict: whether everything must match; without it what matches is loaded and the report says the rest.

    Raises:
        CheckpointError: no such file, not a checkpoint, code in it, nothing that matches, or (strict) not all.
    """
    path = Path(path)
    content = read_checkpoint(path)
    replaced = restructure(model, content.get("tensorization"), path)
    if not strict:
        for layer in replaced.values():  # the file may lack some of their weights
            layer.reset_parameters()  # type: ignore[operator]
    try:
        state, report = fitting_state(content, model, path, strict=strict)
        model.load_state_dict(state, strict=False)
    except (CheckpointError, RuntimeError) as error:
        replace_layers(model, {new: old for old, new in replaced.items()})
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {shortened(str(error), _LIST)}") from None
    return report


def fitting_state(
    content: Mapping[Any, Any], model: nn.Module, path: object, *, strict: bool = True
) -> tuple[dict[str, Tensor], LoadReport]:
    """What a checkpoint's contents hold for a model, by the model's own keys, and how it fits.

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
    """What of a copy fits, by the model's own keys; whether no other whole one is beside it."""
    given = {key.removeprefix(taken.prefix): value for key, value in taken.state.items()}
    present = model.state_dict()
    own = {
        key: _kind(present[key]) if key in present and present[key].shape == shape else str(shape)
        for key, shape in adopted_shapes(model, given).items()
    }
    fits = {key for key in own if key in given and _alike(key, _kind(given[key]), own[key])}
    for start in factor_keys(model):  # the factors of a layer are one weight: all of them are loaded, or none
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
    """Whether one kind can be loaded as the other. A counter may have gone through `half()` with all the rest."""
    return theirs == ours or (not needed(key) and theirs == ours.removesuffix(" integer"))


def _left(taken: Copy, others: Sequence[Copy]) -> tuple[str, ...]:
    """Where a file has averages that were not taken."""
    if taken.averaged:
        return ()
    nested = [".".join(copy.keys) for copy in others if copy.averaged and copy.found and copy.keys != taken.keys]
    beside = [copy.prefix for copy in others if copy.averaged and copy.whole and copy.keys == taken.keys]
    return tuple(dict.fromkeys(nested + beside))


def _choice(taken: Copy, others: Sequence[Copy], *, free: bool) -> str:
    """That a file holds several copies, and how to choose one."""
    names = [repr(shortened(str(copy), _KEY)) for copy in (taken, *others)]
    said = (
        f"it holds these weights {len(names)} times, under the prefixes {_few(names)}; save those that you mean alone"
    )
    return f"{said}, or load with strict=False, which takes {names[0]}" if free else said


def _hint(report: LoadReport, taken: Copy, model: nn.Module) -> str:
    """What is most likely wrong, and what to do about it."""
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
    """The one layer that differs, and in its outputs alone: its name, and the outputs in the file and in the model."""
    names = {key.rpartition(".")[0] for key, *_ in mismatched}
    shapes = [[re.findall(r"\d+", kind) for kind in kinds] for _, *kinds in mismatched]
    if len(names) != 1 or not all(theirs and ours and theirs[1:] == ours[1:] for theirs, ours in shapes):
        return None
    theirs, ours = shapes[0]
    return shortened(names.pop(), _KEY), int(theirs[0]), int(ours[0])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU; only tensors and plain values are accepted.

    Raises:
        CheckpointError: the file is missing, torn, no checkpoint, or wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"no checkpoint at {path}"
        raise CheckpointError(f"{what}; expected a .pt, .pth, .th, .ckpt or .safetensors file")
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    description = None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as stored:
                description = (stored.metadata() or {}).get(_METADATA)
                content = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (it is no mapping)
        else:
            content = _load(path)
    except Exception as error:  # whatever a file can make a parser raise
        if any(sign in str(error) for sign in _CODE) or ("Unsupported operand" in str(error) and _is_pickle(path)):
            raise CheckpointError(
                f"{path} was refused: it holds more than tensors and plain values, and loading it could run code; "
                "save the state_dict alone and try again"
            ) from None
        raise CheckpointError(
            f"{path} is not a checkpoint, or it is truncated or damaged; copy or save it again"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict")
    return dict(content) if description is None else _described(content, description, path)


def _load(path: Path) -> Any:
    """What torch.load gives, of a file that is whole and no larger in memory than on the disk."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise UserError("torch does not compress; this could fill the memory")
            if any(part.CRC for part in parts) and archive.testzip():  # torch writes the sums, and does not check them
                raise UserError("the contents are not what was written")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of odd pickles that it then refuses
        return torch.load(path, map_location="cpu", weights_only=True)


def _described(tensors: Mapping[str, Tensor], description: str, path: Path) -> dict[str, Any]:
    """The contents of a file of `save_safetensors`, in the form of the other checkpoints."""
    with as_checkpoint_error(f"{path} has a description that is not understood"):
        try:
            about = json.loads(description)
        except RecursionError:
            raise UserError("it is nested too deeply") from None
        check_plain(about)
        shared = about.get("shared", {}) if isinstance(about, dict) else None
        if not isinstance(shared, dict) or not all(isinstance(key, str) and key in tensors for key in shared.values()):
            raise UserError("expected a mapping whose 'shared' names tensors of the file")
    state = {**tensors, **{key: tensors[owner] for key, owner in shared.items()}}
    return {"state_dict": state} | {key: about.get(key) for key in ("tensorization", "hyper_parameters")}


def _is_pickle(path: Path) -> bool:
    """Whether the file is a bare pickle, of a kind that torch never writes."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"


def _kind(value: Tensor) -> str:
    """The shape, and the kind of number and the layout where they are not the usual ones."""
    number = "" if value.is_floating_point() else " complex" if value.is_complex() else " integer"
    number = " quantized" if value.is_quantized else number if convertible(value.dtype) else f" {value.dtype}"
    layout = " without data" if value.is_meta else "" if value.layout is torch.strided else " sparse"
    return f"{tuple(value.shape)}{number}{layout}"


def _few(items: Sequence[str], count: int = 0) -> str:
    """The first of some texts, of which there are `count` in all, in bounded length."""
    shown = ", ".join(shortened(item, _LIST) for item in items[:_SHOWN])
    return shortened(shown + (", ..." if max(count, len(items)) > _SHOWN else ""), _LIST)
