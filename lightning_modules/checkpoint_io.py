"""Checkpoints that are written whole or not at all."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

__all__ = ["AtomicCheckpointIO"]

_SUFFIX = ".partial"  # nothing that looks for checkpoints takes it for one


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place, to the disk, and only then under its name.

    A process that is killed while it writes, or a disk that is full, leaves the checkpoint of that name as it was. What
    killed processes left behind goes at the next save to the same folder. Paths with a scheme (s3://) are Lightning's.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """
        Raises:
            OSError: the file cannot be written; the message names it and says why.
        """
        if "://" in str(path) or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        content = io.BytesIO()  # torch's own writer aborts the process where a file cannot grow
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".*{path.suffix}{_SUFFIX}"):
                if left.is_file():
                    left.unlink(missing_ok=True)
            _write(path, content)
        except OSError as error:
            raise OSError(
                f"cannot write the checkpoint {path}: {error.strerror}; checkpoints that were saved before it are intact"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = lambda storage, loc: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """Tensors and plain values only, whatever `weights_only` is."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def _write(path: Path, content: io.BytesIO) -> None:
    temporary = path.with_name(f".{path.name}{_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too, is on the disk
    finally:
        os.close(folder)
