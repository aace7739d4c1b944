"""The pictures of an archive, decoded once and kept on the device.

Shapes: n pictures, c channels, h rows, w columns.
"""

import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from lightning_modules.data.augment import crop_flip, normalise

__all__ = ["Part", "read"]

# Of the published ResNet-20, which are ImageNet's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Part:
    """The pictures of one part: uint8 (n, c, h, w), and their labels, int64 (n,)."""

    pictures: Tensor
    labels: Tensor

    def epoch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns all pictures in a random order, shifted and mirrored at random, as float32 in channels last, and their labels."""
        order = torch.randperm(len(self.labels), device=self.labels.device, generator=generator)
        x = crop_flip(self.pictures[order], generator=generator)
        return _ready(x), self.labels[order]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the pictures as they are."""
        for x, y in zip(self.pictures.split(size), self.labels.split(size), strict=True):
            yield _ready(x), y


def _ready(x: Tensor) -> Tensor:
    return normalise(x, MEAN, STD).contiguous(memory_format=torch.channels_last)


def read(archive: Path, device: torch.device) -> dict[str, Part]:
    """Reads train/<class>/*.jpg and test/<class>/*.jpg; the classes are numbered in the order of their names."""
    found: dict[str, list[tuple[str, bytes]]] = {"train": [], "test": []}
    with tarfile.open(archive) as files:
        for member in files:
            part, name, *_ = (*PurePosixPath(member.name).parts[-3:], "", "")
            if member.isfile() and part in found and (file := files.extractfile(member)):
                found[part].append((name, file.read()))
    classes = {name: number for number, name in enumerate(sorted({name for name, _ in found["train"]}))}
    parts = {}
    with ThreadPoolExecutor() as pool:
        for part, pictures in found.items():
            decoded = list(pool.map(_decode, (content for _, content in pictures), chunksize=500))
            labels = torch.tensor([classes[name] for name, _ in pictures], device=device)
            parts[part] = Part(torch.stack(decoded).to(device), labels)
    return parts


def _decode(content: bytes) -> Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
