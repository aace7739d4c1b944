"""Files of weights, and of the structure that goes with them: ours, and those that somebody else wrote.

Nothing in a file is ever executed. A tensorized network is saved as a plain .safetensors file, whose metadata holds the
description of `tnlayers.structure`.
"""

import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tnlayers.structure import CheckpointError, check_plain, naming, restructure, structure_of
from tnlayers.surgery import replace_layers

__all__ = ["LoadReport", "fitting_state", "load_checkpoint", "read_checkpoint", "save_safetensors"]

_METADATA = "tnlayers"

_PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
_NESTED = ("state_dict", "model_state_dict", "model", "net")
_SHOWN = 4
_DEPTH = 4
_HINT = "is it a checkpoint of another architecture?"
# How torch says that a pickle names a class or a function that is not on its list.
_CODE = ("Unsupported global", "Unsupported class", "not an allowed global", "unrecognized function", "is blocked")


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        matched: keys of the model that were loaded.
        missing: keys of the model that the file does not have.
        unexpected: keys of the file that the model does not have, as they stand in the file.
        mismatched: keys that both have with another shape or kind of number: (key, the file's, the model's).
        prefix: what was taken off the file's keys.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, str, str], ...]
    prefix: str

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} entries matched"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_few(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected ({_few(self.unexpected)})")
        if self.mismatched:
            shapes = [f"{key}: {theirs} in the file, {ours} in the model" for key, theirs, ours in self.mismatched]
            parts.append(f"{len(self.mismatched)} of another shape ({_few(shapes)})")
        if self.prefix:
            parts.append(f"prefix {self.prefix!r} taken off")
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
        ValueError: another suffix, or an entry of the state dict that is no ordinary tensor.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[Any, str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise ValueError(f"{key} is no ordinary tensor, and safetensors holds nothing else")
        owner = owners.setdefault((value.data_ptr(), value.device, value.dtype, value.shape, value.stride()), key)
        if owner == key:
            tensors[key] = value.detach().cpu().contiguous().clone()
        else:
            shared[key] = owner
    about = {"tensorization": structure_of(model), "shared": shared, "hyper_parameters": dict(hyper_parameters or {})}
    check_plain(about)
    metadata = {"format": "pt", _METADATA: json.dumps(about, allow_nan=False)}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
            whole = Path(folder) / path.name
            with open(whole, "wb") as file:  # readable as the umask says, which not every version of `save_file` heeds
                file.write(save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(whole, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None


def load_checkpoint(path: str | Path, model: nn.Module, *, strict: bool = True) -> LoadReport:
    """Loads a file's weights into a model, and its structure: `.pt`, `.pth`, `.th`, `.ckpt` or `.safetensors`.

    A file of ours says which layers are tensorized, and how: the model's layers become those, whatever they were. Any other
    file has to have the model's own. The state dict may be nested under a usual key and its keys may carry usual prefixes
    (`module.`, `model.`, `net.`, `_orig_mod.`, in any combination). Buffers that only count batches may be missing.

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
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from None
    return report


def fitting_state(
    content: Mapping[Any, Any], model: nn.Module, path: object, *, strict: bool = True
) -> tuple[dict[str, Tensor], LoadReport]:
    """What a checkpoint's contents hold for a model, by the model's own keys, and how it fits.

    Raises:
        CheckpointError: no state dict, nothing that matches, or (strict) not all.
    """
    state = _tensors(content)
    if not state:
        raise CheckpointError(
            f"{path} holds no state dict; expected one at the top or under {', '.join(map(repr, _NESTED))}"
        )
    own = model.state_dict()
    prefix = _prefix(state, own)
    stripped = {key.removeprefix(prefix): value for key, value in state.items()}
    same = [key for key in own if key in stripped and _kind(stripped[key]) == _kind(own[key])]
    report = LoadReport(
        matched=tuple(same),
        missing=tuple(key for key in own if key not in stripped and not key.endswith("num_batches_tracked")),
        unexpected=tuple(key for key in state if key.removeprefix(prefix) not in own),
        mismatched=tuple(
            (key, _kind(stripped[key]), _kind(own[key])) for key in own if key in stripped and key not in same
        ),
        prefix=prefix,
    )
    if not report.matched or (strict and (report.missing or report.unexpected or report.mismatched)):
        tensorized = any(".factors." in f".{key}" for key in report.unexpected)
        hint = "it holds factorized layers: tensorize the model by the same rules first" if tensorized else _HINT
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {report}; {hint}")
    return {key: stripped[key] for key in same}, report


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
                raise ValueError("torch does not compress; this could fill the memory")
            if any(part.CRC for part in parts) and archive.testzip():  # torch writes the sums, and does not check them
                raise ValueError("the contents are not what was written")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of odd pickles that it then refuses
        return torch.load(path, map_location="cpu", weights_only=True)


def _described(tensors: Mapping[str, Tensor], description: str, path: Path) -> dict[str, Any]:
    """The contents of a file of `save_safetensors`, in the form of the other checkpoints."""
    with naming(f"{path} has a description that is not understood"):
        try:
            about = json.loads(description)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        check_plain(about)
        shared = about.get("shared", {}) if isinstance(about, dict) else None
        if not isinstance(shared, dict) or not all(isinstance(key, str) and key in tensors for key in shared.values()):
            raise ValueError("expected a mapping whose 'shared' names tensors of the file")
    state = {**tensors, **{key: tensors[owner] for key, owner in shared.items()}}
    return {"state_dict": state} | {key: about.get(key) for key in ("tensorization", "hyper_parameters")}


def _is_pickle(path: Path) -> bool:
    """Whether the file is a bare pickle, of a kind that torch never writes."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The state dict in a checkpoint: at the top, or nested under the usual keys."""
    for _ in range(_DEPTH):
        nested = [content[key] for key in _NESTED if isinstance(content.get(key), Mapping)]
        if not nested:
            break
        content = nested[0]
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not value.is_meta
    }


def _prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The combination of the usual prefixes that makes most of the file's keys the model's."""
    found = {""}
    for key in state:
        rest = key
        while start := next((prefix for prefix in _PREFIXES if rest.startswith(prefix)), None):
            rest = rest.removeprefix(start)
            found.add(key.removesuffix(rest))
    return max(
        sorted(found, key=len),
        key=lambda prefix: sum(key.removeprefix(prefix) in own for key in state if key.startswith(prefix)),
    )


def _kind(value: Tensor) -> str:
    """The shape, and the kind of number where it is not the usual one."""
    number = "" if value.is_floating_point() else " complex" if value.is_complex() else " integer"
    return f"{tuple(value.shape)}{number}{'' if value.layout is torch.strided else ' sparse'}"


def _few(items: tuple[str, ...] | list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
