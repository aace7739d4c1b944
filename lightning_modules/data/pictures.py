"""Labelled pictures in memory, read a whole batch at a time.

Shapes: N pictures, B of them in a batch, C channels, H rows, W columns.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["NO_LABEL", "Batch", "PictureSet", "Pictures", "as_is"]

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")

NO_LABEL = -100
"""The label of an entry that counts for nothing; what torch's losses ignore."""


def as_is(batch: T) -> T:
    """Collates nothing: the batches of a `PictureSet` are whole already."""
    return batch


class PictureSet(Dataset[Batch]):
    """Pictures and their labels; a subclass reads any choice of them at once.

    `DataLoader` hands a batch's indices to `__getitems__` in one call.

    Args:
        labels: int64 (N,).
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        pictures, labels = self.__getitems__([index])
        return pictures[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns uint8 (B, C, H, W) and int64 (B,)."""
        raise NotImplementedError


class Pictures(PictureSet):
    """Pictures held in memory.

    Args:
        pictures: uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        super().__init__(labels)
        self.pictures = pictures

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return self.pictures[chosen], self.labels[chosen]
