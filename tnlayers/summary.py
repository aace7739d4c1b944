"""What was gained: parameters, multiply-accumulates, time and error, for each layer and in all."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.factorized import FactorizedLayer
from tnlayers.geometry import Geometry
from tnlayers.joint import generator_of
from tnlayers.linalg import relative_error
from tnlayers.markdown import markdown_table
from tnlayers.rules import Rule
from tnlayers.surgery import to_dense
from tnlayers.tracing import Example, calls_of, countable_layers, evaluating, layer_inputs

__all__ = ["LayerSummary", "Summary", "Totals", "summarize"]

_RUNS, _SECONDS = 9, 0.2  # at least so many calls of each, and for so long: short calls need more of them


@dataclass(frozen=True)
class LayerSummary:
    """One convolution or linear.

    Attributes:
        method: the factorization's name, or "dense".
        rank: its bond dimensions; () if dense.
        plan: the groups of factors that run as one operation each; () if dense.
        dense_params, params: parameters, bias included; those that layers share (a joint generator's) count for the first.
        dense_macs, macs: multiply-accumulates for one sample in evaluation, where merged weights are kept; bias not counted.
        error: ||W - W~||_F / ||W||_F against the reference; None for a layer that was trained from scratch.
        dense_seconds, seconds: median time of one call on the example input; None when it was not measured.
        note: why the layer is dense, or what it shares with others.
    """

    name: str
    method: str
    weight_shape: tuple[int, ...]
    rank: tuple[int, ...]
    plan: tuple[tuple[str, ...], ...]
    dense_params: int
    params: int
    dense_macs: int
    macs: int
    error: float | None
    dense_seconds: float | None
    seconds: float | None
    note: str


@dataclass(frozen=True)
class Totals:
    """The whole model: all its parameters, and the multiply-accumulates of its convolutions and linears."""

    dense_params: int
    params: int
    dense_macs: int
    macs: int
    dense_seconds: float | None
    seconds: float | None

    @property
    def params_kept(self) -> float:
        return self.params / max(self.dense_params, 1)

    @property
    def macs_kept(self) -> float:
        return self.macs / max(self.dense_macs, 1)


@dataclass(frozen=True)
class Summary:
    layers: tuple[LayerSummary, ...]
    totals: Totals
    batch: int
    device: str

    def to_plain(self) -> dict[str, Any]:
        """Strings, numbers and lists, for JSON."""
        kept = {"params_kept": self.totals.params_kept, "macs_kept": self.totals.macs_kept}
        return asdict(self) | {"totals": asdict(self.totals) | kept}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of text; the last row is the whole model."""
        headings = [
            "layer",
            "weight",
            "method",
            "rank",
            "params",
            "kept",
            "MACs",
            "kept",
            "error",
            "ms dense",
            "ms",
            "note",
        ]
        rows = [
            [
                layer.name,
                "x".join(map(str, layer.weight_shape)),
                layer.method,
                ", ".join(map(str, layer.rank)),
                *_costs(layer),
                "" if layer.error is None else f"{layer.error:.3f}",
                *_times(layer),
                layer.note,
            ]
            for layer in self.layers
        ]
        return headings, [*rows, ["whole model", "", "", "", *_costs(self.totals), "", *_times(self.totals), ""]]

    def to_markdown(self) -> str:
        return markdown_table(*self.table())

    __str__ = to_markdown


def _costs(entry: LayerSummary | Totals) -> list[str]:
    return [
        f"{entry.params:,}",
        f"{entry.params / max(entry.dense_params, 1):.1%}",
        f"{entry.macs:,}",
        f"{entry.macs / max(entry.dense_macs, 1):.1%}",
    ]


def _times(entry: LayerSummary | Totals) -> list[str]:
    if entry.seconds is None or entry.dense_seconds is None:
        return ["", ""]
    return [f"{1e3 * entry.dense_seconds:.2f}", f"{1e3 * entry.seconds:.2f}"]


def summarize(
    model: nn.Module,
    example_input: Example,
    *,
    reference: nn.Module | None = None,
    rules: Sequence[Rule] = (),
    measure: bool = True,
) -> Summary:
    """Compares the factorized layers of a model with the dense ones that they stand for.

    Args:
        model: the tensorized model; a dense one is summarised too.
        example_input: what the model takes; its batch and device are those of the times.
        reference: the dense model to measure the error against; by default the error is the decomposition's own.
        rules: the resolved rules, for their reasons.
        measure: whether to time each layer and the model: median of 9 calls or more in evaluation, taken in turn with the dense ones.
    """
    inputs = layer_inputs(model, example_input)
    reasons = {rule.pattern: rule.reason for rule in rules if rule.reason}
    batch = _batch(model, inputs, example_input)
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    layers: list[LayerSummary] = []
    counted: set[nn.Parameter] = set()
    for name, layer in countable_layers(model).items():
        original = reference.get_submodule(name) if reference else None
        note = reasons.get(name, "no rule takes it" if rules and not isinstance(layer, FactorizedLayer) else "")
        own = set(layer.parameters()) - (counted if isinstance(layer, FactorizedLayer) else set())
        counted |= own
        num_params = sum(parameter.numel() for parameter in own)
        layers.append(_layer(name, layer, num_params, inputs.get(name, []), batch, original, note, measure=measure))
    dense_seconds = seconds = None
    if measure:
        dense = to_dense(copy.deepcopy(model))
        with evaluating(model), evaluating(dense):
            dense_seconds, seconds = _medians([lambda: dense(*args), lambda: model(*args)], args[0].device)
    params = sum(parameter.numel() for parameter in model.parameters())
    totals = Totals(
        dense_params=params + sum(layer.dense_params - layer.params for layer in layers),
        params=params,
        dense_macs=sum(layer.dense_macs for layer in layers),
        macs=sum(layer.macs for layer in layers),
        dense_seconds=dense_seconds,
        seconds=seconds,
    )
    return Summary(tuple(layers), totals, batch, str(args[0].device))


def _batch(model: nn.Module, inputs: dict[str, list[Tensor]], example_input: Example) -> int:
    """Returns how many samples the example holds: 1 where the layers get inputs without a batch dimension."""
    layers = countable_layers(model)
    for name, calls in inputs.items():
        positions = 2 if hasattr(layers[name], "kernel_size") else 0
        if calls[0].dim() == 1 + positions:
            return 1
    return (example_input[0] if isinstance(example_input, tuple) else example_input).shape[0]


def _layer(
    name: str,
    layer: nn.Module,
    num_params: int,
    inputs: list[Tensor],
    batch: int,
    original: nn.Module | None,
    note: str,
    *,
    measure: bool,
) -> LayerSummary:
    factorized = layer if isinstance(layer, FactorizedLayer) else None
    geometry = Geometry.of(layer)
    calls = calls_of(geometry, inputs)
    dense_macs = layer_macs = geometry.macs(calls) // batch
    if factorized:
        layer_macs = factorized.spec.macs(calls, factorized.plan.groups) // batch
    error = factorized.decomposition_error if factorized else None
    if original is not None and factorized:
        error = relative_error(original.weight, factorized.weight)  # type: ignore[arg-type]
    dense_seconds = seconds = None
    if measure and inputs and factorized:
        dense = factorized.to_dense()
        with evaluating(layer), evaluating(dense):
            dense_seconds, seconds = _medians([lambda: dense(inputs[0]), lambda: layer(inputs[0])], inputs[0].device)
    if factorized and (generator := generator_of(factorized.spec.method)):
        note = f"made by generator {generator!r}, whose parameters count once"
    return LayerSummary(
        name=name,
        method=type(factorized.spec.method).__name__ if factorized else "dense",
        weight_shape=(geometry.groups * geometry.weight_shape[0], *geometry.weight_shape[1:]),
        rank=factorized.ranks if factorized else (),
        plan=factorized.plan.groups if factorized else (),
        dense_params=geometry.params + (layer.bias.numel() if isinstance(layer.bias, Tensor) else 0),
        params=num_params,
        dense_macs=dense_macs,
        macs=layer_macs,
        error=error,
        dense_seconds=dense_seconds,
        seconds=seconds,
        note=note,
    )


def _medians(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Measures the median seconds of each call; the calls take turns, so that a change of the machine's speed meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:  # warms caches up
        call()
    end = _now(device) + _SECONDS
    while len(times[0]) < _RUNS or _now(device) < end:
        for call, taken in zip(calls, times, strict=True):
            start = _now(device)
            call()
            taken.append(_now(device) - start)
    return [statistics.median(taken) for taken in times]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
