"""Times that can be compared: calls that take turns in one process."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["cuda_medians", "medians"]

_LEAST_SECONDS = 1e-3  # what a pair of events is laid around: many times their resolution


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def cuda_medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call on the CUDA device, by its events, with nothing else in its queue.

    A short call is repeated between its two events, so a call that the device waits for takes as long as its launches do.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()  # chooses algorithms
        _cuda_seconds(call, 1)
        repeats[name] = max(1, math.ceil(_LEAST_SECONDS / max(_cuda_seconds(call, 1), 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(_cuda_seconds(call, repeats[name]))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _cuda_seconds(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
