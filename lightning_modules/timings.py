"""What was measured to choose the layers' plans, for people and programs."""

from collections.abc import Mapping
from typing import Any

from tnlayers.schedule import plain_plan
from tnlayers.tuning import Timing, Tuned

__all__ = ["plain_timings", "timed"]

_SLOWER = 0.97  # of dense: what is nearer to it is within the noise


def timed(tuned: Mapping[str, Tuned]) -> str:
    """Says how many times as fast as the dense ones the layers are, all their calls together, and which are not faster."""
    parts = []
    for mode in ("inference", "training"):
        found = {name: (timing, layer.num_calls) for name, layer in tuned.items() if (timing := getattr(layer, mode))}
        if found:
            dense, own = (
                sum(calls * getattr(timing, key) for timing, calls in found.values())
                for key in ("dense_seconds", "seconds")
            )
            parts.append(f"{mode} {dense / own:.2f}x")
    said = [f"{', '.join(parts)} as fast as dense, in {len(tuned)} layers"]
    like_dense = {
        name: layer.inference for name, layer in tuned.items() if layer.inference and layer.inference.is_dense
    }
    slower = {
        name: layer.training for name, layer in tuned.items() if layer.training and layer.training.speedup < _SLOWER
    }
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

    def plain(timing: Timing | None) -> dict[str, Any] | None:
        if timing is None:
            return None
        plan = plain_plan(timing.schedule)
        return {"plan": plan, "seconds": timing.seconds, "dense_seconds": timing.dense_seconds}

    return {
        name: {
            "inference": plain(layer.inference),
            "training": plain(layer.training),
            "num_calls": layer.num_calls,
        }
        for name, layer in tuned.items()
    }
