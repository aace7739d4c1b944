"""Models that do the same task, measured in turns.

Shapes: n pictures or vectors, c channels, h rows, w columns.
"""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.device import parameter_bytes, peak_bytes, training_step
from benchmarks.rows import Setting
from benchmarks.timing import turns

__all__ = ["LAYOUTS", "Contender", "in_layouts", "measure"]

Layout = Literal["default", "channels last"]
LAYOUTS: dict[Layout, torch.memory_format] = {
    "default": torch.contiguous_format,
    "channels last": torch.channels_last,
}
_ROUNDS, _INFERENCE_SECONDS, _TRAINING_SECONDS = 25, 1.0, 1.5


@dataclass(frozen=True)
class Contender:
    """A model and its input.

    Attributes:
        what: "dense", "ours", "lean" (ours tuned to keep little), "plan" (ours under a plan that is given), "chains" (torch's layers
            of our factors) or "tltorch".
        how: which of these, such as the groups of a plan; empty where there is one.
        layout: of the input.
    """

    what: str
    how: str
    layout: Layout
    model: nn.Module
    x: Tensor


def in_layouts(what: str, how: str, model: nn.Module, x: Tensor) -> list[Contender]:
    """Lets a model and its input contend in each layout that there is: one for vectors, two for pictures (n, c, h, w)."""
    if x.dim() != 4:
        return [Contender(what, how, "default", model, x)]
    return [
        Contender(what, how, layout, _laid_out(model, form), x.contiguous(memory_format=form))
        for layout, form in LAYOUTS.items()
    ]


def _laid_out(model: nn.Module, form: torch.memory_format) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=form)


def measure(contenders: Sequence[Contender], setting: Setting) -> list[dict[str, Any]]:
    """Measures inference without gradients and a training step of each, and the peak memory of that step, the parameters included.

    Under plans that are given the memory is not measured, but the medians of every second round and of those between, which tell
    how well a measurement can be repeated.
    """
    rows: list[dict[str, Any]] = [{"what": one.what, "how": one.how, "layout": one.layout} for one in contenders]
    limit = partial(turns, rounds=1 if setting.tiny else _ROUNDS, device=setting.device)

    def note(form: str, taken: dict[str, list[float]]) -> None:
        for number, seconds in taken.items():
            row = rows[int(number)]
            row[form] = _rounded(statistics.median(seconds))
            if row["what"] == "plan" and len(seconds) > 1:
                row[f"{form} halves"] = [_rounded(statistics.median(seconds[half::2])) for half in (0, 1)]

    for one in contenders:
        one.model.eval()
    with torch.no_grad():
        calls = {str(number): partial(one.model, one.x) for number, one in enumerate(contenders)}
        note("inference", limit(calls, seconds=_INFERENCE_SECONDS))
    for one in contenders:
        one.model.train()
    steps = {str(number): partial(training_step, one.model, one.x) for number, one in enumerate(contenders)}
    note("training", limit(steps, seconds=_TRAINING_SECONDS))
    for one, row, step in zip(contenders, rows, steps.values(), strict=True):
        if one.what != "plan":
            row["training peak bytes"] = peak_bytes(step, setting.device) + parameter_bytes(one.model)
    return rows


def _rounded(seconds: float) -> float:
    """Leaves four digits, which is more than times tell."""
    return float(f"{seconds:.4g}")
