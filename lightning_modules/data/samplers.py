"""Samplers that share a set of pictures among processes, and go on in the middle of an epoch.

Words: w processes of ranks r = 0 .. w - 1, each with batches of b pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_modules.data.pictures import NO_LABEL, Batch
from lightning_modules.seeds import seed_at

__all__ = ["EpochSampler", "LateLoader", "Padded"]


class EpochSampler(DistributedSampler[int]):
    """A process's share of a shuffle that depends on the seed and the epoch alone.

    The shuffle is dealt like cards: process r takes its places r, r + w, r + 2w, ... So the batches k of all processes
    are together batch k of one process with batches of w * b. The last places, fewer than w, are left out where they do
    not go round, since every process has to make equally many steps; each epoch leaves out other pictures.

    Args:
        pictures: the set that is shuffled.
        processes: w.
        rank: r.
        done: says how many pictures of its share the process is past already when it starts on an epoch.
    """

    def __init__(
        self, pictures: Dataset[Batch], processes: int = 1, rank: int = 0, done: Callable[[], int] = lambda: 0
    ) -> None:
        super().__init__(pictures, num_replicas=processes, rank=rank, drop_last=True)
        self._done = done

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_at(self.epoch))
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        self.epoch += 1  # for loops that do not set it
        share = order[self.rank : self.total_size : self.num_replicas]
        yield from share[self._done() :].tolist()


class LateLoader(DataLoader[Batch]):
    """A loader that asks its sampler only when its first batch is asked for.

    Lightning makes the iterator, whose workers would read ahead, before it knows at which epoch and batch a run resumes.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()

    # With these two Lightning knows that the loader can resume. The place is in the checkpoint anyway: the trainer counts
    # the batches that were trained on, while a loader knows only those that its workers have read.

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Padded(Dataset[Batch]):
    """A set of pictures with entries at its end that count for nothing, so that it has equal shares for all processes.

    Under DDP each forward pass may wait for those of the other processes, so all of them have to make equally many.

    Args:
        pictures: the set that is padded.
        processes: w, of which the length becomes a multiple; the labels of what is added are `NO_LABEL`.
    """

    def __init__(self, pictures: Dataset[Batch], processes: int) -> None:
        self._pictures = pictures
        self._processes = processes

    def __len__(self) -> int:
        return -(-len(self._pictures) // self._processes) * self._processes  # type: ignore[arg-type]

    def __getitems__(self, places: Sequence[int]) -> Batch:
        """Returns uint8 (B, C, H, W) and int64 (B,)."""
        last = len(self._pictures) - 1  # type: ignore[arg-type]
        pictures, labels = self._pictures.__getitems__([min(place, last) for place in places])  # type: ignore[attr-defined]
        return pictures, labels.where(torch.as_tensor(places) <= last, NO_LABEL)
