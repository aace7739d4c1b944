"""Random numbers of a run that is stopped and goes on: a resumed run draws the same ones as an uninterrupted run.

Our own code draws numbers that depend on the run's seed and on a place in the run alone. Of all other code the states of the
generators are kept.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

__all__ = ["batch_seed", "drawing", "generator_states", "seed_at", "set_generator_states"]


def seed_at(*place: int) -> int:
    """Makes a seed for a place in the run from the process's own (`seed_everything`)."""
    seed = torch.initial_seed()
    for number in place:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed


def batch_seed(trainer: Trainer, *use: int) -> int:
    """Makes a seed for what this process draws for the batch that it trains on now, another one for each `use`."""
    batches_before = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
    return seed_at(batches_before, trainer.global_rank, *use)


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Lets torch's generators of the CPU and the device start at `seed` in this block; afterwards they are as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generator_states() -> dict[str, Any]:
    """Returns the states of this process's generators in torch, on the CPU and GPUs, in numpy and in Python, as plain values."""
    numpy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "python": random.getstate(),
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Puts the generators into states that `generator_states` gave."""
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    key, pos = (states["numpy"]["state"][name] for name in ("key", "pos"))
    np.random.set_state(states["numpy"] | {"state": {"key": np.array(key, dtype=np.uint32), "pos": pos}})
    random.setstate(states["python"])
