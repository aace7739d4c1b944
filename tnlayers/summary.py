"""What was gained: parameters, multiply-accumulates, time and error, for each layer and in all."""

import math
import statistics
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tnlayers.counting import count_macs, num_params
from tnlayers.dense_form import dense_form
from tnlayers.factorized import FactorizedLayer
from tnlayers.joint import generator_of
from tnlayers.linalg import relative_error
from tnlayers.markdown import markdown_table
from tnlayers.opened import close_in_place, opened_view
from tnlayers.reasons import kind_of, kind_refusal, weight_owners, weight_shape
from tnlayers.rules import Rule
from tnlayers.tracing import Example, arguments_of, evaluating, layer_inputs, num_samples, tensors_in

__all__ = ["LayerSummary", "Summary", "Totals", "kept", "percent", "summarize"]

_RUNS, _SECONDS = 9, 0.2  # at least so many calls of each, and for so long: short calls need more of them


def kept(count: int, dense: int) -> float:
    """Returns the fraction that is left of what the dense model has; of nothing, 1 if it is still nothing, else infinity."""
    return count / dense if dense else math.inf if count else 1.0


def percent(fraction: float, digits: int = 1) -> str:
    """Writes what is left as percents; a dash where there was nothing, as for the multiply-accumulates of an embedding."""
    return f"{fraction:.{digits}%}" if math.isfinite(fraction) else "-"


@dataclass(frozen=True)
class LayerSummary:
    """One module that holds a weight.

    Attributes:
        kind: the name of its type, or of the one that a factorized layer stands for.
        method: the factorization's name, or "dense".
        rank: its bond dimensions; () if dense.
        plan: the groups of factors that run as one operation each; () if dense.
        dense_params, params: parameters, bias included; those that layers share (tied ones, a joint generator's) count for the first.
        dense_macs, macs: multiply-accumulates of its calls for one sample in evaluation, where merged weights are kept; bias not
            counted. A weight that another module uses itself is counted there, or in the row of other operations.
        error: ||W - W~||_F / ||W||_F against the reference; None for a layer that was trained from scratch.
        dense_seconds, seconds: median time of one call on the example input; None when it was not measured.
        note: why the layer is dense, what it shares with others, or that the example input never calls it.
        remark: what else there is to say of its factors, such as a CP's degeneracy.
    """

    name: str
    kind: str
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
    remark: str = ""


@dataclass(frozen=True)
class Totals:
    """The whole model: all its parameters, and all multiply-accumulates of a forward for one sample, whatever does them."""

    dense_params: int
    params: int
    dense_macs: int
    macs: int
    dense_seconds: float | None = None
    seconds: float | None = None

    @property
    def params_kept(self) -> float:
        return kept(self.params, self.dense_params)

    @property
    def macs_kept(self) -> float:
        return kept(self.macs, self.dense_macs)


