"""Times that can be compared: calls that take turns in one process."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["LEAST_ROUNDS", "medians", "turns"]

LEAST_ROUNDS = 3
"""How many rounds are taken even where they last too long."""
_LEAST_SECONDS = 5e-3  # what a clock is laid around: many times its resolution
_LONG_SECONDS = 0.05  # of a call for which it matters little what lies in the caches
_CPU = torch.device("cpu")


def medians(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device = _CPU, seconds: float = math.inf
) -> dict[str, float]:
    """Measures the median seconds of each call; see `turns`."""
    return {name: statistics.median(taken) for name, taken in turns(calls, rounds, device, seconds).items()}


def turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device = _CPU, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Measures the seconds of each call in each round, by the events of a CUDA device with nothing else in its queue.

    A call of each warms up, and a second one where it is not long. A short call is repeated between two looks at the clock,
    so on a CUDA device a call that the device waits for takes as long as its launches do. Where calls are not long, each turn
    begins with one that is not timed: in a net the input of a layer lies in the caches, and the turn before has left others' there.

    Args:
        calls: name -> what to time.
        rounds: how many there are at most.
        device: where the calls compute.
        seconds: after this time no round starts, once there were `LEAST_ROUNDS`.
    """
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    repeats: dict[str, int] = {}
    long: dict[str, bool] = {}
    for name, call in calls.items():
        once = clock(call, 1)  # chooses algorithms
        once = once if once > _LONG_SECONDS else clock(call, 1)
        long[name] = once > _LONG_SECONDS
        repeats[name] = max(1, math.ceil(_LEAST_SECONDS / max(once, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            if not long[name]:
                call()
            taken[name].append(clock(call, repeats[name]))
    return taken


def _cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
