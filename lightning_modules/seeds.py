"""Random numbers that depend on the run's seed and a place in the run alone, so that a resumed run draws the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer

__all__ = ["batch_seed", "drawing", "seed_at"]


def seed_at(*place: int) -> int:
    """A seed for a place in the run, from the process's own (`seed_everything`)."""
    seed = torch.initial_seed()
    for number in place:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed


def batch_seed(trainer: Trainer, *use: int) -> int:
    """A seed for what this process draws for the batch that it trains on now; another one for each `use`."""
    batches_before = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
    return seed_at(batches_before, trainer.global_rank, *use)


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, torch's own generators of the CPU and the device start at `seed`; after it they are as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
