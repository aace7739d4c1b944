"""What the sections of a study's report show: figures, page by page; none where there are no rows for it."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_modules.study.findings import Findings
from lightning_modules.study.report.plots import (
    STYLES,
    Cell,
    Level,
    Line,
    heatmap,
    over_layers,
    small_multiples,
)
from lightning_modules.study.rows import CONTROLS, CUT_SETS, Joint, Layer, Retrained, Single

__all__ = ["study_pictures"]

_NORM_LOSS = "norm loss: the norm of what the truncation takes, of the weight's"
_LARGE = "largest norm loss tolerated"


def study_pictures(of: Findings) -> dict[str, dict[str, Figure]]:
    """Draws section -> file name -> figure; several pages are numbered."""
    sections = {
        "single": _truncations(of, [(cut,) for cut in of.cuts()]),
        "bonds": _bonds(of),
        "depth": _depth(of),
        "several": _truncations(of, of.sets()),
        "controls": _controls(of),
        "joint": _joint(of),
        "retrained": _retrained(of),
        "spectra": _spectra(of),
    }
    return {
        name: {f"{name}-{page}.png" if len(pages) > 1 else f"{name}.png": of for page, of in enumerate(pages, 1)}
        for name, pages in sections.items()
    }


def _truncations(of: Findings, cuts: Sequence[tuple[str, ...]]) -> list[Figure]:
    """Draws accuracy against norm loss, a panel for each layer and a line for each of `cuts`."""
    panels = {}
    for layer in of.layers:
        curves = [(at, of.curve(layer.name, *at)) for at in cuts]
        panels[_title(layer)] = [_line(of, at, curve) for at, curve in curves if curve]
    return small_multiples(panels, _NORM_LOSS, _level(of), _LARGE)


def _bonds(of: Findings) -> list[Figure]:
    """Draws the bond dimension that each cut needs."""
    cuts, rows = of.cuts(), {}
    for layer in of.layers:
        needed = {cut: of.tolerated_bond(layer, cut) for cut in cuts}
        rows[layer.name] = [
            None if bond is None else Cell(bond / layer.bonds[cut], f"{bond}/{layer.bonds[cut]}")
            for cut, bond in needed.items()
        ]
    return heatmap(rows, [of.label(cut) for cut in cuts], "fraction of the bond dimension that is needed")


def _depth(of: Findings) -> list[Figure]:
    """Draws the norm loss tolerated, over the layers in order, and the means that the trend is of."""
    trend = of.depth
    if trend is None:
        return []
    names = [layer.name for layer in of.layers]
    lines = []
    for cut in of.cuts():
        at = [(place, name) for place, name in enumerate(names) if (name, cut) in of.tolerated]
        points = tuple((float(place), of.tolerated[name, cut]) for place, name in at)
        hollow = tuple(index for index, (_, name) in enumerate(at) if of.bottomless(name, cut))
        lines.append(Line(of.label(cut), STYLES.get(cut, STYLES[""]), points, hollow=hollow))
    if len(trend.cuts) > 1:
        label = "their mean" if len(trend.cuts) == len(lines) else f"mean of {', '.join(trend.cuts)}"
        means = tuple((float(names.index(name)), mean) for name, mean in zip(trend.layers, trend.means, strict=True))
        lines.append(Line(label, STYLES[""], means, bold=True))
    return [over_layers(names, lines, "norm loss tolerated", "bond 1 is tolerated: the cut can take no more")]


def _controls(of: Findings) -> list[Figure]:
    """Draws truncations against their controls."""
    panels, singles = {}, of.singles
    for layer in of.layers:
        controlled = dict.fromkeys(cuts for name, cuts, control in singles if name == layer.name and control)
        panels[_title(layer)] = [
            Line(name or "truncation", STYLES[name or "truncation"], _points(of, curve))
            for name in ("", *CONTROLS)
            for cuts in controlled
            if (curve := singles.get((layer.name, cuts, name), ()))
        ]
    return small_multiples(panels, _NORM_LOSS, _level(of))


def _joint(of: Findings) -> list[Figure]:
    joints = of.joints
    known = dict.fromkeys((*((cut,) for cut in of.cuts()), *CUT_SETS.values(), *joints))
    lines = [_line(of, cuts, joints[cuts]) for cuts in known if cuts in joints]
    return small_multiples({"all layers": lines}, "norm loss of all weights together", _level(of), _LARGE)


def _retrained(of: Findings) -> list[Figure]:
    """Draws accuracy against epochs, a panel for each joint truncation."""
    panels: dict[str, list[Line]] = {}
    for row in of.retrained if of.trained_on else ():
        panels.setdefault(f"{of.label(*row.cuts)}, up to {row.target:g} a cut", []).append(_path(row))
    return small_multiples(panels, "epochs of retraining", _level(of))


def _spectra(of: Findings) -> list[Figure]:
    """Draws the exponential of each cut's entanglement entropy, of the bond dimension at which the cut is whole."""
    layers = of.layers
    cuts = list(dict.fromkeys(cut for layer in layers for cut in layer.entropy if layer.bonds[cut] > 1))
    rows: dict[str, list[Cell | None]] = {layer.name: [] for layer in layers}
    for layer in layers:
        for cut in cuts:
            bond, rank = layer.bonds.get(cut, 1), math.exp(layer.entropy.get(cut, 0))
            rows[layer.name].append(Cell(rank / bond, f"{rank:.3g}/{bond}") if bond > 1 else None)
    return heatmap(rows, [of.label(cut) for cut in cuts], "effective rank, of the bond dimension")


def _level(of: Findings) -> Level:
    study = of.study
    return Level(100 * study.accuracy, 100 * study.protocol.tolerance, 100 / study.classes)


def _title(layer: Layer) -> str:
    return f"{layer.name}  {'x'.join(map(str, layer.shape))}"


def _line(of: Findings, cuts: tuple[str, ...], curve: Sequence[Single] | Sequence[Joint]) -> Line:
    label = of.label(*cuts)
    style = STYLES.get(cuts[0] if len(cuts) == 1 else label, STYLES[""])
    return Line(label, style, _points(of, curve), large=of.num_tolerated(curve) or None)


def _points(of: Findings, curve: Sequence[Single] | Sequence[Joint]) -> tuple[tuple[float, float], ...]:
    """Lists points from the dense net on; but a random weight is not the dense net's even where nothing is truncated."""
    random = isinstance(curve[0], Single) and curve[0].control == "random weight"
    start = [] if random else [(0.0, 100 * of.study.accuracy)]
    return (*start, *((row.eps, 100 * row.accuracy) for row in curve))


def _path(row: Retrained) -> Line:
    label = "dense weights" if row.weights == "dense" else row.weights
    points = tuple((float(epoch), 100 * accuracy) for epoch, accuracy in enumerate(row.accuracy))
    return Line(label, STYLES[row.weights], points)
