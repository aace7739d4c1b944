"""Reading the weights of a dense network from a file that somebody else wrote; nothing in it is ever executed."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

__all__ = ["CheckpointError", "LoadReport", "load_dense", "match_state", "read_checkpoint"]

_PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
_NESTED = ("state_dict", "model_state_dict", "model", "net")
_SHOWN = 4
_DEPTH = 4
_HINT = "is it a checkpoint of another architecture?"
# How torch says that a pickle names a class or a function that is not on its list.
_CODE = ("Unsupported global", "Unsupported class", "not an allowed global", "unrecognized function", "is blocked")


class CheckpointError(ValueError):
    """A file that cannot be read, or does not fit the model; the message says which keys and why."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_dense` did.

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


def load_dense(path: str | Path, model: nn.Module, *, strict: bool = True) -> LoadReport:
    """Loads a file's weights into a model: `.pt`, `.pth`, `.th`, `.ckpt` or `.safetensors`.

    The state dict may be nested under a usual key and its keys may carry usual prefixes (`module.`, `model.`, `net.`,
    `_orig_mod.`, in any combination). Buffers that only count batches may be missing.

    Args:
        path: the file.
        model: gets the weights, in place; unchanged when an error is raised.
        strict: whether everything must match; without it what matches is loaded and the report says the rest.

    Raises:
        CheckpointError: no such file, not a checkpoint, code in it, nothing that matches, or (strict) not all.
    """
    path = Path(path)
    state = _tensors(read_checkpoint(path))
    if not state:
        raise CheckpointError(
            f"{path} holds no state dict; expected one at the top or under {', '.join(map(repr, _NESTED))}"
        )
    report = match_state(state, model, path, strict=strict)
    stripped = {key.removeprefix(report.prefix): value for key, value in state.items()}
    try:
        model.load_state_dict({key: stripped[key] for key in report.matched}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from None
    return report


def match_state(state: Mapping[str, Tensor], model: nn.Module, path: object, *, strict: bool = True) -> LoadReport:
    """How a state dict fits a model.

    Raises:
        CheckpointError: nothing matches, or (strict) not all.
    """
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
    return report


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU; only tensors and plain values are accepted.

    Raises:
        CheckpointError: the file is missing, torn, no checkpoint, or wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a .pt, .pth, .th, .ckpt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of odd pickles that it then refuses
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file can make a parser raise
        if any(sign in str(error) for sign in _CODE) or ("Unsupported operand" in str(error) and _is_pickle(path)):
            raise CheckpointError(
                f"{path} was refused: it holds more than tensors and plain values, and loading it could run code; "
                "save the state_dict alone and try again"
            ) from None
        raise CheckpointError(f"{path} is not a checkpoint, or it is truncated; copy or save it again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict")
    return dict(content)


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
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


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
