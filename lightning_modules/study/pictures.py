"""What each section of a study's report shows: its figures, page by page; none where there are no rows for it."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_modules.study.findings import Depth, Measured
from lightning_modules.study.plots import STYLES, Cell, Level, Line, Panel, Style, heatmap, over_layers, small_multiples
from lightning_modules.study.rows import CONTROLS, CUT_SETS, Joint, Layer, Retrained, Single

__all__ = ["bonds", "controls", "depth", "effective_ranks", "joint", "retrained", "truncations"]

_OTHER = Style("#333333")
_NORM_LOSS = "norm loss: the norm of what the truncation takes, of the weight's"
_LARGE = "largest norm loss tolerated"


def truncations(measured: Measured, cuts: Sequence[tuple[str, ...]]) -> list[Figure]:
    """Accuracy against norm loss, a panel for each layer and a line for each of `cuts`."""
    panels = []
    for layer in measured.layers:
        curves = [(at, measured.curve(layer.name, *at)) for at in cuts]
        lines = tuple(_line(measured, at, curve) for at, curve in curves if curve)
        panels.append(Panel(_title(layer), lines))
    return small_multiples(panels, _NORM_LOSS, _level(measured), _LARGE)


def controls(measured: Measured) -> list[Figure]:
    """Truncations against their controls, at the cuts of a layer that have any."""
    panels = []
    for layer in measured.layers:
        cuts = dict.fromkeys(cuts for name, cuts, control in measured.singles if name == layer.name and control)
        curves = [(name, measured.singles.get((layer.name, at, name), ())) for name in ("", *CONTROLS) for at in cuts]
        lines = tuple(
            Line(name or "truncation", STYLES[name or "truncation"], _points(measured, curve))
            for name, curve in curves
            if curve
        )
        panels.append(Panel(_title(layer), lines))
    return small_multiples(panels, _NORM_LOSS, _level(measured))


def joint(measured: Measured) -> list[Figure]:
    order = [*((cut,) for cut in measured.cuts()), *CUT_SETS.values(), *measured.joints]
    known = dict.fromkeys(cuts for cuts in order if cuts in measured.joints)
    panel = Panel("all layers", tuple(_line(measured, cuts, measured.joints[cuts]) for cuts in known))
    return small_multiples([panel], "norm loss of all weights together", _level(measured), _LARGE)


def retrained(measured: Measured) -> list[Figure]:
    """Accuracy against epochs, a panel for each joint truncation."""
    panels: dict[tuple[tuple[str, ...], float], list[Retrained]] = {}
    for row in measured.retrained:
        panels.setdefault((row.cuts, row.target), []).append(row)
    shown = [
        Panel(f"{measured.label(cuts)}, up to {target:g} a cut", tuple(_path(row) for row in rows))
        for (cuts, target), rows in panels.items()
    ]
    return small_multiples(shown, "epochs of retraining", _level(measured))


def bonds(measured: Measured) -> list[Figure]:
    """The bond dimension that each cut needs."""
    rows: dict[str, list[Cell | None]] = {}
    for layer in measured.layers:
        needed = [(cut, measured.tolerated_bond(layer, cut)) for cut in measured.cuts()]
        rows[layer.name] = [
            None if bond is None else Cell(bond / layer.bonds[cut], f"{bond}/{layer.bonds[cut]}")
            for cut, bond in needed
        ]
    return heatmap(rows, _labels(measured, measured.cuts()), "fraction of the bond dimension that is needed")


def effective_ranks(measured: Measured) -> list[Figure]:
    """The exponential of each cut's entanglement entropy, of the bond dimension at which the cut is whole."""
    cuts = list(dict.fromkeys(cut for layer in measured.layers for cut in layer.entropy if layer.bonds[cut] > 1))
    rows: dict[str, list[Cell | None]] = {}
    for layer in measured.layers:
        ranks = {cut: math.exp(entropy) for cut, entropy in layer.entropy.items() if layer.bonds[cut] > 1}
        rows[layer.name] = [
            Cell(ranks[cut] / layer.bonds[cut], f"{ranks[cut]:.3g}/{layer.bonds[cut]}") if cut in ranks else None
            for cut in cuts
        ]
    return heatmap(rows, _labels(measured, cuts), "effective rank, of the bond dimension")


def depth(measured: Measured, trend: Depth) -> list[Figure]:
    """The norm loss tolerated, over the layers in order, and the means that the trend is of."""
    names = [layer.name for layer in measured.layers]
    lines = []
    for cut in measured.cuts():
        tolerated = [(place, measured.tolerated_eps(name, cut)) for place, name in enumerate(names)]
        points = tuple((float(place), eps) for place, eps in tolerated if eps is not None)
        hollow = tuple(index for index, (place, _) in enumerate(points) if measured.bottomless(names[int(place)], cut))
        lines.append(Line(measured.label([cut]), STYLES.get(cut, _OTHER), points, hollow=hollow))
    if len(trend.cuts) > 1:
        label = "their mean" if len(trend.cuts) == len(lines) else f"mean of {', '.join(trend.cuts)}"
        means = tuple((float(names.index(name)), mean) for name, mean in zip(trend.layers, trend.means, strict=True))
        lines.append(Line(label, _OTHER, means, bold=True))
    return [over_layers(names, lines, "norm loss tolerated", "bond 1 is tolerated: the cut can take no more")]


def _level(measured: Measured) -> Level:
    study = measured.study
    return Level(100 * study.accuracy, 100 * study.protocol.tolerance, 100 / study.classes)


def _labels(measured: Measured, cuts: Sequence[str]) -> list[str]:
    return [measured.label([cut]) for cut in cuts]


def _title(layer: Layer) -> str:
    return f"{layer.name}  {'x'.join(map(str, layer.shape))}"


def _line(measured: Measured, cuts: tuple[str, ...], curve: Sequence[Single] | Sequence[Joint]) -> Line:
    label = measured.label(cuts)
    style = STYLES.get(cuts[0] if len(cuts) == 1 else label, _OTHER)
    kept = measured.num_tolerated(curve)
    return Line(label, style, _points(measured, curve), large=kept or None)


def _points(measured: Measured, curve: Sequence[Single] | Sequence[Joint]) -> tuple[tuple[float, float], ...]:
    """From the dense net on; but a random weight is not the dense net's even where nothing is truncated."""
    random = isinstance(curve[0], Single) and curve[0].control == "random weight"
    start = [] if random else [(0.0, 100 * measured.study.accuracy)]
    return (*start, *((row.eps, 100 * row.accuracy) for row in curve))


def _path(row: Retrained) -> Line:
    label = "dense weights" if row.weights == "dense" else row.weights
    points = tuple((float(epoch), 100 * accuracy) for epoch, accuracy in enumerate(row.accuracy))
    return Line(label, STYLES[row.weights], points)
