"""Features of batches, kept in memory as far as they fit there, else in files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnlayers.tracing import map_tensors, tensors_in

__all__ = ["Features", "Part"]

_IN_MEMORY = 2 << 30  # bytes; what is more lies in files


class Features:
    """Tensors in any nesting, one item a batch.

    Args:
        folder: where those lie that do not fit into memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._bytes = folder, 0
        self._kept: list[Any] = []

    def append(self, features: Any) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(features))
        if self._bytes + size > _IN_MEMORY:
            path = self._folder / f"{len(self._kept)}.pt"
            torch.save(features, path)
            features = path
        else:
            self._bytes += size
        self._kept.append(features)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: int) -> Any:
        kept = self._kept[place]
        return torch.load(kept, weights_only=True) if isinstance(kept, Path) else kept

    def drawn(self, places: Sequence[int], seed: int, wanted: Callable[[Any], Any]) -> Iterator[Any]:
        """Yields batches without end, of samples in random order; where samples cannot be told apart, the batches as they are.

        Args:
            places: of the batches that take part.
            seed: of the order.
            wanted: what to take of each.
        """
        generator = torch.Generator().manual_seed(seed)
        in_memory = not any(isinstance(self._kept[place], Path) for place in places)
        kept = [wanted(self._kept[place]) for place in places] if in_memory else []
        if not kept or not all(map(_samples, kept)):
            while True:
                yield from (wanted(self[places[n]]) for n in torch.randperm(len(places), generator=generator).tolist())
        whole, size = _concatenated(kept), _samples(kept[0])
        while True:
            # The last samples of a round are left out where they fill no batch, for the sake of BatchNorm.
            order = torch.randperm(sum(map(_samples, kept)), generator=generator)
            for part in order[: len(order) // size * size].split(size):
                yield map_tensors(whole, partial(_picked, part))


@dataclass(frozen=True)
class Part(Sequence[Any]):
    """Some of the batches."""

    features: Features
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: Any) -> Any:
        return self.features[self.places[place]]


def _picked(places: Tensor, tensor: Tensor) -> Tensor:
    return tensor[places.to(tensor.device)]


def _samples(features: Any) -> int:
    """Returns how many samples all tensors hold along their first dimension; 0 where they differ."""
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors_in(features)}
    return sizes.pop() if len(sizes) == 1 else 0


def _concatenated(every: Sequence[Any]) -> Any:
    """Returns features of one nesting with all samples in each tensor."""
    columns = zip(*(tensors_in(features) for features in every), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return map_tensors(every[0], lambda _: next(joined))
