"""Features of batches, kept in memory as far as they fit there, else in files."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tnlayers.tracing import tensors_in

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
        """Returns a copy, into which a module may write."""
        kept = self._kept[place]
        # The file is our own, of this process, and may hold whatever a model hands from one module to the next.
        return torch.load(kept, weights_only=False) if isinstance(kept, Path) else copy.deepcopy(kept)

    def drawn(self, places: Sequence[int], seed: int) -> Iterator[Any]:
        """Yields batches without end, round by round in random order; their samples stay together, since none can be told apart."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from (self[places[n]] for n in torch.randperm(len(places), generator=generator).tolist())


@dataclass(frozen=True)
class Part(Sequence[Any]):
    """Some of the batches."""

    features: Features
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: Any) -> Any:
        return self.features[self.places[place]]
