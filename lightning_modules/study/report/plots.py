"""What the pictures of a study are drawn with: small multiples of lines, lines over layers, and a table of coloured cells."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_modules.plots import INK, clean

__all__ = ["STYLES", "Cell", "Level", "Line", "heatmap", "over_layers", "small_multiples"]

_Item = TypeVar("_Item")
_BAND = "#cfe3cf"
_PANELS, _COLUMNS = 20, 4
_ROWS = 36  # of a heatmap on one page
_BLUE, _ORANGE, _GREEN, _PURPLE = "#1f6fb4", "#e08a3c", "#3a9d5d", "#8e5bb5"


def _style(color: str, linestyle: str = "-", marker: str = "o") -> dict[str, Any]:
    return {"color": color, "linestyle": linestyle, "marker": marker}


STYLES = {
    "": _style(INK),
    "o": _style(_BLUE),
    "i": _style(_ORANGE),
    "h": _style(_GREEN),
    "w": _style(_GREEN, "--", "s"),
    "oi": _style("#777777"),
    "ih": _style(_PURPLE),
    "iw": _style(_PURPLE, "--", "s"),
    "Tucker-2": _style("#b5234b", "-", "D"),
    "Tucker": _style("#d4739b", "--", "D"),
    "MPS": _style("#12838f", "-", "^"),
    "truncation": _style(_BLUE),
    "random error": _style(_ORANGE, "--", "s"),
    "random weight": _style("#999999", ":", "^"),
    "factors": _style(_BLUE),
    "dense": _style(_ORANGE, "--", "s"),
}
"""By cut, name of a set of cuts, control, or what is retrained; "" for anything else. The twins h and w, and ih and iw, share a colour."""


@dataclass(frozen=True)
class Line:
    """A line of points (x, y).

    Attributes:
        label: its name in the legend, which has it once however many lines have it.
        style: what matplotlib draws it with.
        large: the index of a point that is drawn large.
        hollow: the indices of points that are drawn hollow.
        bold: whether it is thick and without markers.
    """

    label: str
    style: Mapping[str, Any]
    points: tuple[tuple[float, float], ...]
    large: int | None = None
    hollow: tuple[int, ...] = ()
    bold: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a heatmap: a value from 0, pale, to 1, dark, and what is written there."""

    value: float
    text: str


@dataclass(frozen=True)
class Level:
    """What accuracies are to be seen against, in percent."""

    dense: float
    tolerance: float
    chance: float


