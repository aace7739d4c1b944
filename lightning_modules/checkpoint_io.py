"""Checkpoints that are written whole or not at all."""

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from tnlayers.files import PARTIAL, write_files

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place, to the disk, and only then under its name.

    A process that is killed while it writes, or a disk that is full, leaves the checkpoint of that name as it was. What
    killed processes left behind goes at the next save to the same folder. Paths with a scheme (s3://) are Lightning's.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """
        Raises:
            UserError: the file cannot be written; the message names it and says why.
        """
        if "://" in str(path) or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        content = io.BytesIO()  # torch's own writer aborts the process where a file cannot grow
        torch.save(checkpoint, content)
        with suppress(OSError):
            for left in path.parent.glob(f".*{path.suffix}{PARTIAL}"):
                if left.is_file():
                    left.unlink(missing_ok=True)
        write_files(path.parent, {path.name: content.getbuffer()})

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = lambda storage, loc: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """Loads tensors and plain values only, whatever `weights_only` is."""
        return super().load_checkpoint(path, map_location, weights_only=True)
