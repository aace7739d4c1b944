"""Files of weights, and of the structure that goes with them: ours, and those that somebody else wrote.

Nothing in a file is ever executed. A tensorized network is saved as a plain .safetensors file, whose metadata holds the
description of `tnlayers.saved_layers`.
"""

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tnlayers.errors import CheckpointError, UserError, as_checkpoint_error, shortened
from tnlayers.files import write_files
from tnlayers.matching import LoadReport, matching_state
from tnlayers.opened import close_in_place, replace_layers
from tnlayers.saved_layers import check_plain, restructure, structure_of

__all__ = ["load_checkpoint", "read_checkpoint", "save_safetensors"]

_METADATA = "tnlayers"

# How torch says that a pickle names a class or a function that is not on its list.
_CODE = ("Unsupported global", "Unsupported class", "not an allowed global", "unrecognized function", "is blocked")


def save_safetensors(model: nn.Module, path: str | Path, hyper_parameters: Mapping[str, Any] | None = None) -> None:
    """Saves a network with its structure; `load_checkpoint` reads it into a freshly built dense one.

    The file is there in whole or not at all, and what was there before is replaced. Any reader of safetensors sees the
    tensors of the state dict; those that several keys share are stored once. Where a model is sharded over processes, as FSDP
    does it, every process has to call this: the whole tensors are gathered, and the first process writes them.

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
    writes = True
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise UserError(f"{key} is no ordinary tensor, and safetensors holds nothing else")
        own = _own_part(value)
        owner = owners.setdefault((own.data_ptr(), own.device, own.dtype, value.shape, value.stride()), key)
        if owner != key:
            shared[key] = owner
        elif own is value:
            tensors[key] = value.detach().cpu().contiguous().clone()
        else:
            tensors[key] = value.full_tensor().detach().cpu().contiguous()  # type: ignore[attr-defined]
            writes = torch.distributed.get_rank() == 0
    about = {"tensorization": structure_of(model), "shared": shared, "hyper_parameters": dict(hyper_parameters or {})}
    check_plain(about)
    metadata = {"format": "pt", _METADATA: json.dumps(about, allow_nan=False)}
    if writes:
        write_files(path.parent, {path.name: save(tensors, metadata)})


def _own_part(value: Tensor) -> Tensor:
    """Returns what this process holds of a tensor: a part where it is sharded, else the tensor itself."""
    return value.to_local() if hasattr(value, "to_local") else value


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
    close_in_place(model)  # whose keys are then those of any other file
    replaced = restructure(model, content.get("tensorization"), path)
    if not strict:
        for layer in replaced.values():  # the file may lack some of their weights
            layer.reset_parameters()  # type: ignore[operator]
    try:
        state, report = matching_state(content, model, path, strict=strict)
        model.load_state_dict(state, strict=False)
    except (CheckpointError, RuntimeError) as error:
        replace_layers(model, {new: old for old, new in replaced.items()})
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {shortened(str(error), 220)}") from error
    return report


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads the contents of a checkpoint file to the CPU; only tensors and plain values are accepted.

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
    """Returns what torch.load gives, of a file that is whole and no larger in memory than on the disk."""
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
    """Returns the contents of a file of `save_safetensors`, in the form of the other checkpoints."""
    with as_checkpoint_error(f"{path} has a description that is not understood"):
        try:
            about = json.loads(description)
        except RecursionError:
            raise UserError("it is nested too deeply") from None
        except ValueError as error:
            raise UserError(str(error)) from error
        check_plain(about)
        shared = about.get("shared", {}) if isinstance(about, dict) else None
        if not isinstance(shared, dict) or not all(isinstance(key, str) and key in tensors for key in shared.values()):
            raise UserError("expected a mapping whose 'shared' names tensors of the file")
    state = {**tensors, **{key: tensors[owner] for key, owner in shared.items()}}
    return {"state_dict": state} | {key: about.get(key) for key in ("tensorization", "hyper_parameters")}


def _is_pickle(path: Path) -> bool:
    """Tells whether the file is a bare pickle, of a kind that torch never writes."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"