def small_multiples(panels: Mapping[str, Sequence[Line]], x_label: str, level: Level, mark: str = "") -> list[Figure]:
    """Draws accuracies against the dense net's, panels with the same axes side by side, on as many pages as keep them readable.

    The scale is linear within the tolerance and logarithmic beyond: the loss of one point and that of fifty are both to be seen.

    Args:
        panels: title -> lines; those without any are left out.
        x_label: of all of them.
        level: drawn in every panel; chance only where the accuracies come near it.
        mark: what the large points are, for the legend.
    """
    every = [line for lines in panels.values() for line in lines]
    gains = [y - level.dense for line in every for _, y in line.points]
    widths = [x for line in every for x, _ in line.points]
    linear = max(level.tolerance, 0.1)
    low, high = 1.5 * min([*gains, -linear]), max([*gains, 0.5 * linear])
    ticks = [-factor * linear for factor in (1000, 300, 100, 30, 10, 3, 1, 0) if -factor * linear >= low]
    figures = []
    for shown in _pages([title for title, lines in panels.items() if lines], _PANELS, _COLUMNS):
        columns = min(_COLUMNS, len(shown))
        rows = math.ceil(len(shown) / columns)
        height = 1.3 + max(1.75, 2.6 - 0.4 * rows) * rows
        figure = Figure(figsize=(max(1 + 2.5 * columns, 7), height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        grid[0].set_yscale("symlog", linthresh=linear, linscale=0.6)
        for axes, title in zip(grid, shown, strict=False):
            _draw(axes, title, panels[title], level)
        for place, axes in enumerate(grid):
            axes.set_visible(place < len(shown))
            axes.xaxis.set_tick_params(labelbottom=place + columns >= len(shown))
        grid[0].set_ylim(low, 1.2 * high)
        grid[0].set_yticks(ticks, [f"{tick:+g}" if tick else "dense" for tick in ticks])
        grid[0].set_yticks([], minor=True)
        grid[0].set_xlim(0, 1.03 * max(widths))
        grid[0].xaxis.set_major_locator(MaxNLocator(nbins=5, integer=all(x == int(x) for x in widths)))
        figure.supxlabel(x_label, fontsize=9, color=INK)
        figure.supylabel("points against the dense net", fontsize=9, color=INK)
        _legend(figure, every, level, mark, chance=low < level.chance - level.dense)
        figures.append(figure)
    return figures


def heatmap(rows: Mapping[str, Sequence[Cell | None]], columns: Sequence[str], title: str) -> list[Figure]:
    """Draws a table whose cells are coloured by their values, on as many pages as it takes.

    Args:
        rows: name -> a cell, or None for a blank one, in each of the columns; rows without any cell are left out.
        columns: their names.
        title: what the colour says.
    """
    rows = {name: cells for name, cells in rows.items() if any(cells)}
    figures = []
    for names in _pages(list(rows), _ROWS):
        shown = [rows[name] for name in names]
        figure = Figure(figsize=(2.6 + 0.85 * max(len(columns), 4), 1.1 + 0.26 * len(names)), layout="constrained")
        axes = figure.subplots()
        values = [[math.nan if cell is None else cell.value for cell in line] for line in shown]
        colours = colormaps["Blues"]
        image = axes.imshow(values, cmap=colours, vmin=0, vmax=1.25, aspect="auto")  # the darkest blues hide text
        for y, line in enumerate(shown):
            for x, cell in enumerate(line):
                if cell is not None:
                    ink = "white" if cell.value > 0.75 else INK
                    axes.text(x, y, cell.text, ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(columns)), columns, fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
        axes.set_xticks([x + 0.5 for x in range(len(columns) - 1)], minor=True)
        axes.set_yticks([y + 0.5 for y in range(len(names) - 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 6 / len(names)), ticks=[0, 0.5, 1])
        bar.ax.set_ylim(0, 1)
        bar.ax.tick_params(labelsize=8, colors=INK)
        bar.outline.set_visible(False)
        bar.set_label(title, fontsize=8, color=INK)
        figures.append(figure)
    return figures


def over_layers(layers: Sequence[str], lines: Sequence[Line], y_label: str, hollow: str) -> Figure:
    """Draws a line for each cut over the layers in order.

    Args:
        layers: their names, in order; a point's x is a layer's place.
        lines: with values between 0 and 1.
        y_label: what they are.
        hollow: what hollow markers say, for the legend.
    """
    figure = Figure(figsize=(max(8.0, min(14.0, 2 + 0.36 * len(layers))), 4.6), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        x, y = zip(*line.points, strict=True)
        bold = {"marker": "", "linewidth": 3} if line.bold else {"linewidth": 1}
        axes.plot(x, y, **{**line.style, **bold}, markersize=4, label=line.label)
        unfilled = {**line.style, "linestyle": "", "markerfacecolor": "white"}
        axes.plot([x[place] for place in line.hollow], [y[place] for place in line.hollow], **unfilled, markersize=4)
    axes.set_xticks(range(len(layers)), layers, rotation=90)
    axes.set_ylim(0, 1.08 * max([y for line in lines for _, y in line.points] + [0.1]))
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylabel(y_label, fontsize=9, color=INK)
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    clean(axes)
    handles, _ = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], marker="o", color=INK, markerfacecolor="white", linestyle="", label=hollow))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def _pages(items: Sequence[_Item], most: int, columns: int = 1) -> list[Sequence[_Item]]:
    """Divides items into pages of nearly the same length, in whole rows."""
    even = math.ceil(len(items) / max(1, math.ceil(len(items) / most)))
    size = max(1, math.ceil(even / columns)) * columns
    return [items[start : start + size] for start in range(0, len(items), size)]


def _draw(axes: Axes, title: str, lines: Sequence[Line], level: Level) -> None:
    axes.axhspan(-level.tolerance, 0, color=_BAND, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.7)
    axes.axhline(level.chance - level.dense, color=INK, linewidth=0.7, linestyle=":")
    for line in lines:
        x, y = zip(*((x, y - level.dense) for x, y in line.points), strict=True)
        axes.plot(x, y, **line.style, markersize=2.5, linewidth=1.1)
        if line.large is not None:
            point = {**line.style, "linestyle": "", "markeredgecolor": "white", "markeredgewidth": 0.5}
            axes.plot(x[line.large], y[line.large], **point, markersize=6)
    axes.set_title(title, fontsize=8, color=INK)
    clean(axes)


def _legend(figure: Figure, lines: Sequence[Line], level: Level, mark: str, chance: bool) -> None:
    styles = {line.label: line.style for line in lines}
    handles = [Line2D([], [], **style, markersize=4, label=label) for label, style in styles.items()]
    if mark:
        handles.append(Line2D([], [], color=INK, marker="o", markersize=7, linestyle="", label=mark))
    handles.append(Line2D([], [], color=INK, linewidth=0.7, label=f"dense, {level.dense:.1f} %"))
    handles.append(Line2D([], [], color=_BAND, linewidth=6, label=f"tolerated, down to -{level.tolerance:g}"))
    if chance:
        handles.append(Line2D([], [], color=INK, linewidth=0.7, linestyle=":", label=f"chance, {level.chance:g} %"))
    columns = 4 if figure.get_figwidth() < 9 else 6
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
