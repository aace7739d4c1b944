"""What was measured to choose the layers' plans, for people and programs."""

from collections.abc import Mapping
from typing import Any

from tnlayers.schedule import plain_plan
from tnlayers.tuning import Timing, Tuned

__all__ = ["plain_timings", "timed"]

_SLOWER = 0.97  # of dense: what is nearer to it is within the noise


def timed(tuned: Mapping[str, Tuned]) -> str:
    """Says how many times as fast as the dense ones the layers are, each with its largest input, and which are not faster."""
    parts = []
    for mode in ("inference", "training"):
        timings = [(getattr(layer, mode), layer.num_calls) for layer in tuned.values()]
        dense, own = (
            sum(calls * getattr(timing, key) for timing, calls in timings) for key in ("dense_seconds", "seconds")
        )
        parts.append(f"{mode} {dense / own:.2f}x")
    said = [f"{', '.join(parts)} as fast as dense, in {len(tuned)} layers"]
    like_dense = {name: layer.inference for name, layer in tuned.items() if layer.inference.is_dense}
    slower = {name: layer.training for name, layer in tuned.items() if layer.training.speedup < _SLOWER}
    if like_dense:
        said.append(
            f"{len(like_dense)} compute like dense in inference, since nothing is faster: {_speeds(like_dense)}"
        )
    if slower:
        said.append(f"slower than dense in training: {_speeds(slower)}")
    return "; ".join(said)


def _speeds(timings: Mapping[str, Timing]) -> str:
    return ", ".join(f"{name or 'the model itself'} ({timing.speedup:.2f}x)" for name, timing in timings.items())


def plain_timings(tuned: Mapping[str, Tuned]) -> dict[str, Any]:
    """Returns what was found for each layer as strings, numbers and lists."""

    def plain(timing: Timing) -> dict[str, Any]:
        plan = plain_plan(timing.schedule)
        return {"plan": plan, "seconds": timing.seconds, "dense_seconds": timing.dense_seconds}

    return {
        name: {"inference": plain(layer.inference), "training": plain(layer.training), "num_calls": layer.num_calls}
        for name, layer in tuned.items()
    }