@dataclass(frozen=True)
class Summary:
    """What was gained.

    Attributes:
        layers: the modules that hold a weight.
        other: all else: parameters of normalisations, products in attention, weights that are used by functions.
        totals: the whole model, which is the sum of both.
        unknown: operators that multiply by weights and that no formula is known for; they are in no count.
        batch: how many samples the example holds; `tnlayers.tracing.num_samples` says how that is told.
        device: where it was run.
    """

    layers: tuple[LayerSummary, ...]
    other: Totals
    totals: Totals
    unknown: tuple[str, ...]
    batch: int
    device: str

    def to_plain(self) -> dict[str, Any]:
        """Strings, numbers and lists, for JSON."""
        shares = {"params_kept": self.totals.params_kept, "macs_kept": self.totals.macs_kept}
        kept = {name: share if math.isfinite(share) else None for name, share in shares.items()}  # JSON has no infinity
        return asdict(self) | {"totals": asdict(self.totals) | kept}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of text; the last row is the whole model."""
        headings = [
            "layer",
            "kind",
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
                layer.kind,
                "x".join(map(str, layer.weight_shape)),
                layer.method,
                ", ".join(map(str, layer.rank)),
                *_costs(layer),
                "" if layer.error is None else f"{layer.error:.3f}",
                *_times(layer),
                layer.note or layer.remark,
            ]
            for layer in self.layers
        ]
        known = f"not counted, for want of a formula: {', '.join(self.unknown)}" if self.unknown else ""
        for name, entry, note in (("other operations", self.other, ""), ("whole model", self.totals, known)):
            rows.append([name, "", "", "", "", *_costs(entry), "", *_times(entry), note])
        return headings, rows

    def to_markdown(self) -> str:
        return markdown_table(*self.table())

    __str__ = to_markdown


def _costs(entry: LayerSummary | Totals) -> list[str]:
    return [
        f"{entry.params:,}",
        percent(kept(entry.params, entry.dense_params)),
        f"{entry.macs:,}",
        percent(kept(entry.macs, entry.dense_macs)),
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
    batch = num_samples(model, inputs, example_input)
    args, kwargs = arguments_of(example_input)
    device = next((value.device for value in tensors_in([args, kwargs])), torch.device("cpu"))
    owners = weight_owners(model)
    dense = dense_form(model)
    counted = count_macs(model, example_input, owners)
    tensorized = any(isinstance(layer, FactorizedLayer) for layer in owners.values())
    before = (
        count_macs(dense, example_input, {name: dense.get_submodule(name) for name in owners})
        if tensorized
        else counted
    )
    notes = _notes(model, owners, rules, inputs)
    num_params_of = _params(owners)
    layers = []
    reference = opened_view(reference, owners) if reference else None
    for name, layer in owners.items():
        original = reference.get_submodule(name) if reference and isinstance(layer, FactorizedLayer) else None
        seconds = _layer_seconds(layer, inputs.get(name, []), device) if measure else (None, None)
        macs = tuple(each.by_module.get(name, 0) // batch for each in (before, counted))
        layers.append(_layer(name, layer, num_params_of[name], macs, original, seconds, notes[name]))
    seconds = (None, None)
    if measure:
        dense = close_in_place(dense)  # as fast as torch's own
        with evaluating(model), evaluating(dense):
            seconds = _medians([lambda: dense(*args, **kwargs), lambda: model(*args, **kwargs)], device)
    totals = Totals(
        num_params(model, dense=True), num_params(model), before.total // batch, counted.total // batch, *seconds
    )
    unknown = tuple(sorted({*before.unknown, *counted.unknown}))
    return Summary(tuple(layers), _rest(totals, layers), totals, unknown, batch, str(device))


def _rest(totals: Totals, layers: Sequence[LayerSummary]) -> Totals:
    """Returns what the layers leave of the totals."""
    counts = ("dense_params", "params", "dense_macs", "macs")
    return Totals(**{key: getattr(totals, key) - sum(getattr(layer, key) for layer in layers) for key in counts})


def _params(owners: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Counts the parameters of each module in its dense form and as it is; those that several share for the first."""
    seen: set[nn.Parameter] = set()
    counts = {}
    for name, layer in owners.items():
        parts = [layer, layer.factors] if isinstance(layer, FactorizedLayer) else [layer]
        if is_parametrized(layer):
            parts.append(layer.parametrizations)  # type: ignore[arg-type]
        own = {value for part in parts for value in part.parameters(recurse=part is not layer)} - seen
        seen |= own
        params = sum(value.numel() for value in own)
        made = sum(value.numel() for value in own if isinstance(layer, FactorizedLayer) and value is not layer.bias)
        dense = layer.spec.geometry.params if isinstance(layer, FactorizedLayer) else 0
        counts[name] = (params - made + dense, params)
    return counts


def _notes(
    model: nn.Module, owners: Mapping[str, nn.Module], rules: Sequence[Rule], called: Container[str]
) -> dict[str, str]:
    """Returns why each module is as it is: the rules' reasons, or what keeps it from being replaced."""
    reasons = {rule.pattern: rule.reason for rule in rules}
    notes = {}
    for name, layer in owners.items():
        within = {
            reason for at, reason in reasons.items() if at.startswith(f"{name}.")
        }  # the linears of a module that was not opened
        note = reasons.get(name, "") or "; ".join(sorted(within - {""}))
        if isinstance(layer, FactorizedLayer):
            generator = generator_of(layer.spec.method)
            note = f"made by generator {generator!r}, whose parameters count once" if generator else note
            uncalled = "" if name in called else "the example input never calls it"
            notes[name] = "; ".join(filter(None, (note, uncalled)))
        else:
            notes[name] = note or kind_refusal(model, name) or ("no rule takes it" if rules else "")
    return notes


def _layer(
    name: str,
    layer: nn.Module,
    params: tuple[int, int],
    macs: tuple[int, ...],
    original: nn.Module | None,
    seconds: Sequence[float | None],
    note: str,
) -> LayerSummary:
    factorized = layer if isinstance(layer, FactorizedLayer) else None
    error = factorized.decomposition_error if factorized else None
    if original is not None and factorized:
        error = relative_error(original.weight, factorized.weight)  # type: ignore[arg-type]
    return LayerSummary(
        name=name,
        kind=kind_of(layer),
        method=type(factorized.spec.method).__name__ if factorized else "dense",
        weight_shape=weight_shape(layer),
        rank=factorized.ranks if factorized else (),
        plan=factorized.plan.groups if factorized else (),
        dense_params=params[0],
        params=params[1],
        dense_macs=macs[0],
        macs=macs[1],
        error=error,
        dense_seconds=seconds[0],
        seconds=seconds[1],
        note=note,
        remark=factorized.spec.method.remark(dict(factorized.factors.items())) if factorized else "",
    )


def _layer_seconds(layer: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> Sequence[float | None]:
    """Measures a call of the dense form of a factorized layer and one of the layer itself, with the first input that reaches it."""
    if not inputs or not isinstance(layer, FactorizedLayer):
        return None, None
    dense = layer.to_dense()
    with evaluating(layer), evaluating(dense):
        return _medians([lambda: dense(inputs[0]), lambda: layer(inputs[0])], device)


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
