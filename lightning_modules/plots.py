"""Pictures of what was gained, drawn without a display and without touching matplotlib's global state."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tnlayers import Summary
from tnlayers.summary import LayerSummary, Totals

__all__ = ["INK", "Spectrum", "clean", "plot_accuracy", "plot_layers", "plot_spectra", "png"]

_DENSE, _OURS, INK = "#c9cfd6", "#1f6fb4", "#333333"
_BEFORE = "#e08a3c"
_PANELS, _COLUMNS = 16, 4
_ZERO = 1e-6  # of the largest singular value: what rounding leaves where a weight has none


@dataclass(frozen=True)
class Spectrum:
    """A truncated layer's weight, unfolded as outputs x rest.

    Attributes:
        values: singular values before, as fractions of the largest.
        left: singular values after, as fractions of the same.
        before, after: the ranks; () for a dense layer.
        error: of the weight after, relative to that before.
    """

    layer: str
    values: tuple[float, ...]
    left: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    error: float

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


def plot_layers(summary: Summary) -> Figure:
    """Draws parameters and multiply-accumulates of every layer and the rest, dense behind tensorized, and the relative errors."""
    layers = summary.layers
    bars_of: list[LayerSummary | Totals] = [*layers, summary.other]
    figure = Figure(figsize=(10, 1.4 + 0.3 * len(bars_of)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(2, 2, 1))
    places = range(len(bars_of))
    scale, unit = (1e6, "million") if max(entry.dense_macs for entry in bars_of) >= 1e6 else (1e3, "thousand")
    params = [(entry.dense_params / 1e3, entry.params / 1e3) for entry in bars_of]
    macs = [(entry.dense_macs / scale, entry.macs / scale) for entry in bars_of]
    titles = ("parameters (thousand)", f"MACs a sample ({unit})")
    for axes, title, bars in zip(panels, titles, (params, macs), strict=False):
        before, after = zip(*bars, strict=True)
        axes.barh(places, before, height=0.8, color=_DENSE, label="dense")
        axes.barh(places, after, height=0.45, color=_OURS, label="tensorized")
        axes.set_title(title, fontsize=10, color=INK)
    errors = [(place, layer.error) for place, layer in enumerate(layers) if layer.error is not None]
    panels[2].barh([place for place, _ in errors], [error for _, error in errors], height=0.45, color=_OURS)
    panels[2].set_title("relative error", fontsize=10, color=INK)
    panels[2].set_xlim(0, max([1.1 * error for _, error in errors] + [0.1]))
    names = [f"{layer.name}  {layer.method} {_joined(layer.rank)}".rstrip() for layer in layers]
    panels[0].set_yticks(list(places), [*names, "other operations"], fontsize=8)
    panels[0].invert_yaxis()
    panels[1].legend(fontsize=8, frameon=False, loc="lower right")
    for axes in panels:
        clean(axes)
    return figure


def plot_accuracy(summary: Summary, accuracy: dict[str, float]) -> Figure:
    """Draws the accuracy at each stage, next to what is left of parameters, MACs and time."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    stages = list(accuracy)
    colors = [_DENSE] + [_OURS] * (len(stages) - 1)
    bars = left.bar(stages, [100 * value for value in accuracy.values()], width=0.6, color=colors)
    left.bar_label(bars, fmt="%.1f", fontsize=9)
    left.set_ylim(0, 109)
    left.set_title("test accuracy (%)", fontsize=10, color=INK)
    totals = summary.totals
    kept = {"parameters": totals.params_kept, "MACs": totals.macs_kept}
    if totals.seconds and totals.dense_seconds:
        kept["time"] = totals.seconds / totals.dense_seconds
    kept = {name: value for name, value in kept.items() if math.isfinite(value)}
    bars = right.bar(list(kept), [100 * value for value in kept.values()], width=0.6, color=_OURS)
    right.bar_label(bars, fmt="%.0f", fontsize=9)
    right.axhline(100, color=INK, linewidth=0.8, linestyle=":")
    right.set_ylim(0, max(115, 112 * max(kept.values())))
    right.set_title("left of the dense network (%)", fontsize=10, color=INK)
    for axes in (left, right):
        clean(axes)
    return figure


def plot_spectra(spectra: Sequence[Spectrum]) -> Figure:
    """Draws the singular values of each truncated layer's weight, before and after; at most 16 layers, the first ones."""
    shown = spectra[:_PANELS]
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(1 + 2.7 * columns, 0.9 + 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, spectrum in zip(panels, shown, strict=False):
        for name, color, values in (("before", _BEFORE, spectrum.values), ("after", _OURS, spectrum.left)):
            heights = [value for value in values if value > _ZERO]
            ranks = range(1, len(heights) + 1)
            axes.plot(ranks, heights, color=color, marker=".", markersize=4, linewidth=1, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.set_title(_truncation(spectrum), fontsize=8, color=INK)
        clean(axes)
    panels[0].set_ylim(0, 1.05)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("singular value of the weight as a matrix, outputs x rest", fontsize=9, color=INK)
    figure.supylabel("fraction of the largest", fontsize=9, color=INK)
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def png(figure: Figure, dpi: float = 120) -> bytes:
    """Returns what a picture file holds; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def clean(axes: Axes) -> None:
    """Leaves out what is no figure: two sides of the frame, and large labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)


def _truncation(spectrum: Spectrum) -> str:
    before, after = (_joined(rank) or "dense" for rank in (spectrum.before, spectrum.after))
    return f"{spectrum.layer}\n{before} → {after}, error {spectrum.error:.3f}"


def _joined(rank: tuple[int, ...]) -> str:
    return "·".join(map(str, rank))
