"""What a long job has done so far, in a file: a job that was killed goes on there and ends in the same model."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnlayers.errors import UserError
from tnlayers.files import write_files
from tnlayers.tracing import factorized_layers, tensors_in

__all__ = ["digest", "read_interim", "write_interim"]


def digest(*values: Any) -> str:
    """Returns what tells tensors, in any nesting, from others of the same shapes."""
    found = hashlib.sha256()
    for tensor in tensors_in(values):
        found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_interim(path: Path, model: nn.Module, recipe: Mapping[str, Any], done: list[Any]) -> None:
    """Writes a model's state, what it was made by and what is done, as plain values; whole or not at all."""
    errors = {name: layer.decomposition_error for name, layer in factorized_layers(model).items()}
    content = {"state": model.state_dict(), "errors": errors, "recipe": dict(recipe), "done": done}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_files(path.parent, {path.name: buffer.getbuffer()})


def read_interim(path: Path, model: nn.Module, recipe: Mapping[str, Any]) -> list[Any]:
    """Gives a model the state of a file and returns what is done; nothing where there is no file.

    Raises:
        UserError: the file is of another job, or is none of these.
    """
    if not path.exists():
        return []
    expected = f"{path}: expected what a job like this one has left there; give another name, or remove it"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        theirs, done, errors = content["recipe"], content["done"], content["errors"]
    except Exception as error:  # whatever the file holds
        raise UserError(expected) from error
    if other := [key for key in recipe if theirs.get(key) != recipe[key]]:
        raise UserError(f"{expected}: there {other[0]} is {theirs.get(other[0])!r}, here {recipe[other[0]]!r}")
    own = model.state_dict()
    if {key: value.shape for key, value in own.items()} != {key: v.shape for key, v in content["state"].items()}:
        raise UserError(f"{expected}: its layers have other ranks")
    model.load_state_dict(content["state"])
    for name, layer in factorized_layers(model).items():
        layer.decomposition_error = errors.get(name)
    return list(done)
