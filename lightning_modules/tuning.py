"""How the layers of a run are computed the fastest: measured by its first process, under its precision, for all of them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from torch import nn

from lightning_modules.console import progress_bar
from tnlayers import Rule, autotune
from tnlayers.errors import UserError, message
from tnlayers.rules import fits
from tnlayers.schedule import is_measured, plain_plan
from tnlayers.tracing import Example, factorized_layers
from tnlayers.tuning import Progress, Timing, Tuned

__all__ = ["plain_timings", "timed", "tune"]

_SLOWER = 0.97  # of dense: what is nearer to it is within the noise


def tune(trainer: Trainer, net: nn.Module, rules: Sequence[Rule], example: Example) -> dict[str, Tuned]:
    """Sets the measured plans of a net's layers, the same ones in every process; a plan that a rule names stays.

    Args:
        trainer: its precision holds, and a bar shows how far it is where the trainer shows bars.
        net: its layers are set in place.
        rules: the first that fits a layer may name its plan.
        example: what the net takes, as in the run.

    Returns:
        What `autotune` found; empty in every process but the first.
    """
    layers = {name: layer for name, layer in factorized_layers(net).items() if not _has_plan(name, rules)}
    found: dict[str, Tuned] = {}
    problem: Exception | None = None
    if trainer.is_global_zero and layers:
        shown = trainer.progress_bar_callback is not None
        try:
            with (
                trainer.precision_plugin.forward_context(),
                progress_bar(Console(stderr=True)) if shown else nullcontext(_unseen) as bar,
            ):
                # One name for all layers, so that there is one line where there is no terminal.
                found = autotune(net, example, layers=layers, progress=partial(_show, bar))
        except Exception as error:  # whatever it is, the other processes must not wait for plans
            problem = error
    plans = {name: plain_plan(layers[name].plan_choice) for name in found}
    plans, said = trainer.strategy.broadcast((plans, message(problem) if problem else None))
    if said is not None:
        raise problem or UserError(said)
    if not trainer.is_global_zero:
        for name, plan in plans.items():
            layers[name].set_plan(plan)
    return found


def _show(bar: Progress, _: str, done: float, total: float) -> None:
    bar("timing the layers", done, total)


def _unseen(*_: object) -> None:
    """Shows nothing."""


def _has_plan(name: str, rules: Sequence[Rule]) -> bool:
    named = next((rule.plan for rule in rules if rule.factorization and fits(name, rule.pattern)), None)
    return named not in (None, "auto") and not is_measured(named)


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
        said.append(f"{len(like_dense)} compute like dense in inference, which is faster there: {_speeds(like_dense)}")
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
