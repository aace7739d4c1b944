"""Times of single layers in bfloat16, next to the dense layer in both layouts, and the peak memory of a training step.

Shapes: n pictures or vectors, c channels, h rows, w columns.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.device import captured, parameter_bytes, peak_bytes, training_step
from benchmarks.rows import Row, Setting
from benchmarks.timing import medians
from tnlayers import (
    CP,
    MPS,
    SVD,
    TT,
    Factorization,
    FactorizedLayer,
    LowRank,
    ParamsKept,
    Rule,
    TTConv,
    Tucker,
    tensorize,
)

__all__ = ["ROUNDS", "rows"]

ROUNDS = 9
CONVS: Mapping[
    str, tuple[tuple[int, int, int, int], int]
] = {  # name -> (inputs, outputs, kernel, groups), positions of a side
    "64 -> 64, 3x3, 56x56": ((64, 64, 3, 1), 56),
    "256 -> 256, 3x3, 14x14": ((256, 256, 3, 1), 14),
    "128 -> 128, 3x3, 28x28": ((128, 128, 3, 1), 28),
    "512 -> 512, 3x3, 7x7": ((512, 512, 3, 1), 7),
    "256 -> 512, 3x3, 28x28": ((256, 512, 3, 1), 28),
    "256 -> 64, 1x1, 56x56": ((256, 64, 1, 1), 56),
    "96 depthwise, 7x7, 56x56": ((96, 96, 7, 96), 56),
}
LINEARS = {"1024 -> 1024": (1024, 1024), "4096 -> 4096": (4096, 4096), "3072 -> 768": (3072, 768)}
TINY_CONVS = {"8 -> 8, 3x3, 6x6": ((8, 8, 3, 1), 6)}
TINY_LINEARS = {"64 -> 64": (64, 64)}


@dataclass(frozen=True)
class Subject:
    """A dense layer, the shape of one input, and the methods that take its place.

    Attributes:
        methods: name -> the method at a quarter: Tucker of the channels, the others of the parameters.
    """

    dense: Callable[[], nn.Module]
    shape: tuple[int, ...]
    methods: Mapping[str, Factorization]


def rows(setting: Setting) -> Iterator[Row]:
    """Yields every layer at one batch, then at the next one."""
    convs, linears = (TINY_CONVS, TINY_LINEARS) if setting.tiny else (CONVS, LINEARS)
    for batch, vectors in ((2, 3),) if setting.tiny else ((8, 4096), (64, 64), (1, 1)):
        for name, (sizes, side) in convs.items():
            yield Row(f"conv {name}, batch {batch}", 3.0, partial(row, conv(sizes, side), batch, setting))
        for name, features in linears.items():
            yield Row(f"linear {name}, batch {vectors}", 1.5, partial(row, linear(features), vectors, setting))


def conv(sizes: tuple[int, int, int, int], side: int) -> Subject:
    inputs, outputs, kernel, groups = sizes
    quarter = ParamsKept(0.25)
    methods: dict[str, Factorization] = {
        "Tucker": Tucker(min(inputs, outputs) // 4),
        "CP": CP(quarter),
        "MPS": MPS(quarter),
        "LowRank": LowRank(quarter),
        "SVD": SVD(quarter),
        "TTConv": TTConv(quarter),
    }
    if groups > 1:  # whose channels have nothing to share
        methods = {"CP": CP(1), "LowRank": LowRank(1)}
    dense = partial(nn.Conv2d, inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    return Subject(dense, (inputs, side, side), methods)


def linear(features: tuple[int, int]) -> Subject:
    methods = {"LowRank": LowRank(ParamsKept(0.25)), "TT": TT(ParamsKept(0.05))}
    return Subject(partial(nn.Linear, *features), features[:1], methods)


def row(subject: Subject, batch: int, setting: Setting) -> dict[str, Any]:
    """Measures the dense layer and all that take its place, in turns."""
    x = torch.randn(batch, *subject.shape, device=setting.device, dtype=torch.bfloat16)
    last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    dense = subject.dense().to(setting.device, torch.bfloat16)
    layers: dict[str, tuple[nn.Module, Tensor]] = {"dense": (dense, x)}
    if x.dim() == 4:
        same = subject.dense().to(setting.device, torch.bfloat16)
        layers["dense, channels last"] = (same.to(memory_format=torch.channels_last), last)
    costs: dict[str, dict[str, Any]] = {name: {"parameters_kept": 1.0, "macs_kept": 1.0} for name in layers}
    for name, method in subject.methods.items():
        net = nn.Sequential(subject.dense()).to(setting.device, torch.bfloat16)
        (layer,) = tensorize(net, [Rule("0", method)], init="random", example_input=last)
        if isinstance(layer, FactorizedLayer):
            layers[name], costs[name] = (layer, last), cost(layer, dense, last)
        else:
            costs[name] = {"left": "dense, since no rank is cheaper"}
    measured = measure(layers, setting)
    return {"of": {name: costs[name] | measured.get(name, {}) for name in costs}}


def cost(layer: FactorizedLayer, dense: nn.Module, x: Tensor) -> dict[str, Any]:
    calls = [layer.spec.geometry.call(x)]
    return {
        "rank": list(layer.ranks),
        "plan": [list(group) for group in layer.plan.groups],
        "parameters_kept": layer.spec.params / dense.weight.numel(),  # type: ignore[operator]
        "macs_kept": layer.spec.macs(calls, layer.plan.groups) / layer.spec.geometry.macs(calls),
    }


def measure(models: Mapping[str, tuple[nn.Module, Tensor]], setting: Setting) -> dict[str, dict[str, Any]]:
    """Measures models that take turns, each on its own input.

    Returns:
        Name -> seconds of inference, of its replay as a graph and of a training step, and the peak memory of that step.
    """
    device = setting.device
    rounds = 1 if setting.tiny else ROUNDS
    of: dict[str, dict[str, Any]] = {name: {} for name in models}

    def note(form: str, calls: Mapping[str, Callable[[], object]]) -> None:
        for name, seconds in medians(calls, rounds, device).items():
            of[name][form] = seconds

    for model, _ in models.values():
        model.eval()
    with torch.no_grad():
        note("inference", {name: partial(model, x) for name, (model, x) in models.items()})
    note("inference, graph", {name: captured(partial(model, x), device)[0] for name, (model, x) in models.items()})
    for model, _ in models.values():
        model.train()
    steps = {name: partial(training_step, model, x) for name, (model, x) in models.items()}
    note("training", steps)
    for name, step in steps.items():
        of[name]["training peak bytes"] = peak_bytes(step, device) + parameter_bytes(models[name][0])
    return of
